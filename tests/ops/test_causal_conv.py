"""Causal convolutions of spread videos against torch's own, on one device and on eight."""

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops import causal_conv, column_kernels
from comfyui_tpu.ops.causal_conv import Rows

# Rows that divide by the devices, rows that leave the last ones half or wholly empty, and one device.
LAYOUTS = [(16, 8), (13, 8), (9, 4), (6, 1)]


def spread(run, video, rows, chips, *weights):
    """``run(rows, video, *weights)`` on ``chips`` devices; what the filled-up rows give is cut off."""
    out = everywhere(run, video, rows, chips, *weights)
    return out[:, : out.shape[1] // (-(-rows // chips) * chips) * rows]


def everywhere(run, video, rows, chips, *weights):
    """All rows that ``run(rows, video, *weights)`` makes on ``chips`` devices."""
    local = -(-rows // chips)
    layout = Rows(rows, local, (("a", 2), ("b", chips // 2)) if chips > 1 else (("a", 1),))
    mesh = Mesh(np.array(jax.devices()[:chips]).reshape([size for _, size in layout.axes]), layout.names)
    # Not zeros: what lies in rows that are none must not count.
    padded = np.pad(video, ((0, 0), (0, local * chips - rows), (0, 0), (0, 0)), constant_values=7.0)
    by_rows = PartitionSpec(None, layout.names)
    body = jax.shard_map(
        lambda x, *w: run(layout, x, *w),
        mesh=mesh,
        in_specs=(by_rows, *[PartitionSpec()] * len(weights)),
        out_specs=by_rows,
        check_vma=False,
    )
    return jax.tree.map(np.asarray, jax.jit(body)(padded, *weights))


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def as_torch(video):
    """``[T, S, U, C]`` → ``[1, C, T, S, U]``."""
    return torch.from_numpy(video).permute(3, 0, 1, 2)[None]


def from_torch(video):
    return video[0].permute(1, 2, 3, 0).numpy()


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
