"""The tiny Wan 2.1 checkpoint is one that stock Diffusers loads and runs, laid out like the real repository."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import wan21, write
from tests.checkpoints.checks import digests, every_parameter_matters


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write("wan21-tiny", tmp_path_factory.mktemp("wan21") / "wan21-tiny")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoise(pipeline, prompt="a red fox runs in the snow", output_type="latent", seed=1):
    return pipeline(
        prompt,
        negative_prompt="blurred",
        height=256,
        width=256,
        num_frames=17,
        num_inference_steps=2,
        max_sequence_length=512,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).frames


def test_the_stock_pipeline_makes_a_moving_picture(pipeline):
    frames = denoise(pipeline, output_type="np")
    assert frames.shape == (1, 17, 256, 256, 3)
    assert math.isfinite(frames.sum())
    assert frames[0].std(axis=(1, 2)).min() > 0.02, "a frame is one flat colour"
    assert abs(frames[0, 1:] - frames[0, :-1]).mean(axis=(1, 2, 3)).min() > 0.005, "two frames are the same"
    assert ((frames == 0) | (frames == 1)).mean() < 0.3, "most of the picture is clipped"


def test_latents_stay_of_order_one_and_follow_prompt_and_seed(pipeline):
    latents = denoise(pipeline)
    assert 0.5 < latents.std() < 3
    assert (latents - denoise(pipeline, prompt="a green train")).abs().max() > 0.05
    assert (latents - denoise(pipeline, seed=2)).abs().max() > 0.5
    assert torch.equal(latents, denoise(pipeline))


def test_every_parameter_matters(pipeline):
    every_parameter_matters(pipeline)


def test_components_are_sharded_as_in_the_real_repository(checkpoint):
    assert len(list((checkpoint / "transformer").glob("diffusion_pytorch_model-0000?-of-0000?.safetensors"))) > 2
    assert len(list((checkpoint / "text_encoder").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert (checkpoint / "text_encoder" / "model.safetensors.index.json").is_file()
    assert [path.name for path in (checkpoint / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 20e6


def test_configs_say_what_the_real_ones_say(checkpoint, pipeline):
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "T5TokenizerFast"]
    assert (pipeline.scheduler.config.flow_shift, pipeline.scheduler.config.use_flow_sigmas) == (3.0, True)
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.vae.config.z_dim == len(pipeline.vae.config.latents_mean) == 16
    assert pipeline.vae.config.latents_mean[:2] == [-0.7571, -0.7089]
    assert pipeline.transformer.config.text_dim == pipeline.text_encoder.config.d_model


def test_the_tokenizer_pads_ends_and_knows_any_english_and_common_chinese(pipeline):
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        "Jazz quartet plays at 7pm (live)! 一只猫在雪地奔跑。", padding="max_length", max_length=64
    ).input_ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    end = ids.index(1)
    assert ids[end + 1 :] == [0] * (63 - end)
    assert ids.count(tokenizer.unk_token_id) + ids.count(2) <= 1  # one Chinese character outside the corpus
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_the_same_seed_gives_the_same_files_in_any_process(checkpoint, tmp_path):
    command = [sys.executable, "-m", "tests.checkpoints", "wan21-tiny", str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert digests(tmp_path / "again") == digests(checkpoint)


def test_seed_dtype_and_overrides_are_followed(tmp_path):
    folder = wan21.write(tmp_path / "b", seed=3, dtype=torch.bfloat16, transformer={"num_layers": 1})
    weights = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            weights.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    assert "blocks.0.attn1.to_q.weight" in weights
    assert "blocks.1.attn1.to_q.weight" not in weights
    assert weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert weights["blocks.0.scale_shift_table"].dtype == torch.float32  # Diffusers keeps this one in float32


def test_writing_leaves_torchs_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    wan21.write(tmp_path / "c", transformer={"num_layers": 1})
    assert torch.equal(torch.rand(3), expected)


def test_an_override_for_an_unknown_component_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unet"):
        wan21.write(tmp_path / "d", unet={"num_layers": 1})
