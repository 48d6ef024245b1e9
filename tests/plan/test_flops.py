"""Flop counts of programs whose flop are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.plan import flops


def count(function, *shapes) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


def test_a_matmul_counts_two_for_each_multiply_add():
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7


def test_a_batched_product_counts_every_batch():
    assert count(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), (2, 3, 5, 7), (2, 3, 11, 7)) == 4620


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_its_kernel_at_every_output(groups):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups)

    assert count(convolve, (1, 4, 8, 8), (6, 4 // groups, 3, 3)) == 2 * (6 * 8 * 8) * (4 // groups) * 9


def test_a_scan_counts_every_step():
    def scanned(x, weights):
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, weights)[0]

    assert count(scanned, (3, 5), (40, 5, 5)) == 40 * 2 * 3 * 5 * 5


def test_nested_functions_and_branches_count():
    def function(x, w):
        product = jax.jit(lambda a, b: a @ b)(x, w)
        return jax.lax.cond(product.sum() > 0, lambda p: p, lambda p: p @ w @ w, product)

    assert count(function, (3, 5), (5, 5)) == 3 * 2 * 3 * 5 * 5


def test_a_sharded_function_counts_all_devices():
    mesh = Mesh(np.array(jax.devices()), "x")
    function = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(PartitionSpec("x"), PartitionSpec()), out_specs=PartitionSpec("x")
    )
    assert count(function, (8 * mesh.size, 5), (5, 7)) == 2 * 8 * mesh.size * 5 * 7


def test_elementwise_arithmetic_counts_nothing():
    assert count(lambda a: jax.nn.softmax(a * 2), (3, 5)) == 0
