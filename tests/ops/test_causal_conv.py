"""Causal convolutions of spread videos against torch's own, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comfyui_tpu.ops import causal_conv, column_kernels
from comfyui_tpu.ops.causal_conv import Rows
from tests.ops.spread import LAYOUTS, as_torch, everywhere, from_torch, random, spread


@pytest.mark.parametrize("convolve", [causal_conv.convolve, causal_conv.convolve_to_few])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(("rows", "chips"), LAYOUTS)
def test_a_convolution_is_torchs(rows, chips, columns, convolve):
    video, weight, bias = random(5, rows, 12, 4), random(6, 4, 3, 3, 3), random(6)

    def run(layout, x, weight, bias):
        wide = causal_conv.with_columns(layout.with_neighbours(x), columns)
        return convolve(wide, causal_conv.weights_of(weight, columns), bias)

    paired = video.reshape(5, rows, 12 // columns, 4 * columns)
    out = spread(run, paired, rows, chips, weight, bias).reshape(3, rows, 12, 6)
    expected = torch.nn.functional.conv3d(as_torch(video), *map(torch.from_numpy, (weight, bias)), padding=(0, 1, 1))
    np.testing.assert_allclose(out, from_torch(expected), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(("rows", "chips"), LAYOUTS)
def test_every_row_has_its_neighbours_and_zeros_beyond_the_picture(rows, chips):
    video = random(2, rows, 4, 3)

    def into_room(layout, x):
        return layout.filled_in(jnp.pad(layout.real(x), ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=7.0))

    padded = np.pad(video, ((0, 0), (1, 1), (0, 0), (0, 0)))
    expected = np.concatenate([padded[:, :-2], padded[:, 2:]], axis=-1)
    for run in (into_room, Rows.with_neighbours):
        both = lambda layout, x, run=run: jnp.concatenate([run(layout, x)[:, :-2], run(layout, x)[:, 2:]], axis=-1)  # noqa: E731
        np.testing.assert_array_equal(spread(both, video, rows, chips), expected)


@pytest.mark.parametrize(("rows", "chips"), LAYOUTS)
def test_upsampling_is_torchs(rows, chips):
    video, weight, bias = random(2, rows, 6, 4), random(3, 4, 3, 3), random(3)
    out = spread(lambda layout, x, w, b: causal_conv.upsampled(x, w, b, layout), video, rows, chips, weight, bias)
    twice = torch.nn.functional.interpolate(as_torch(video)[0].swapaxes(0, 1), scale_factor=2.0, mode="nearest-exact")
    expected = torch.nn.functional.conv2d(twice, *map(torch.from_numpy, (weight, bias)), padding=1)
    np.testing.assert_allclose(
        out.reshape(2, 2 * rows, 12, 3), expected.permute(0, 2, 3, 1).numpy(), rtol=2e-6, atol=2e-5
    )


@pytest.mark.parametrize("columns", [1, 2])
def test_the_norm_is_of_each_column(columns):
    video, gain = random(2, 3, 4, 10) * 1e-3, random(5)
    if columns == 1:
        video = video[..., :5]
    video[0, 0, 0] = 0
    out = np.asarray(jax.nn.silu(causal_conv.rms_norm(video, gain, columns))).reshape(-1, 5)
    normed = torch.nn.functional.normalize(torch.from_numpy(video).reshape(-1, 5), dim=1) * 5**0.5
    np.testing.assert_allclose(out, torch.nn.functional.silu(normed * torch.from_numpy(gain)).numpy(), atol=1e-5)
    assert not out[0].any()


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(("width", "rows", "chips"), [(12, 16, 8), (130, 13, 8), (256, 9, 4), (128, 6, 1)])
def test_the_kernel_makes_the_columns_that_plain_jax_makes(width, rows, chips, columns):
    """Widths that fill their lanes and some that do not; rows that are none on the last devices or whole ones."""
    video, gain = random(5, rows, width, 8 * columns), random(8)

    def run(layout, x, gain):
        return [causal_conv.normed_columns(x[:2], x[2:], gain, layout, columns, kernel, True) for kernel in (0, 1)]

    expected, made = everywhere(run, video, rows, chips, gain)
    assert made.shape == (5, chips * (-(-rows // chips) + 2), width, 8 * (columns + 2))
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-6)


def test_the_kernel_is_not_asked_for_channels_that_xla_lays_along_the_lanes():
    assert column_kernels.fits(96, columns=2)
    assert column_kernels.fits(192, columns=1)
    assert not column_kernels.fits(384, columns=1)  # three times 128
    assert not column_kernels.fits(4, columns=1)  # not a whole register


def test_the_whole_picture_has_no_rows_that_are_none():
    video = random(1, 13, 2, 3)
    out = spread(lambda layout, x: layout.whole(x)[:, : layout.local], video, 13, 8)
    np.testing.assert_array_equal(out[:, :2], video[:, :2])


@pytest.mark.parametrize("axis", [0, 1])
def test_entries_come_by_turns(axis):
    first, second = random(3, 4, 2), random(1, 3, 4, 2)[0]
    out = causal_conv.by_turns([jnp.asarray(first), jnp.asarray(second)], axis)
    np.testing.assert_array_equal(out, np.stack([first, second], axis + 1).reshape(out.shape))
    assert out.shape == ((6, 4, 2), (3, 8, 2))[axis]
