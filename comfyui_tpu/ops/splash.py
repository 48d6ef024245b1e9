"""Exact full (unmasked, bidirectional) attention for TPUs, as one Pallas kernel.

Everything is computed transposed: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, with keys along sublanes and queries along lanes, so
that the softmax's sums are additions of whole registers and its shifts are rows. Logits are base-2 (the scale and
log2 e are folded into the query), because the hardware's exponential is.

**The bounded softmax.** A softmax does not change when a row's logits are shifted by any constant; the usual running
maximum is only one constant that keeps ``exp2`` in range, and the most expensive. Let c = q·k̄ with the mean key k̄,
and r = |q|·max|k − k̄|. Cauchy and Schwarz give c − r ≤ q·k ≤ c + r for every key, and the largest logit of a row is
at least the mean of its logits, which is c. Shift by

    m = c + max(0, r − H),    H = 64.

* No overflow: q·k − m ≤ r − max(0, r − H) ≤ H, so that a weight is at most 2^64 and a sum over 2^20 keys at most
  2^84. Values as large as 2^43 (8.8e12) keep the accumulator below float32's 2^127.
* No underflow that matters: the largest weight of the row is at least 2^(c − m) = 2^−max(0, r − H) ≥ 2^−64 while r ≤
  2H. A weight 2^−24 of it, below which float32 sums ignore it, is still at least 2^−88, a normal number of both
  float32 and bfloat16 (which has float32's exponents; its rounding is relative and does not care about the shift).

So a block of queries is safe when r ≤ 128 for all of them. c is computed in float32 from the queries as rounded for
the matrix unit; its rounding error only moves m, and stays below 1 while Σ|qᵢ·k̄ᵢ| ≤ 2^14, which is checked as well
(the slack above is far larger). Blocks that are not safe, including any with a NaN, take the exact online softmax
with its running maximum. Queries and keys that went through an RMS norm of weight about 1 at head_dim 128 have
r ≤ 16.4.

**Ragged lengths.** A key beyond the end has its logit replaced by the lowest finite number before the exponential,
which gives a weight of exactly 0. Which rows of a tile can lie beyond the end is known when the kernel is built; only
they pay for this test. Queries beyond the end are computed and never written.

**Schedule.** A grid step is a block of queries of one head; its loop takes the keys tile by tile and copies the
tiles from HBM itself while the one before is at work. Keys that fit in one tile are left to Pallas' own pipeline.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from comfyui_tpu.ops.attention import smoothed
from comfyui_tpu.ops.splash_blocks import Blocks, fit, generation_of, padded_head_dim

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
    device_kind: str | None = None,
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
        blocks: tile sizes; the table's for ``device_kind`` when None.
        device_kind: JAX's name of the device being compiled for (programs may be lowered for devices that are only
            described); this machine's when None.
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
    key = smoothed(key) if smooth_keys else key
    mean = jnp.mean(key, axis=2, keepdims=True, dtype=jnp.float32)
    # The largest distance of a key from the mean key, per head.
    radius = jnp.sqrt(jnp.max(jnp.sum((key - mean) ** 2, axis=-1), axis=-1))
    padded = padded_head_dim(width)
    mean = jnp.pad(mean.reshape(batch * heads, width, 1), ((0, 0), (0, padded - width), (0, 0)))
    keys = key.shape[2]
    if blocks is None:
        generation = generation_of(device_kind or jax.devices()[0].device_kind)
        blocks = fit(generation, rows, keys, padded, query.dtype.itemsize)
    q = _flat(query, rows, padded)
    # Whole tiles; zeros, so that no weight of 0 meets a NaN.
    k, v = (_flat(x, pl.cdiv(keys, blocks.keys) * blocks.keys, padded) for x in (key, value))
    factor = scale * LOG2_E
    out, lse = _call(q, k, v, mean, radius.reshape(-1), keys=keys, blocks=blocks, factor=factor, interpret=interpret)
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


def _flat(x: jax.Array, rows: int, width: int) -> jax.Array:
    """``[B, H, S, D]`` → ``[B·H, rows, width]``, zeros where ``x`` ends."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, width - x.shape[2])))


