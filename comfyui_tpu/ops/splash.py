"""Exact full (unmasked, bidirectional) attention for TPUs, as one Pallas kernel.

What is computed is in :mod:`comfyui_tpu.ops.splash_softmax`; here is what is read and written, and when.

**Token-major.** The kernel reads ``[S, H·D]`` as a projection writes it, and writes the same: a head is 128 lanes, or
two heads of 64 share them. Those two go through a program together, as twice as many columns: each column of Qᵀ is
128 deep and zero where the other head's channels are, so that both meet the same keys, unsliced.

**Schedule.** A grid step is a block of queries of 128 lanes; its loop takes the keys tile by tile and copies the
tiles from HBM itself while the one before is at work. Keys that fit in one tile are left to Pallas' own pipeline.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from comfyui_tpu.ops.attention import check_real_keys
from comfyui_tpu.ops.padding import pad, pad_to_multiple
from comfyui_tpu.ops.splash_blocks import Blocks, fit, generation_of, heads_together, padded_head_dim
from comfyui_tpu.ops.splash_softmax import PACKED_ROWS, Geometry, RunningSoftmax

LOG2_E = math.log2(math.e)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    keys: int | None = None,
    scale: float | None = None,
    smooth_keys: bool = False,
    blocks: Blocks | None = None,
    device_kind: str | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale · Q·Kᵀ)·V of one device's heads, exact for every length.

    Args:
        query: ``[B, Sq, H, D]``, bfloat16 or float32.
        key: ``[B, Sk, H, D]``, of the query's dtype.
        value: ``[B, Sk, H, D]``, of the query's dtype.
        keys: how many keys are real; those behind them are padding, which may hold any finite numbers. All when None.
        scale: factor on the logits; ``1/sqrt(D)`` when None.
        smooth_keys: subtract the mean key first: the same result in exact arithmetic, kinder to low precision.
        blocks: tile sizes; the table's for ``device_kind`` when None.
        device_kind: JAX's name of the device being compiled for (programs may be lowered for devices that are only
            described); this machine's when None.
        return_lse: also return each row's log-sum-exp, for merging results over parts of the keys.
        interpret: run in Pallas' interpreter (any backend; for tests).

    Returns:
        ``[B, Sq, H, D]`` in the query's dtype; with ``return_lse`` also ``[B, H, Sq]`` float32, the logarithm to
        base 2 of the sum of exponentials to base 2 of the base-2 logits (logit · log2 e).

    Raises:
        ValueError: shapes or dtypes that do not fit together.

    Nothing is copied around the kernel where D is 64 (and H even) or a multiple of 128, and ``keys`` fits in one tile
    or is a multiple of 16.
    """
    _check(query, key, value, keys)
    batch, rows, heads, width = query.shape
    keys = key.shape[1] if keys is None else keys
    scale = 1 / math.sqrt(width) if scale is None else scale
    padded = padded_head_dim(width)
    together = heads_together(padded)
    q, k, v = (_flat(x, padded, together) for x in (query, key, value))
    mean = _mean(k, keys)
    if smooth_keys:
        k = (k - mean[:, :1]).astype(k.dtype)
        mean = _mean(k, keys)
    if blocks is None:
        generation = generation_of(device_kind or jax.devices()[0].device_kind)
        blocks = fit(generation, rows, keys, padded, query.dtype.itemsize)
    geometry = Geometry(blocks, rows, keys, together, padded * together)
    radius = _radius(k, mean, padded, keys)
    k, v = (pad(x, 1, max(0, geometry.rows_needed - x.shape[1])) for x in (k, v))
    out, lse = _call(q, k, v, mean, radius, geometry=geometry, factor=scale * LOG2_E, interpret=interpret)
    out = out.reshape(batch, rows, -1, padded)[:, :, :heads, :width]
    return (out, lse.reshape(batch, -1, rows)[:, :heads]) if return_lse else out


