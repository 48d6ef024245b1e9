"""Tensor-parallel linear layers on 8 virtual devices against the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.ops import tensor_parallel
from comfyui_tpu.ops.tensor_parallel import linear, split_inputs, split_outputs


@pytest.fixture(params=[1, 2, 3, 8], ids=lambda n: f"{n} devices")
def mesh(request):
    return Mesh(np.array(jax.devices()[: request.param]), ("chips",))


@pytest.fixture(params=["ring", "at once"])
def way(request, monkeypatch):
    monkeypatch.setattr(tensor_parallel, "RING_MIN_TOKENS", 1 if request.param == "ring" else 10**9)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def interleaved(weight, axis, units, devices):
    """Rows or columns in the order in which each device's consecutive part holds its part of every unit."""
    seen = np.asarray(weight).swapaxes(0, axis).reshape(units, devices, -1, weight.shape[1 - axis])
    return jnp.asarray(seen.swapaxes(0, 1).reshape(-1, weight.shape[1 - axis]).swapaxes(0, axis))


@pytest.mark.parametrize("tokens", [48, 37])
def test_split_outputs_are_the_plain_product_cut_into_units(mesh, way, tokens):
    n = mesh.size
    x, fused, other = random(0, 2, tokens, 16), random(1, 3 * 4 * n, 16), random(2, 5 * n, 16)
    weights = [interleaved(fused, 0, 3, n), other]
    found = jax.jit(lambda x, *w: split_outputs(x, w, (3, 1), mesh=mesh))(x, *weights)
    expected = [*jnp.split(linear(x, fused), 3, axis=-1), linear(x, other)]
    for got, want in zip([*found[0], *found[1]], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [48, 37])
def test_split_inputs_are_the_plain_product_of_what_lies_side_by_side(mesh, way, tokens):
    n = mesh.size
    parts = [random(number, 2, tokens, 4 * n) for number in range(3)]
    weight = random(9, 10, 3 * 4 * n)
    found = jax.jit(lambda w, *p: split_inputs(p, w, mesh=mesh))(interleaved(weight, 1, 3, n), *parts)
    np.testing.assert_allclose(found, linear(jnp.concatenate(parts, axis=-1), weight), rtol=1e-4, atol=1e-4)


def test_weights_stay_where_they_are():
    """What travels is tokens: no collective of the compiled program is as large as a weight."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("chips",))
    place = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    x, first, second = (
        place((1, 16, 256), None, "chips"),
        place((4096, 256), "chips"),
        place((256, 4096), None, "chips"),
    )

    def pair(x, first, second):
        return split_inputs(split_outputs(x, [first], [1], mesh=mesh)[0], second, mesh=mesh)

    text = jax.jit(pair).lower(x, first, second).compile().as_text()
    assert "all-gather" in text
    assert not [line for line in text.splitlines() if "all-gather(" in line and "4096" in line.split("all-gather(")[0]]
