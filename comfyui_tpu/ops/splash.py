"""Exact full (unmasked, bidirectional) attention for TPUs, as one Pallas kernel.

Everything is computed transposed: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, with keys along sublanes and queries along lanes, so that
the softmax's sums are additions of whole registers and its shifts are rows. Logits are base-2 (the scale and log2 e are
folded into the query), because the hardware's exponential is.

**The bounded softmax.** A softmax does not change when a row's logits are shifted by any constant; the usual running
maximum is only one constant that keeps ``exp2`` in range, and the most expensive. Let c = q·k̄ with the mean key k̄, and
r = |q|·max|k − k̄|. Cauchy and Schwarz give c − r ≤ q·k ≤ c + r for every key, and the largest logit of a row is at least
the mean of its logits, which is c. Shift by

    m = c + max(0, r − H),    H = 64.

* No overflow: q·k − m ≤ r − max(0, r − H) ≤ H, so that a weight is at most 2^64 and a sum over 2^20 keys at most 2^84.
  Values as large as 2^43 (8.8e12) keep the accumulator below float32's 2^127.
* No underflow that matters: the largest weight of the row is at least 2^(c − m) = 2^−max(0, r − H) ≥ 2^−64 while r ≤ 2H.
  A weight 2^−24 of it, below which float32 sums ignore it, is still at least 2^−88, a normal number of both float32 and
  bfloat16 (which has float32's exponents; its rounding is relative and does not care about the shift).

So a block of queries is safe when r ≤ 128 for all of them. c is computed in float32; its rounding error only moves m,
and stays below 1 while |c| ≤ 2^14, which is checked as well (the slack above is far larger). Blocks that are not safe,
including any with a NaN, take the exact online softmax with its running maximum. Queries and keys that went through an
RMS norm of weight about 1 at head_dim 128 have r ≤ 16.4.

**Ragged lengths.** A key beyond the end has its logit replaced by the lowest finite number before the exponential,
which gives a weight of exactly 0, and its value replaced by 0. Only the last slices of a block pay for this test.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from comfyui_tpu.ops.splash_blocks import Blocks, fit, largest_waste_slices

LOG2_E = math.log2(math.e)
HEADROOM = 64.0  # H above, in powers of two
LARGEST_CENTRE = 2.0**14
# The lowest logit: finite, so that no row ever computes inf - inf, and far below any real one.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    smooth_keys: bool = False,
    blocks: Blocks | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale · Q·Kᵀ)·V of one device's heads, exact for every length.

    Args:
        query: ``[B, H, Sq, D]``, bfloat16 or float32.
        key: ``[B, H, Sk, D]``, of the query's dtype.
        value: ``[B, H, Sk, D]``, of the query's dtype.
        scale: factor on the logits; ``1/sqrt(D)`` when None.
        smooth_keys: subtract the mean key first: the same result in exact arithmetic, kinder to low precision.
        blocks: tile sizes; those of the table for the device kind being compiled for when None.
        return_lse: also return each row's log-sum-exp, for merging results over parts of the keys.
        interpret: run in Pallas' interpreter (any backend; for tests).

    Returns:
        ``[B, H, Sq, D]`` in the query's dtype; with ``return_lse`` also ``[B, H, Sq]`` float32, the logarithm to
        base 2 of the sum of exponentials to base 2 of the base-2 logits (logit · log2 e).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(query, key, value)
    batch, heads, rows, width = query.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    mean = jnp.mean(key, axis=2, keepdims=True, dtype=jnp.float32)
    if smooth_keys:
        key = (key - mean).astype(key.dtype)
        mean = jnp.mean(key, axis=2, keepdims=True, dtype=jnp.float32)
    # The largest distance of a key from the mean key, per head.
    radius = jnp.sqrt(jnp.max(jnp.sum((key - mean) ** 2, axis=-1), axis=-1))
    padded = _padded_head_dim(width)
    q, k, v = (_flat(x, padded) for x in (query, key, value))
    mean = jnp.pad(mean.reshape(batch * heads, width, 1), ((0, 0), (0, padded - width), (0, 0)))
    blocks = fit(blocks, rows, key.shape[2], padded, query.dtype.itemsize)
    out, lse = _call(
        q, k, v, mean, radius.reshape(-1), blocks=blocks, factor=scale * LOG2_E, interpret=interpret
    )
    out = out.reshape(batch, heads, rows, padded)[..., :width]
    return (out, lse.reshape(batch, heads, rows)) if return_lse else out


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    fits = query.ndim == key.ndim == 4 and key.shape == value.shape
    fits = fits and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    if not fits or 0 in query.shape or 0 in key.shape:
        raise ValueError(
            "splash_attention expects query [B, H, Sq, D] and key and value [B, H, Sk, D], none of them empty; "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    if {query.dtype, key.dtype, value.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        raise ValueError(
            "splash_attention expects query, key and value all bfloat16 or all float32; "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )


def _padded_head_dim(width: int) -> int:
    """64, or the next multiple of 128 lanes: zeros change no logit and are cut off the values."""
    return 64 if width <= 64 else -(-width // 128) * 128


def _flat(x: jax.Array, width: int) -> jax.Array:
    """``[B, H, S, D]`` → ``[B·H, S, width]``."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])))


