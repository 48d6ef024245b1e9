"""Norms keep float32 statistics for bfloat16 activations, as torch does."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comfyui_tpu.ops.norm import group_norm, layer_norm, rms_norm


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal((4, 7, 512)).astype(np.float32) * 3 + 5


def test_layer_norm_agrees_with_torch(values):
    weight, bias = values[0, 0], values[0, 1]
    torch_result = torch.nn.functional.layer_norm(
        torch.from_numpy(values), (512,), torch.from_numpy(weight), torch.from_numpy(bias), 1e-6
    )
    ours = layer_norm(jnp.asarray(values), 1, jnp.asarray(weight), jnp.asarray(bias), 1e-6)
    np.testing.assert_allclose(ours, torch_result, atol=2e-5 * float(torch_result.abs().max()))


def test_layer_norm_over_two_axes(values):
    torch_result = torch.nn.functional.layer_norm(torch.from_numpy(values), (7, 512))
    np.testing.assert_allclose(layer_norm(jnp.asarray(values), 2, None, None, 1e-5), torch_result, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 12, 9, 5), (2, 12, 3, 4, 5), (3, 12)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_agrees_with_torch(shape, affine):
    values = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * 3 + 5
    weight, bias = (np.linspace(*ends, 12, dtype=np.float32) if affine else None for ends in ((0.5, 2), (-1, 1)))
    given = [None if t is None else torch.from_numpy(t) for t in (weight, bias)]
    torch_result = torch.nn.functional.group_norm(torch.from_numpy(values), 4, *given, 1e-6)
    ours = group_norm(jnp.asarray(values), 4, *(None if t is None else jnp.asarray(t) for t in (weight, bias)), 1e-6)
    np.testing.assert_allclose(ours, torch_result, atol=2e-5 * float(torch_result.abs().max()))


def test_rms_norm_agrees_with_torch(values):
    weight = values[0, 0]
    torch_result = torch.nn.functional.rms_norm(torch.from_numpy(values), (512,), torch.from_numpy(weight), 1e-6)
    ours = rms_norm(jnp.asarray(values), 1, jnp.asarray(weight), 1e-6)
    np.testing.assert_allclose(ours, torch_result, atol=2e-5 * float(torch_result.abs().max()))


def test_bfloat16_statistics_are_float32():
    """65,536 equal values: a bfloat16 sum would stop growing at 256 and be far off."""
    x = jnp.full((1, 65536), 3.0, jnp.bfloat16)
    assert rms_norm(x, 1, None, 0.0).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rms_norm(x, 1, None, 0.0), np.float32), 1.0, atol=1e-2)
    y = jnp.tile(jnp.asarray([2.0, 4.0], jnp.bfloat16), 32768).reshape(1, 2, 256, 128)
    normalised = group_norm(y, 1, None, None, 0.0)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.abs(np.asarray(normalised, np.float32)), 1.0, atol=1e-2)


def test_a_large_offset_does_not_cancel_the_variance():
    x = np.random.default_rng(1).standard_normal((1, 4096)).astype(np.float32)
    np.testing.assert_allclose(
        layer_norm(jnp.asarray(x + 3000), 1, None, None, 0.0), layer_norm(jnp.asarray(x), 1, None, None, 0.0), atol=2e-2
    )
