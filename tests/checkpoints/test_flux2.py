"""The tiny Flux.2 checkpoint is one that stock Diffusers loads and runs, laid out like the real repository."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import flux2, write
from tests.checkpoints.checks import digests, every_parameter_matters


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write("flux2-tiny", tmp_path_factory.mktemp("flux2") / "flux2-tiny")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoise(pipeline, prompt="a red fox runs in the snow", output_type="latent", seed=1):
    return pipeline(
        prompt=prompt,
        height=256,
        width=320,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).images


def stored(folder):
    """Every tensor of a component folder by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


def test_the_stock_pipeline_makes_a_picture(pipeline):
    picture = denoise(pipeline, output_type="np")
    assert picture.shape == (1, 256, 320, 3)
    assert math.isfinite(picture.sum())
    assert picture.std() > 0.05, "one flat colour"
    assert ((picture == 0) | (picture == 1)).mean() < 0.3, "most of the picture is clipped"


def test_latents_stay_of_order_one_and_follow_prompt_and_seed(pipeline):
    latents = denoise(pipeline)
    assert 0.5 < latents.std() < 3
    assert (latents - denoise(pipeline, prompt="a green train")).abs().max() > 0.02
    assert (latents - denoise(pipeline, seed=2)).abs().max() > 0.5
    assert torch.equal(latents, denoise(pipeline))


def test_every_parameter_matters(pipeline):
    every_parameter_matters(pipeline)
    assert pipeline.vae.bn.running_mean.std() > 0.1
    assert pipeline.vae.bn.running_var.std() > 0.1


def test_files_lie_and_weights_are_named_as_in_the_real_repository(checkpoint):
    assert len(list((checkpoint / "transformer").glob("diffusion_pytorch_model-0000?-of-0000?.safetensors"))) > 2
    assert len(list((checkpoint / "text_encoder").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert [path.name for path in (checkpoint / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert (checkpoint / "tokenizer" / "chat_template.jinja").is_file()
    names = stored(checkpoint / "text_encoder")
    assert "language_model.model.layers.32.mlp.up_proj.weight" in names
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= set(names)
    assert "vision_tower.transformer.layers.1.attention.q_proj.weight" in names
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 20e6


def test_configs_say_what_the_real_ones_say(checkpoint, pipeline):
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PixtralProcessor"]
    scheduler, transformer, vae = (part.config for part in (pipeline.scheduler, pipeline.transformer, pipeline.vae))
    assert (scheduler.use_dynamic_shifting, scheduler.time_shift_type) == (True, "exponential")
    assert transformer.guidance_embeds
    assert transformer.in_channels == 4 * vae.latent_channels == 128
    text = pipeline.text_encoder.config.text_config
    assert transformer.joint_attention_dim == 3 * text.hidden_size
    assert text.rope_parameters["rope_theta"] == 1e9
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert pipeline.text_encoder.config.image_token_id == 10


def test_the_tokenizer_knows_mistrals_special_tokens_and_any_text(pipeline):
    tokenizer = pipeline.tokenizer.tokenizer
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 10, 11, 17, 18]
    assert tokenizer.padding_side == "left"
    text = "Jazz quartet at 7pm (live)! 一只猫 🦊\n“Zeile”"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < pipeline.text_encoder.config.text_config.vocab_size


def test_the_same_seed_gives_the_same_files_in_any_process(checkpoint, tmp_path):
    command = [sys.executable, "-m", "tests.checkpoints", "flux2-tiny", str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert digests(tmp_path / "again") == digests(checkpoint)


def test_seed_dtype_and_overrides_are_followed(checkpoint, tmp_path):
    folder = flux2.write(tmp_path / "b", seed=3, dtype=torch.bfloat16, transformer={"num_single_layers": 1})
    weights = stored(folder / "transformer")
    assert "single_transformer_blocks.0.attn.to_out.weight" in weights
    assert "single_transformer_blocks.1.attn.to_out.weight" not in weights
    name = "transformer_blocks.0.attn.to_q.weight"
    assert weights[name].dtype == torch.bfloat16
    assert not torch.equal(weights[name], stored(checkpoint / "transformer")[name].to(torch.bfloat16))


def test_writing_leaves_torchs_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flux2.write(tmp_path / "c", transformer={"num_single_layers": 1})
    assert torch.equal(torch.rand(3), expected)


def test_an_override_for_an_unknown_component_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unet"):
        flux2.write(tmp_path / "d", unet={"num_layers": 1})
