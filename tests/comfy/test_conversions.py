"""Core's CONDITIONING and LATENT in, tensors out; everything wrong is refused with what came."""

import pytest
import torch

from comfyui_tpu.comfy.conversions import (
    check_ranges,
    from_conditioning,
    from_video_latent,
    to_conditioning,
    to_latent,
)
from comfyui_tpu.runtime.errors import InvalidInput, NumericsError


def convert(conditioning):
    return from_conditioning(conditioning, name="prompt_embeds", text_dim=64, max_tokens=512)


def test_conditioning_comes_back_unchanged():
    embeds = torch.randn(1, 512, 64)
    assert torch.equal(convert(to_conditioning(embeds)), embeds)


def test_shorter_conditioning_of_another_dtype_is_padded_with_zeros():
    embeds = torch.randn(1, 77, 64, dtype=torch.bfloat16)
    converted = convert([[embeds, {"pooled_output": None}]])
    assert converted.shape == (1, 512, 64)
    assert converted.dtype == torch.float32
    assert torch.equal(converted[:, :77], embeds.float())
    assert not converted[:, 77:].any()


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ([], "prompt_embeds is empty"),
        (None, "prompt_embeds is empty"),
        ([[torch.zeros(1, 5, 64), {}]] * 2, r"one prompt, but 2 came combined.*Conditioning \(Combine\)"),
        ([[torch.zeros(1, 5, 32), {}]], r"32 wide.* 64 wide.*same model_id"),
        ([[torch.zeros(1, 513, 64), {}]], "513 tokens, the model takes 512"),
        ([[torch.zeros(2, 5, 64), {}]], r"\[1, tokens, 64\], but shape \[2, 5, 64\] came"),
        ([[torch.zeros(5, 64), {}]], r"but shape \[5, 64\] came"),
        ([[torch.zeros(1, 5, 64), {"mask": torch.ones(1)}]], r"'mask' from Conditioning \(Set Mask\)"),
        ([[torch.zeros(1, 5, 64), {"start_percent": 0.2, "end_percent": 1.0}]], "'start_percent'"),
    ],
)
def test_unusable_conditioning_is_refused(conditioning, message):
    with pytest.raises(InvalidInput, match=message):
        convert(conditioning)


def test_a_timestep_range_over_the_whole_run_changes_nothing_and_is_accepted():
    convert([[torch.zeros(1, 5, 64), {"start_percent": 0.0, "end_percent": 1.0}]])


def test_nan_in_conditioning_is_refused():
    with pytest.raises(NumericsError, match="prompt_embeds holds NaN"):
        convert([[torch.full((1, 5, 64), torch.nan), {}]])


def test_a_video_latent_passes_as_float32():
    samples = torch.randn(2, 16, 5, 8, 8, dtype=torch.float16)
    converted = from_video_latent({"samples": samples}, channels=16)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, samples.float())


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ({"samples": torch.zeros(1, 16, 8, 8)}, r"image latents \[1, 16, 8, 8\] came"),
        ({"samples": torch.zeros(1, 12, 5, 8, 8)}, r"\[batch, 16, frames.*but 12 channels came.*another model"),
        ({"samples": torch.zeros(1, 48, 5, 8, 8)}, "but 48 channels came"),
        ({"samples": torch.zeros(1, 16, 0, 8, 8)}, r"but shape \[1, 16, 0, 8, 8\] came"),
        ({"samples": torch.zeros(3)}, r"but shape \[3\] came"),
        ({}, 'LATENT with a tensor "samples"'),
        (None, 'LATENT with a tensor "samples"'),
    ],
)
def test_unusable_latents_are_refused(latent, message):
    with pytest.raises(InvalidInput, match=message):
        from_video_latent(latent, channels=16)


def test_nan_in_latents_is_refused_on_both_sides():
    samples = torch.zeros(1, 16, 5, 8, 8)
    samples[0, 3, 2, 1, 0] = torch.inf
    with pytest.raises(NumericsError, match="latents hold NaN"):
        from_video_latent({"samples": samples}, channels=16)
    with pytest.raises(NumericsError, match="sampler produced NaN"):
        to_latent(samples)


@pytest.mark.parametrize("value", [0.9, 10.1, float("nan"), float("inf")])
def test_a_value_out_of_range_is_refused_with_both_bounds(value):
    with pytest.raises(InvalidInput, match=r"flow_shift must be between 1\.0 and 10\.0, but "):
        check_ranges({"flow_shift": (1.0, 10.0)}, {"flow_shift": value})