# Not under jax.jit: the call is traced inside its caller's program, once per shape.
def _call(q, k, v, mean, radius, *, blocks: Blocks, factor: float, interpret: bool):
    heads, rows, width = q.shape
    keys = k.shape[1]
    query_blocks, key_blocks = pl.cdiv(rows, blocks.queries), pl.cdiv(keys, blocks.keys)
    kernel = functools.partial(_kernel, blocks=blocks, rows=rows, keys=keys, factor=factor)
    by_query = pl.BlockSpec((None, blocks.queries, width), lambda h, i, j: (h, i, 0))
    by_key = pl.BlockSpec((None, blocks.keys, width), lambda h, i, j: (h, j, 0))
    out, lse = pl.pallas_call(
        kernel,
        grid=(heads, query_blocks, key_blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, width, 1), lambda h, i, j: (h, 0, 0)),
            by_query,
            by_key,
            by_key,
        ],
        out_specs=[by_query, pl.BlockSpec((None, 1, blocks.queries), lambda h, i, j: (h, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((heads, 1, rows), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((width, blocks.queries), q.dtype),
            pltpu.VMEM((width, blocks.queries), jnp.float32),
            pltpu.VMEM((8, blocks.queries), jnp.float32),
            pltpu.VMEM((1, blocks.queries), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * heads * rows * keys * width,
            transcendentals=heads * rows * keys,
            bytes_accessed=(2 * q.size + query_blocks * (k.size + v.size)) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="splash_attention",
    )(radius, mean, q, k, v)
    return out, lse


def _kernel(
    radius_ref, mean_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, qt, acc, total, shift, safe, *, blocks, rows, keys, factor
):
    """One tile: ``blocks.queries`` queries of a head against ``blocks.keys`` keys.

    Scratch: ``qt`` ``[D, queries]`` the scaled queries; ``acc`` ``[D, queries]`` and ``total`` ``[8, queries]`` the sums
    of weighted values and of weights (eight partial sums, one a sublane); ``shift`` ``[1, queries]``; ``safe`` whether
    the bounded softmax may be used.
    """
    head, block, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    last = pl.num_programs(2) - 1
    kept_rows, kept_keys = rows - block * blocks.queries, keys - step * blocks.keys
    mask_from = blocks.slices - largest_waste_slices(keys, blocks)

    @pl.when(step == 0)
    def _start():
        scaled = q_ref[...].astype(jnp.float32).T * factor
        qt[...] = scaled.astype(qt.dtype)
        reach = jnp.sqrt(jnp.sum(scaled * scaled, axis=0, keepdims=True)) * radius_ref[head]
        centre = jnp.sum(scaled * mean_ref[...], axis=0, keepdims=True)
        # Queries beyond the end are whatever the memory holds.
        real = jax.lax.broadcasted_iota(jnp.int32, reach.shape, 1) < kept_rows
        fine = (reach <= 2 * HEADROOM) & (jnp.abs(centre) <= LARGEST_CENTRE)
        bounded = jnp.min(jnp.where(real & ~fine, 0, 1)) == 1
        safe[0] = bounded.astype(jnp.int32)
        shift[...] = jnp.where(bounded, centre + jnp.maximum(reach - HEADROOM, 0), LOWEST)
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)

    part = functools.partial(_Part, qt, k_ref, v_ref, kept_keys, blocks)

    @pl.when(safe[0] == 1)
    def _bounded():
        _bounded_softmax(part, acc, total, shift, blocks, mask_from)

    @pl.when(safe[0] == 0)
    def _online():
        _online_softmax(part, acc, total, shift, blocks, masked=largest_waste_slices(keys, blocks) > 0)

    @pl.when(step == last)
    def _finish():
        weight = jnp.sum(total[...], axis=0, keepdims=True)
        out_ref[...] = (acc[...] / weight).T.astype(out_ref.dtype)
        lse_ref[...] = shift[...] + jnp.log2(weight)


class _Part:
    """The part of a tile that ``size`` keys from ``key`` and ``width`` queries from ``column`` make."""

    def __init__(self, qt, k_ref, v_ref, kept_keys, blocks, column, key, masked, width=None, size=None):
        self.columns = pl.ds(column, width or blocks.columns)
        self.rows = pl.ds(key, size or blocks.slice)
        self.qt, self.k_ref, self.v_ref = qt, k_ref, v_ref
        self.kept = kept_keys - key if masked else None
        self.precision = jax.lax.Precision.HIGHEST if qt.dtype == jnp.float32 else None

    def logits(self):
        """``[keys, queries]`` float32, base 2."""
        logits = self._dot(self.k_ref[self.rows, :], self.qt[:, self.columns], 1)
        if self.kept is None:
            return logits
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) < self.kept, logits, LOWEST)

    def values(self, weights):
        """``[D, queries]``: the weighted sum of the values."""
        v = self.v_ref[self.rows, :]
        if self.kept is not None:
            # A weight of 0 does not silence a NaN that happens to lie behind the end.
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < self.kept, v, jnp.zeros_like(v))
        return self._dot(v, weights.astype(v.dtype), 0)

    def _dot(self, a, b, axis):
        dimensions = (((axis,), (0,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


def _sum_to_sublanes(weights):
    """``[keys, queries]`` → ``[8, queries]``: additions of whole registers only."""
    return jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)


def _bounded_softmax(part, acc, total, shift, blocks, mask_from):
    """The tile in straight-line code, its parts skewed into a pipeline.

    While the exponentials of one part are taken, the matrix unit is given the logits of a part ``blocks.ahead`` further
    and the values of a part ``blocks.behind`` earlier: loading weighted parts into the unit then hides behind streaming
    keys through it.
    """
    parts = [
        part(column, index * blocks.slice, index >= mask_from)
        for index in range(blocks.slices)
        for column in range(0, blocks.queries, blocks.columns)
    ]
    logits, weights = {}, {}
    for now in range(-blocks.ahead, len(parts) + blocks.behind):
        if 0 <= now + blocks.ahead < len(parts):
            logits[now + blocks.ahead] = parts[now + blocks.ahead].logits()
        if 0 <= now < len(parts):
            columns = parts[now].columns
            weight = jnp.exp2(logits.pop(now) - shift[:, columns])
            total[:, columns] += _sum_to_sublanes(weight)
            weights[now] = weight.astype(acc.dtype if parts[now].precision else jnp.bfloat16)
        if now - blocks.behind >= 0:
            done = parts[now - blocks.behind]
            acc[:, done.columns] += done.values(weights.pop(now - blocks.behind))


def _online_softmax(part, acc, total, shift, blocks, masked):
    """The exact fall-back for logits of any size: a running maximum, slice by slice. ``shift`` holds the maximum."""

    def step(index, _):
        now = part(0, pl.multiple_of(index * blocks.slice, blocks.slice), masked, width=blocks.queries)
        logits = now.logits()
        maximum = jnp.maximum(shift[...], jnp.max(logits, axis=0, keepdims=True))
        weight = jnp.exp2(logits - maximum)
        fade = jnp.exp2(shift[...] - maximum)
        shift[...] = maximum
        total[...] = total[...] * fade + _sum_to_sublanes(weight)
        acc[...] = acc[...] * fade + now.values(weight)

    jax.lax.fori_loop(0, blocks.slices, step, None)
