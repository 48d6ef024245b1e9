"""Core's CONDITIONING, LATENT, IMAGE and SIGMAS in, tensors out; everything wrong is refused with what came."""

import pytest
import torch

from comfyui_tpu.comfy.conversions import (
    check_ranges,
    check_size_hints,
    from_conditioning,
    from_image,
    from_image_latent,
    from_reference_images,
    from_sigmas,
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


def test_padding_may_come_before_the_tokens():
    embeds = torch.randn(1, 77, 64)
    converted = from_conditioning([[embeds, {}]], name="prompt_embeds", text_dim=64, max_tokens=512, pad_left=True)
    assert torch.equal(converted[:, -77:], embeds)
    assert not converted[:, :-77].any()


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
        (
            [[torch.zeros(1, 5, 64), {"guidance": 3.5}]],
            "'guidance' from Flux Guidance.*Set the sampler's guidance_scale",
        ),
        ([[torch.zeros(1, 5, 64), {"guidance": None}]], "'guidance' from Flux Guidance"),
        (
            [[torch.zeros(1, 5, 64), {"reference_latents": [0]}]],
            "Connect the pictures to the sampler's reference_images",
        ),
    ],
)
def test_unusable_conditioning_is_refused(conditioning, message):
    with pytest.raises(InvalidInput, match=message):
        convert(conditioning)


def test_options_without_effect_are_accepted():
    convert([[torch.zeros(1, 5, 64), {"start_percent": 0.0, "end_percent": 1.0, "control": None, "mask": None}]])


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


def test_an_image_latent_passes_as_float32():
    samples = torch.randn(2, 128, 16, 20, dtype=torch.float16)
    converted = from_image_latent({"samples": samples, "batch_index": [0, 1]}, channels=128, scale=16)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, samples.float())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            torch.zeros(1, 16, 32, 32),
            r"\[batch, 128, height/16, width/16\], but 16 channels came \(shape \[1, 16, 32, 32\]\)",
        ),
        (torch.zeros(1, 128, 1, 16, 16), r"but video latents \[1, 128, 1, 16, 16\] came"),
        (torch.zeros(128, 16, 16), r"but shape \[128, 16, 16\] came"),
        (torch.zeros(1, 128, 0, 16), r"but shape \[1, 128, 0, 16\] came"),
    ],
)
def test_unusable_image_latents_are_refused(samples, message):
    with pytest.raises(InvalidInput, match=message):
        from_image_latent({"samples": samples}, channels=128, scale=16)


@pytest.mark.parametrize("hints", [(256, 320), (0, 320), (256, 0), (0, 0)])
def test_size_hints_that_agree_or_are_not_given_pass(hints):
    check_size_hints(torch.zeros(1, 128, 16, 20), 16, *hints)


@pytest.mark.parametrize("hints", [(320, 256), (0, 256), (1024, 1024)])
def test_a_size_hint_that_contradicts_names_both_sizes(hints):
    with pytest.raises(
        InvalidInput, match=rf"say {hints[0]}×{hints[1]}, .* 256×320 .*Set height to 256 and width to 320"
    ):
        check_size_hints(torch.zeros(1, 128, 16, 20), 16, *hints)


def test_sigmas_keep_their_values():
    assert from_sigmas(torch.tensor([1.0, 0.75, 0.25, 0.0], dtype=torch.float64)) == [1.0, 0.75, 0.25, 0.0]
    assert from_sigmas(torch.tensor([1.0, 0.0])) == [1.0, 0.0]
    assert from_sigmas(None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, 0.0]], r"but shape \[1, 2\] came"),
        ([0.0], r"but shape \[1\] came"),
        ([], r"but shape \[0\] came"),
        ([1.0, 0.5, 0.5, 0.0], "decrease from step to step, but 1, 0.5, 0.5, 0 came"),
        ([0.0, 0.5, 1.0], "decrease"),
        ([1.0, torch.nan, 0.0], "finite"),
        ([torch.inf, 0.5, 0.0], "finite"),
        ([1.0, 0.5, 0.2], r"end with 0 .*the last of 1, 0\.5, 0\.2 is 0\.2"),
        ([0.6, 0.3, 0.0], r"begin with 1 .* is 0\.6"),
        ([14.6, 3.0, 0.0], r"begin with 1 .* is 14\.6.*scheduler for flow models"),
    ],
)
def test_unusable_sigmas_are_refused(values, message):
    with pytest.raises(InvalidInput, match=message):
        from_sigmas(torch.tensor(values))


def test_an_image_becomes_rgb_in_0_to_1():
    rgb = torch.rand(2, 8, 8, 3)
    assert torch.equal(from_image("image", rgb), rgb)
    assert torch.equal(from_image("image", rgb[..., :1]), rgb[..., :1].expand(2, 8, 8, 3))
    assert torch.equal(from_image("image", rgb.half() * 1.2 - 0.1), (rgb.half() * 1.2 - 0.1).float().clamp(0, 1))


def test_transparency_becomes_white():
    image = torch.zeros(1, 1, 3, 4)
    image[0, 0, :, 3] = torch.tensor([1.0, 0.5, 0.0])
    assert torch.equal(from_image("image", image)[0, 0, :, 0], torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(8, 8, 3), r"\[batch, height, width, 1, 3 or 4 channels\], but shape \[8, 8, 3\] came"),
        (torch.zeros(1, 8, 8, 2), r"but shape \[1, 8, 8, 2\] came"),
        (torch.zeros(0, 8, 8, 3), r"but shape \[0, 8, 8, 3\] came"),
        ("picture.png", "but str came"),
        (torch.full((1, 8, 8, 3), 255.0), r"values in 0\.\.1, but 255\.\.255 came"),
        (torch.full((1, 8, 8, 3), torch.nan), "image holds NaN"),
    ],
)
def test_unusable_images_are_refused(image, message):
    with pytest.raises((InvalidInput, NumericsError), match=message):
        from_image("image", image)


LIMITS = {"limit": 3, "min_side": 64, "max_ratio": 8}


def test_reference_images_come_one_by_one_in_the_order_of_the_inputs():
    small, wide = torch.rand(2, 64, 64, 3), torch.rand(1, 64, 512, 3)
    images = from_reference_images({"a": small, "b": None, "c": wide}, **LIMITS)
    assert [tuple(image.shape) for image in images] == [(64, 64, 3), (64, 64, 3), (64, 512, 3)]
    assert torch.equal(images[1], small[1])
    assert from_reference_images({"a": None}, **LIMITS) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 64, 64, 3), (2, 64, 80, 3)], r"up to 3 reference images, but 4 came \(2 in a \+ 2 in b\)"),
        ([(1, 64, 64, 3), (1, 63, 64, 3)], "b must be at least 64 pixels wide and high.*but 64×63 came"),
        ([(1, 64, 513, 3)], "a must be .* at most 8 times as long as short, but 513×64 came"),
    ],
)
def test_unusable_reference_images_are_refused(shapes, message):
    with pytest.raises(InvalidInput, match=message):
        from_reference_images({name: torch.zeros(shape) for name, shape in zip("abc", shapes, strict=False)}, **LIMITS)
