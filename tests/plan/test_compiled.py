"""The real TPU compiler on programs whose cost is known; needs libtpu, no TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.plan import costs, flops, hlo
from comfyui_tpu.plan.hardware import describe_devices, parse

V6E = parse("v6e:2x4")
SIZE = 2048


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(describe_devices(V6E)), "chips")


def placed(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh(), spec)


def traced(function, *shapes, specs=None):
    """``function`` traced for bfloat16 inputs of ``shapes`` on eight described chips."""
    specs = specs or [PartitionSpec()] * len(shapes)
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed(spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(function, out_shardings=placed(PartitionSpec())).trace(*inputs)


def cost_of(program) -> costs.Cost:
    return costs.read(hlo.parse(program.lower().compile().as_text()), V6E)


def test_a_matmul_takes_at_least_its_flop_at_the_peak_and_not_twice_as_long():
    program = traced(lambda a, b: a @ b, (SIZE, SIZE), (SIZE, SIZE))
    at_peak = flops.count(program.jaxpr) / V6E.generation.flops_per_cycle
    matmul = cost_of(program).by_category()["matmul"]
    assert at_peak == 2 * SIZE**3 / 524_288
    assert at_peak < matmul < 2 * at_peak


@pytest.mark.parametrize("steps", [3, 12])
def test_a_scan_takes_as_long_as_its_steps(steps):
    def scanned(x, weights):
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, weights)[0]

    cost = cost_of(traced(scanned, (SIZE, SIZE), (steps, SIZE, SIZE)))
    assert cost.unknown_loops == 0
    at_peak = steps * 2 * SIZE**3 / V6E.generation.flops_per_cycle
    assert at_peak < cost.by_category()["matmul"] < 2 * at_peak


def test_gathering_weights_moves_their_bytes_over_the_links():
    def gather(x, w):
        return x @ jax.lax.with_sharding_constraint(w, placed(PartitionSpec()))

    cost = cost_of(traced(gather, (SIZE, SIZE), (SIZE, SIZE), specs=[PartitionSpec(), PartitionSpec("chips")]))
    assert cost.collective_bytes == SIZE * SIZE * 2
    assert cost.by_category()["collectives"] > 0


def test_an_attention_of_ours_is_told_from_other_matmuls():
    from comfyui_tpu.ops.attention import _attend

    def attend(q, k, v):
        return _attend(q, k, v, None, 0.1)

    found = cost_of(traced(attend, *[(1, 2, 1024, 128)] * 3)).by_category()
    assert found["attention"] > 0
    assert found["matmul"] == 0
