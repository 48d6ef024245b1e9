"""The tiny CogVideoX checkpoints are ones that stock Diffusers loads and runs, laid out like the real repositories."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import cogvideox, write
from tests.checkpoints.checks import digests, every_parameter_matters


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write("cogvideox15-tiny", tmp_path_factory.mktemp("cogvideox") / "cogvideox15-tiny")


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    return write("cogvideox-tiny", tmp_path_factory.mktemp("cogvideox") / "cogvideox-tiny")


def load(folder):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return load(checkpoint)


def denoise(pipeline, prompt="a red fox runs in the snow", output_type="latent", seed=1):
    return pipeline(
        prompt,
        negative_prompt="blurred",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).frames


@pytest.mark.parametrize("name", ["checkpoint", "older"])
def test_the_stock_pipeline_makes_a_moving_picture(name, request):
    frames = denoise(load(request.getfixturevalue(name)), output_type="np")
    assert frames.shape == (1, 9, 64, 64, 3)
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
    assert len(list((checkpoint / "transformer").glob("diffusion_pytorch_model-0000?-of-0000?.safetensors"))) > 1
    assert len(list((checkpoint / "text_encoder").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert (checkpoint / "text_encoder" / "model.safetensors.index.json").is_file()
    assert [path.name for path in (checkpoint / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 20e6


def test_the_three_repositories_differ_as_the_real_ones_do(tmp_path, checkpoint, older):
    two_b = cogvideox.write(tmp_path / "2b", variant="1.0-2b")
    configs = [json.loads((folder / "transformer/config.json").read_text()) for folder in (checkpoint, older, two_b)]
    assert [c["patch_size_t"] for c in configs] == [2, None, None]
    assert [c["use_rotary_positional_embeddings"] for c in configs] == [True, True, False]
    assert [(c["sample_height"], c["sample_width"]) for c in configs] == [(300, 300), (60, 90), (60, 90)]
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (checkpoint, older, two_b)]
    dpm, ddim = "CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"
    assert [index["scheduler"][1] for index in indices] == [dpm, dpm, ddim]
    assert [json.loads((f / "vae/config.json").read_text())["scaling_factor"] for f in (older, two_b)] == [
        0.7,
        1.15258426,
    ]


def test_the_same_seed_gives_the_same_files_in_any_process(checkpoint, tmp_path):
    command = [sys.executable, "-m", "tests.checkpoints", "cogvideox15-tiny", str(tmp_path / "again")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert digests(tmp_path / "again") == digests(checkpoint)


def test_seed_dtype_and_overrides_are_followed(tmp_path):
    folder = cogvideox.write(tmp_path / "b", seed=3, dtype=torch.bfloat16, transformer={"num_layers": 1})
    weights = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            weights.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    assert "transformer_blocks.0.attn1.to_q.weight" in weights
    assert "transformer_blocks.1.attn1.to_q.weight" not in weights
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_writing_leaves_torchs_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cogvideox.write(tmp_path / "c", transformer={"num_layers": 1})
    assert torch.equal(torch.rand(3), expected)


def test_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(TypeError, match="unet"):
        cogvideox.write(tmp_path / "d", unet={"num_layers": 1})
    with pytest.raises(ValueError, match=r"1\.0-2b; got '2b'"):
        cogvideox.write(tmp_path / "d", variant="2b")
