"""``python -m comfyui_tpu.bench.compile_one``: compile the job on standard input, say how it went on standard output.

A process of its own, because the compiler reads where to write its schedules once, when it is loaded.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from comfyui_tpu.bench.kernels import JAX_SPLASH, OURS, TOKAMAX_SPLASH, Job
from comfyui_tpu.ops.splash import splash_attention
from comfyui_tpu.plan import costs, hlo
from comfyui_tpu.plan.hardware import describe_devices, parse


def main() -> None:
    job = Job.from_json(json.load(sys.stdin))
    topology = parse(job.topology)
    device = describe_devices(topology)[0]
    shape, place = job.compiled_shape, SingleDeviceSharding(device)
    query, key = (
        jax.ShapeDtypeStruct(_operand(job.kernel, shape.heads, length, shape.head_dim), jnp.bfloat16, sharding=place)
        for length in (shape.queries, shape.keys)
    )
    call = {OURS: _ours, JAX_SPLASH: _jax_splash, TOKAMAX_SPLASH: _tokamax_splash}[job.kernel](job)
    # Some kernels ask, while they are lowered, what device they are for.
    mesh = Mesh([device], ("device",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(call).trace(query, key, key).lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(json.dumps({"does_not_fit": _why(str(error))}))
    else:
        seconds = time.perf_counter() - start
        around = costs.read(hlo.parse(compiled.as_text()), topology, kernel_cycles=lambda _: 0.0).cycles
        print(json.dumps({"compile_seconds": seconds, "cycles_around": around}))


def _operand(kernel: str, heads: int, length: int, head_dim: int) -> tuple[int, ...]:
    """As each kernel wants it: ours as a projection writes it, head after head in one row."""
    return (length, heads * head_dim) if kernel == OURS else (heads, length, head_dim)


def _why(message: str) -> str:
    """How much vector memory is missing, or the first line."""
    found = re.search(r"Scoped allocation with size \S+ and limit \S+|Used \S+ of \S+ vmem", message)
    return found.group() if found else message.strip().splitlines()[0]


def _ours(job: Job) -> Callable[..., jax.Array]:
    def call(*operands: jax.Array) -> jax.Array:
        query, key, value = (x.reshape(1, len(x), job.shape.heads, job.shape.head_dim) for x in operands)
        return splash_attention(query, key, value, blocks=job.blocks).reshape(operands[0].shape)

    return call


def _jax_splash(job: Job) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, blocks = job.compiled_shape, job.blocks
    mask = masks.MultiHeadMask([masks.FullMask((shape.queries, shape.keys)) for _ in range(shape.heads)])
    sizes = splash.BlockSizes(block_q=blocks.queries, block_kv=blocks.keys, block_kv_compute=blocks.compute)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def _tokamax_splash(job: Job) -> Callable[..., jax.Array]:
    """With base-2 exponentials. Its softmax with a constant for the maximum is not exact, and so not a peer."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    shape, blocks = job.compiled_shape, job.blocks
    config = splash.SplashConfig(
        block_q=blocks.queries, block_kv=blocks.keys, block_kv_compute=blocks.compute, use_base2_exp=True
    )
    return splash.make_splash_mha_single_device(masks.FullMask((shape.queries, shape.keys)), config=config)


if __name__ == "__main__":
    main()
