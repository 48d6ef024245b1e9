"""The attention kernel compiles for every TPU generation, at the models' lengths, in the VMEM its tile asks for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from comfyui_tpu.ops.splash import splash_attention
from comfyui_tpu.ops.splash_blocks import fit
from comfyui_tpu.plan.hardware import describe_devices, parse

# As many heads as share lanes: the tile, hence the code, depends on the lengths and head_dim alone.
WAN_720P, COGVIDEOX_720P, FLUX_1024 = (75600, 75600, 128), (39826, 39826, 64), (4608, 4608, 128)
CROSS_ATTENTION = (9450, 512, 128)
CASES = [(topology, shape) for topology in ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1") for shape in (WAN_720P, COGVIDEOX_720P)]
CASES += [("v6e:2x4", shape) for shape in (WAN_720P, COGVIDEOX_720P, FLUX_1024, CROSS_ATTENTION)]
CASES += [("tpu7x:2x2x1", shape) for shape in (WAN_720P, FLUX_1024)]


def compiled(topology, shape, blocks=None):
    device = describe_devices(parse(topology))[0]
    queries, keys, width = shape
    place = SingleDeviceSharding(device)
    heads = 128 // width
    q, kv = (
        jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16, sharding=place) for length in (queries, keys)
    )
    function = jax.jit(lambda q, k, v: splash_attention(q, k, v, blocks=blocks, device_kind=device.device_kind))
    return function.trace(q, kv, kv).lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.parametrize(("topology", "shape"), CASES, ids=str)
def test_the_kernel_compiles(topology, shape):
    assert "splash_attention" in compiled(topology, shape)


def test_the_longest_sequence_needs_no_more_than_the_default_limit():
    """Where the table asks for more, because that is faster, the tile for v7x does without."""
    blocks = fit("v7x", *WAN_720P)
    assert (fit("v6e", *WAN_720P).vmem_mib, blocks.vmem_mib) == (56, None)
    assert "splash_attention" in compiled("v6e:2x4", WAN_720P, blocks)