def _check(query: jax.Array, key: jax.Array, value: jax.Array, keys: int | None) -> None:
    fits = query.ndim == key.ndim == 4 and key.shape == value.shape
    fits = fits and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])
    if not fits or 0 in query.shape or 0 in key.shape:
        raise ValueError(
            "splash_attention expects query [B, Sq, H, D] and key and value [B, Sk, H, D], none of them empty; "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    check_real_keys(keys, key.shape[1])
    if {query.dtype, key.dtype, value.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        raise ValueError(
            "splash_attention expects query, key and value all bfloat16 or all float32; "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def _flat(x: jax.Array, width: int, together: int) -> jax.Array:
    """``[B, S, H, D]`` → ``[B, S, H·width]``: channels filled up to ``width``, heads to a multiple of ``together``."""
    x = pad_to_multiple(pad(x, 3, width - x.shape[3]), 2, together)
    return x.reshape(*x.shape[:2], -1)


# Both sums below are taken in the matrix unit: the vector unit would need several times as long, and the second one an
# array turned on its side. Padding is weighed with zero or left out of the result, because cutting it off would copy.
def _mean(k: jax.Array, keys: int) -> jax.Array:
    """The mean of the first ``keys`` keys, float32 ``[B, 8, C]`` of ``[B, S, C]``: eight times the same row."""
    # XLA would turn a single row into a vector sum, and the kernel takes whole registers.
    weights = jnp.broadcast_to(jnp.arange(k.shape[1]) < keys, (8, k.shape[1])).astype(k.dtype)
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    return jnp.einsum("os,bsc->boc", weights, k, precision=precision, preferred_element_type=jnp.float32) / keys


def _radius(k: jax.Array, mean: jax.Array, width: int, keys: int) -> jax.Array:
    """The largest distance of the first ``keys`` keys from the mean key: ``[B·H]``, of ``[B, S, H·width]``.

    That the squares are rounded to bfloat16 moves it by less than 0.4 %.
    """
    squares = jnp.square(k - mean[:, :1]).astype(jnp.bfloat16)
    heads = np.repeat(np.eye(k.shape[2] // width), width, axis=1).astype(jnp.bfloat16)
    sums = jnp.einsum("hc,bsc->bhs", heads, squares, preferred_element_type=jnp.float32)
    sums = jnp.where(jnp.arange(k.shape[1]) < keys, sums, 0)
    return jnp.sqrt(jnp.max(sums, axis=2)).reshape(-1)


# Not under jax.jit: the call is traced inside its caller's program, once per shape.
def _call(q, k, v, mean, radius, *, geometry: Geometry, factor: float, interpret: bool):
    batch, rows, width = q.shape
    blocks, together, lanes, keys = geometry.blocks, geometry.together, geometry.lanes, geometry.keys
    groups, columns = width // lanes, together * blocks.queries
    # Not // and %: Pallas lowers those, for numbers of any sign, by asking the machine for a TPU.
    where = lambda group, row: (jax.lax.div(group, groups), row, jax.lax.rem(group, groups))  # noqa: E731
    by_query = pl.BlockSpec((None, blocks.queries, lanes), where)
    if geometry.tiles == 1:
        by_group = pl.BlockSpec((None, blocks.keys, lanes), lambda g, _: where(g, 0))
        buffers = {}
    else:
        by_group = pl.BlockSpec(memory_space=pltpu.HBM)
        buffers = {
            "k": pltpu.VMEM((2, blocks.keys, lanes), k.dtype),
            "v": pltpu.VMEM((2, blocks.keys, lanes), v.dtype),
            "copied": pltpu.SemaphoreType.DMA((2, 2)),
        }
    return pl.pallas_call(
        functools.partial(_kernel, geometry=geometry, groups=groups, factor=factor),
        grid=(batch * groups, geometry.query_blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, 8, lanes), lambda g, _: where(g, 0)),
            by_query,
            by_group,
            by_group,
        ],
        out_specs=[by_query, pl.BlockSpec((None, together, blocks.queries), lambda g, i: (g, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch * groups, together, rows), jnp.float32),
        ],
        scratch_shapes={
            **buffers,
            "scaled": pltpu.VMEM((lanes, columns) if geometry.turned else (columns, lanes), q.dtype),
            "acc": pltpu.VMEM((lanes // together, columns), jnp.float32),
            "total": pltpu.VMEM((8, columns), jnp.float32),
            "shift": pltpu.VMEM((1, columns), jnp.float32),
            "safe": pltpu.SMEM((1,), jnp.int32),
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib and blocks.vmem_mib * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * rows * keys * width,
            transcendentals=batch * groups * together * rows * keys,
            bytes_accessed=(2 * q.size + geometry.query_blocks * 2 * batch * keys * width) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="splash_attention",
    )(radius, mean, q, k, v)


def _kernel(radius, mean, q, k_of_group, v_of_group, out, lse, *, geometry, groups, factor, **scratch):
    """All keys for ``blocks.queries`` queries of the heads that share lanes; columns are queries, head after head.

    Scratch: ``k``, ``v`` the tile at work and the next (a single tile comes in place of the group's); the
    others are those of :class:`~comfyui_tpu.ops.splash_softmax.RunningSoftmax`.
    """
    group, block = pl.program_id(0), pl.program_id(1)
    k, v = scratch.pop("k", None), scratch.pop("v", None)
    copied = scratch.pop("copied", None)
    softmax = RunningSoftmax(geometry=geometry, **scratch)
    size, tiles, lanes = geometry.blocks.keys, geometry.tiles, geometry.lanes

    def copies(tile):
        slot = jax.lax.rem(tile, 2)
        start = pl.multiple_of(jnp.minimum(tile * size, geometry.last_start), PACKED_ROWS)
        part = (pl.ds(start, size), pl.ds(pl.multiple_of(jax.lax.rem(group, groups) * lanes, lanes), lanes))
        return [
            pltpu.make_async_copy(source.at[jax.lax.div(group, groups), *part], buffer.at[slot], copied.at[kind, slot])
            for kind, (source, buffer) in enumerate(((k_of_group, k), (v_of_group, v)))
        ]

    def fetch(tile):
        for copy in copies(jnp.int32(tile)):
            copy.start()

    if tiles > 1:
        # Each block of queries finds its first tile on the way: the block before has asked for it.
        pl.when(block == 0)(lambda: fetch(0))
    radii = [radius[group * geometry.together + head] for head in range(geometry.together)]
    softmax.start(q, mean[...], radii, factor, geometry.rows - block * geometry.blocks.queries)
    if tiles == 1:
        softmax.add(k_of_group, v_of_group, 0)
    else:

        def step(tile, _):
            for copy in copies(tile):
                copy.wait()
            pl.when(tile + 1 < tiles)(lambda: fetch(tile + 1))
            slot = jax.lax.rem(tile, 2)
            softmax.add(k.at[slot], v.at[slot], tile)

        jax.lax.fori_loop(0, tiles, step, None)
        pl.when(block + 1 < pl.num_programs(1))(lambda: fetch(0))
    softmax.finish(out, lse)