# Not under jax.jit: the call is traced inside its caller's program, once per shape.
def _call(q, k, v, mean, radius, *, keys: int, blocks: Blocks, factor: float, interpret: bool):
    heads, rows, width = q.shape
    tiles, query_blocks = k.shape[1] // blocks.keys, pl.cdiv(rows, blocks.queries)
    by_query = pl.BlockSpec((None, blocks.queries, width), lambda h, i: (h, i, 0))
    if tiles == 1:
        by_head, buffers = pl.BlockSpec((None, blocks.keys, width), lambda h, i: (h, 0, 0)), {}
    else:
        by_head = pl.BlockSpec(memory_space=pltpu.HBM)
        buffers = {
            "k": pltpu.VMEM((2, blocks.keys, width), k.dtype),
            "v": pltpu.VMEM((2, blocks.keys, width), v.dtype),
            "copied": pltpu.SemaphoreType.DMA((2, 2)),
        }
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, rows=rows, keys=keys, tiles=tiles, factor=factor),
        grid=(heads, query_blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, width, 1), lambda h, i: (h, 0, 0)),
            by_query,
            by_head,
            by_head,
        ],
        out_specs=[by_query, pl.BlockSpec((None, 1, blocks.queries), lambda h, i: (h, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((heads, 1, rows), jnp.float32),
        ],
        scratch_shapes={
            **buffers,
            "qt": pltpu.VMEM((width, blocks.queries), q.dtype),
            "acc": pltpu.VMEM((width, blocks.queries), jnp.float32),
            "total": pltpu.VMEM((8, blocks.queries), jnp.float32),
            "shift": pltpu.VMEM((1, blocks.queries), jnp.float32),
            "safe": pltpu.SMEM((1,), jnp.int32),
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib and blocks.vmem_mib * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * heads * rows * keys * width,
            transcendentals=heads * rows * keys,
            bytes_accessed=(2 * q.size + query_blocks * (k.size + v.size)) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="splash_attention",
    )(radius, mean, q, k, v)


def _kernel(radius, mean, q, k_of_head, v_of_head, out, lse, *, blocks, rows, keys, tiles, factor, **scratch):
    """All keys for ``blocks.queries`` queries of a head.

    Scratch: ``k``, ``v`` the tile at work and the next (a single tile comes in place of the head's); ``qt``
    ``[D, queries]`` the scaled queries; ``acc`` ``[D, queries]`` and ``total`` ``[8, queries]`` the sums of weighted
    values and of weights (eight partial sums, one a sublane); ``shift`` ``[1, queries]``; ``safe`` whether the bounded
    softmax may be used.
    """
    head, block = pl.program_id(0), pl.program_id(1)
    k, v = scratch.pop("k", None), scratch.pop("v", None)
    copied = scratch.pop("copied", None)
    work = _Work(blocks=blocks, keys=keys, **scratch)

    def copies(tile):
        slot, part = jax.lax.rem(tile, 2), pl.ds(tile * blocks.keys, blocks.keys)
        return [
            pltpu.make_async_copy(source.at[head, part], buffer.at[slot], copied.at[kind, slot])
            for kind, (source, buffer) in enumerate(((k_of_head, k), (v_of_head, v)))
        ]

    def fetch(tile):
        for copy in copies(jnp.int32(tile)):
            copy.start()

    if tiles > 1:
        # Each block of queries finds its first tile on the way: the block before has asked for it.
        pl.when(block == 0)(lambda: fetch(0))
    work.start(q, mean[...], radius[head], factor, rows - block * blocks.queries)
    if tiles == 1:
        work.add(k_of_head, v_of_head, 0)
    else:

        def step(tile, _):
            for copy in copies(tile):
                copy.wait()
            pl.when(tile + 1 < tiles)(lambda: fetch(tile + 1))
            slot = jax.lax.rem(tile, 2)
            work.add(k.at[slot], v.at[slot], tile)

        jax.lax.fori_loop(0, tiles, step, None)
        pl.when(block + 1 < pl.num_programs(1))(lambda: fetch(0))
    work.finish(out, lse)


class _Work:
    """The running sums of a block of queries, and what a tile of keys adds to them."""

    def __init__(self, *, qt, acc, total, shift, safe, blocks, keys):
        self.qt, self.acc, self.total, self.shift = qt, acc, total, shift
        self.safe, self.blocks, self.keys = safe, blocks, keys
        # The rows of a tile that are keys in every tile, also in the last one.
        self.always = blocks.keys - -keys % blocks.keys
        self.precision = jax.lax.Precision.HIGHEST if qt.dtype == jnp.float32 else None
        self.parts = [
            (row, column)
            for row in range(0, blocks.keys, blocks.slice)
            for column in range(0, blocks.queries, blocks.columns)
        ]

    def start(self, q, mean, radius, factor, kept_rows):
        """Scale and turn the queries; choose each one's shift, and whether the block is safe."""

        def turn(columns, safe):
            # As the matrix unit will see them: with a large mean key, rounding alone can move a row far.
            scaled = (q[columns].astype(jnp.float32).T * factor).astype(self.qt.dtype)
            self.qt[:, columns] = scaled
            scaled = scaled.astype(jnp.float32)
            reach = jnp.sqrt(jnp.sum(scaled * scaled, axis=0, keepdims=True)) * radius
            terms = scaled * mean
            centre = jnp.sum(terms, axis=0, keepdims=True)
            # Queries beyond the end are whatever the memory holds.
            real = jax.lax.broadcasted_iota(jnp.int32, reach.shape, 1) < kept_rows - columns.start
            fine = (reach <= 2 * HEADROOM) & (jnp.sum(jnp.abs(terms), axis=0, keepdims=True) <= LARGEST_CENTRE)
            self.acc[:, columns] = jnp.zeros(scaled.shape, jnp.float32)
            self.shift[:, columns] = centre + jnp.maximum(reach - HEADROOM, 0)
            return jnp.minimum(safe, jnp.min(jnp.where(real & ~fine, 0, 1)))

        safe = self._by_columns(turn, jnp.int32(1))
        self.safe[0] = safe
        # A running maximum starts from the bottom.
        self.shift[...] = jnp.where(safe == 1, self.shift[...], LOWEST)
        self.total[...] = jnp.zeros_like(self.total)

    def _by_columns(self, step, carry):
        """A loop over the queries, some registers' worth at a time: little code, little memory for what is spilled."""
        size = math.gcd(self.blocks.queries, 512)
        at = lambda number: pl.ds(pl.multiple_of(number * size, size), size)  # noqa: E731
        return jax.lax.fori_loop(0, self.blocks.queries // size, lambda n, carry: step(at(n), carry), carry)

    def add(self, k, v, tile):
        """Add a tile, ``k`` and ``v`` ``[keys, D]``, number ``tile`` of its head, to the sums."""
        kept = self.keys - tile * self.blocks.keys
        pl.when(self.safe[0] == 1)(lambda: self._bounded(k, v, kept))
        pl.when(self.safe[0] == 0)(lambda: self._online(k, v, kept))

    def finish(self, out, lse):
        def step(columns, _):
            weight = jnp.sum(self.total[:, columns], axis=0, keepdims=True)
            out[columns] = (self.acc[:, columns] / weight).T.astype(out.dtype)
            lse[:, columns] = self.shift[:, columns] + jnp.log2(weight)
            return _

        self._by_columns(step, 0)

    def _bounded(self, k, v, kept):
        """Straight-line code, its parts skewed into a pipeline.

        While the exponentials of one part are taken, the matrix unit is given the logits of a part ``blocks.ahead``
        further and the values of a part ``blocks.behind`` earlier: loading weights into the unit then hides behind
        streaming keys through it.
        """
        ahead, behind, count = self.blocks.ahead, self.blocks.behind, len(self.parts)
        logits, weights = {}, {}
        for now in range(-ahead, count + behind):
            if now + ahead < count:
                row, column = self.parts[now + ahead]
                part = self._logits(k, row, self._columns(column))
                logits[now + ahead] = self._kept(part, kept - row, sure=max(0, self.always - row))
            if 0 <= now < count:
                columns = self._columns(self.parts[now][1])
                weight = jnp.exp2(logits.pop(now) - self.shift[:, columns])
                self.total[:, columns] += _sum_to_sublanes(weight)
                weights[now] = weight.astype(v.dtype)
            if now >= behind:
                row, column = self.parts[now - behind]
                self.acc[:, self._columns(column)] += self._values(v, row, weights.pop(now - behind))

    def _online(self, k, v, kept):
        """The exact fall-back for logits of any size: a running maximum in ``shift``, part by part."""
        blocks = self.blocks
        per_row = blocks.queries // blocks.columns

        def step(number, _):
            row = pl.multiple_of(jax.lax.div(number, per_row) * blocks.slice, blocks.slice)
            columns = self._columns(pl.multiple_of(jax.lax.rem(number, per_row) * blocks.columns, blocks.columns))
            logits = self._kept(self._logits(k, row, columns), kept - row, sure=0)
            before = self.shift[:, columns]
            maximum = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
            weight, fade = jnp.exp2(logits - maximum), jnp.exp2(before - maximum)
            self.shift[:, columns] = maximum
            self.total[:, columns] = self.total[:, columns] * fade + _sum_to_sublanes(weight)
            self.acc[:, columns] = self.acc[:, columns] * fade + self._values(v, row, weight.astype(v.dtype))

        jax.lax.fori_loop(0, len(self.parts), step, None)

    def _columns(self, column):
        return pl.ds(column, self.blocks.columns)

    def _logits(self, k, row, columns):
        """Base-2 logits, float32 ``[slice, columns]``."""
        return self._dot(k[pl.ds(row, self.blocks.slice), :], self.qt[:, columns], 1)

    def _kept(self, logits, kept, sure):
        """``logits`` whose first ``kept`` rows stay (``sure`` of them always do); the rest becomes the lowest."""
        # Whole registers of eight rows need no test.
        sure = len(logits) if self.always == self.blocks.keys else min(len(logits), sure // 8 * 8)
        if sure == len(logits):
            return logits
        rest = logits[sure:]
        rest = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rest.shape, 0) + sure < kept, rest, LOWEST)
        return jnp.concatenate([logits[:sure], rest]) if sure else rest

    def _values(self, v, row, weights):
        """``[D, columns]``: the weighted sum of a slice's values."""
        return self._dot(v[pl.ds(row, self.blocks.slice), :], weights, 0)

    def _dot(self, a, b, axis):
        dimensions = (((axis,), (0,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


def _sum_to_sublanes(weights):
    """``[keys, queries]`` → ``[8, queries]``: additions of whole registers only."""
    return jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
