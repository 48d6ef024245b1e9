"""Group norms of spread videos against torch's own, on one device and on eight."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comfyui_tpu.ops import chunk_norm
from comfyui_tpu.ops.causal_conv import PAST
from tests.ops.spread import LAYOUTS, as_torch, from_torch, random, spread

EPS = 1e-6


def normed(layout, x, columns=1):
    mean, scale = chunk_norm.group_statistics(x, layout, 2, EPS, columns)
    return (x - mean) * scale


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(("rows", "chips"), LAYOUTS)
def test_statistics_are_torchs_group_norms(rows, chips, columns):
    video = random(3, rows, 4, 6) * np.arange(1, 7, dtype=np.float32) + np.arange(6, dtype=np.float32)
    expected = from_torch(torch.nn.functional.group_norm(as_torch(video), 2, eps=EPS))
    paired = video.reshape(3, rows, 4 // columns, 6 * columns)
    out = spread(lambda layout, x: normed(layout, x, columns), paired, rows, chips)
    np.testing.assert_allclose(out.reshape(video.shape), expected, atol=2e-6)


def test_a_large_common_offset_leaves_the_variance():
    video = random(3, 6, 4, 6) + 1000
    expected = torch.nn.functional.group_norm(as_torch(video).double(), 2, eps=EPS)
    np.testing.assert_allclose(spread(normed, video, 6, 1), from_torch(expected), atol=2e-3)


def test_statistics_of_bfloat16_are_float32():
    video = jnp.asarray(random(3, 6, 4, 6) + 3, jnp.bfloat16)

    def statistics(layout, x):
        return jnp.tile(jnp.stack(chunk_norm.group_statistics(x, layout, 2, EPS))[None, None], (1, 6, 1, 1))

    exact = spread(statistics, np.asarray(video.astype(jnp.float32)), 6, 1)
    np.testing.assert_allclose(spread(statistics, np.asarray(video), 6, 1), exact, rtol=1e-6)


def enlarged(few, shape):
    """As Diffusers' ``CogVideoXSpatialNorm3D`` enlarges latents: of odd frames the first by itself."""
    parts = [(slice(0, 1), slice(0, 1)), (slice(1, None), slice(1, None))] if len(few) % 2 else [(slice(None),) * 2]
    parts = [(few[a], range(shape[0])[b]) for a, b in parts if len(few[a])]
    made = [torch.nn.functional.interpolate(as_torch(x), size=(len(t), *shape[1:3])) for x, t in parts]
    return from_torch(torch.cat(made, dim=2))


# Frames of the video and of what it is modulated by.
@pytest.mark.parametrize(("frames", "few"), [(8, 2), (2, 2), (9, 3), (5, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("high", [1, 4])
def test_every_place_is_modulated_by_its_own(frames, few, high):
    video, factor, shift = random(frames, 3 * high, 5, 4), random(few, 3, 5, 4), random(4, few, 3, 5, 4)[0]
    mean, scale = random(4), np.abs(random(1, 4)[0]) + 0.5
    by, plus = (torch.from_numpy(enlarged(y, video.shape)) for y in (factor, shift))
    expected = torch.nn.functional.silu(torch.from_numpy((video - mean) * scale) * by + plus).numpy()
    out = chunk_norm.modulated(*map(jnp.asarray, (video, mean, scale, factor, shift)))
    assert out.shape == (frames + PAST, 3 * high + 2, 5, 4)
    np.testing.assert_allclose(out[PAST:, 1:-1], expected, rtol=2e-6, atol=2e-6)
