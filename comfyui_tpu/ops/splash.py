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

**Token-major.** The kernel reads ``[S, H·D]`` as a projection writes it, and writes the same: a head is 128 lanes, or
two heads of 64 share them. Those two go through a program together, as twice as many columns: each column of Qᵀ is
128 deep and zero where the other head's channels are, so that both meet the same keys, unsliced.

**Ragged lengths.** A key beyond the end has its logit replaced by the lowest finite number before the exponential,
which gives a weight of exactly 0. So has a key that was there before: the last tile starts early, so that it ends
where the keys end, and nothing is padded. Which rows of a tile can be either is known when the kernel is built; only
they pay for this test. Queries beyond the end are computed and never written.

**Schedule.** A grid step is a block of queries of 128 lanes; its loop takes the keys tile by tile and copies the
tiles from HBM itself while the one before is at work. Keys that fit in one tile are left to Pallas' own pipeline.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from comfyui_tpu.ops.attention import check_real_keys
from comfyui_tpu.ops.padding import pad, pad_to_multiple
from comfyui_tpu.ops.splash_blocks import Blocks, fit, generation_of, heads_together, padded_head_dim

LOG2_E = math.log2(math.e)
HEADROOM = 64.0  # H above, in powers of two
LARGEST_CENTRE = 2.0**14
PACKED_ROWS = 16  # of a register of bfloat16: what is copied starts and ends on such rows
# The lowest logit: finite, so that no row ever computes inf - inf, and far below any real one.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


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
        k = (k - mean).astype(k.dtype)
        mean = _mean(k, keys)
    if blocks is None:
        generation = generation_of(device_kind or jax.devices()[0].device_kind)
        blocks = fit(generation, rows, keys, padded, query.dtype.itemsize)
    geometry = _Geometry(blocks, rows, keys, together, padded * together)
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
    """The mean of the first ``keys`` keys, float32 ``[B, 1, C]`` of ``[B, S, C]``."""
    # Eight times the same: XLA would turn a single row into a vector sum.
    weights = jnp.broadcast_to(jnp.arange(k.shape[1]) < keys, (8, k.shape[1])).astype(k.dtype)
    precision = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    total = jnp.einsum("os,bsc->boc", weights, k, precision=precision, preferred_element_type=jnp.float32)
    return total[:, :1] / keys


def _radius(k: jax.Array, mean: jax.Array, width: int, keys: int) -> jax.Array:
    """The largest distance of the first ``keys`` keys from the mean key: ``[B·H]``, of ``[B, S, H·width]``.

    That the squares are rounded to bfloat16 moves it by less than 0.4 %.
    """
    squares = jnp.square(k - mean).astype(jnp.bfloat16)
    heads = np.repeat(np.eye(k.shape[2] // width), width, axis=1).astype(jnp.bfloat16)
    sums = jnp.einsum("hc,bsc->bhs", heads, squares, preferred_element_type=jnp.float32)
    sums = jnp.where(jnp.arange(k.shape[1]) < keys, sums, 0)
    return jnp.sqrt(jnp.max(sums, axis=2)).reshape(-1)


@dataclass(frozen=True)
class _Geometry:
    """How rows and lanes are cut: ``rows`` queries, ``keys`` real keys, ``together`` heads in ``lanes`` lanes."""

    blocks: Blocks
    rows: int
    keys: int
    together: int
    lanes: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.keys, self.blocks.keys)

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.rows, self.blocks.queries)

    @property
    def rows_needed(self) -> int:
        """Rows of K and V that several tiles cover: they are copied in whole registers."""
        return pl.cdiv(self.keys, PACKED_ROWS) * PACKED_ROWS if self.tiles > 1 else 0

    @property
    def last_start(self) -> int:
        """Where the last tile starts: early enough to end where the keys do."""
        return self.rows_needed - self.blocks.keys if self.tiles > 1 else 0

    @property
    def first_new(self) -> int:
        """The last tile's first row that no other tile holds."""
        return (self.tiles - 1) * self.blocks.keys - self.last_start

    @property
    def end(self) -> int:
        """The last tile's rows up to the end of the keys."""
        return self.keys - self.last_start


# Not under jax.jit: the call is traced inside its caller's program, once per shape.
def _call(q, k, v, mean, radius, *, geometry: _Geometry, factor: float, interpret: bool):
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
            pl.BlockSpec((None, lanes, 1), lambda g, i: (g, 0, 0)),
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
            "qt": pltpu.VMEM((lanes, columns), q.dtype),
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
    )(radius, mean.reshape(batch * groups, lanes, 1), q, k, v)


def _kernel(radius, mean, q, k_of_group, v_of_group, out, lse, *, geometry, groups, factor, **scratch):
    """All keys for ``blocks.queries`` queries of the heads that share lanes; columns are queries, head after head.

    Scratch: ``k``, ``v`` the tile at work and the next (a single tile comes in place of the group's); ``qt``
    ``[lanes, columns]`` the scaled queries; ``acc`` ``[D, columns]`` and ``total`` ``[8, columns]`` the sums of
    weighted values and of weights (eight partial sums, one a sublane); ``shift`` ``[1, columns]``; ``safe`` whether the
    bounded softmax may be used.
    """
    group, block = pl.program_id(0), pl.program_id(1)
    k, v = scratch.pop("k", None), scratch.pop("v", None)
    copied = scratch.pop("copied", None)
    work = _Work(geometry=geometry, **scratch)
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
    work.start(q, mean[...], radii, factor, geometry.rows - block * geometry.blocks.queries)
    if tiles == 1:
        work.add(k_of_group, v_of_group, 0)
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

    def __init__(self, *, qt, acc, total, shift, safe, geometry):
        self.qt, self.acc, self.total, self.shift, self.safe = qt, acc, total, shift, safe
        self.geometry, self.blocks, self.together = geometry, geometry.blocks, geometry.together
        self.width = geometry.lanes // geometry.together
        self.precision = jax.lax.Precision.HIGHEST if qt.dtype == jnp.float32 else None
        self.parts = [
            (row, column)
            for row in range(0, self.blocks.keys, self.blocks.slice)
            for column in range(0, self.together * self.blocks.queries, self.blocks.columns)
        ]

    def start(self, q, mean, radii, factor, kept_rows):
        """Scale and turn the queries; choose each one's shift, and whether the block is safe."""

        def turn(queries, safe):
            # As the matrix unit will see them: with a large mean key, rounding alone can move a row far.
            scaled = (q[queries].astype(jnp.float32).T * factor).astype(self.qt.dtype)
            for head, radius in enumerate(radii):
                fine = self._start_head(head, queries, self._of_head(head, scaled), mean, radius)
                # Queries beyond the end are whatever the memory holds.
                real = jax.lax.broadcasted_iota(jnp.int32, fine.shape, 1) < kept_rows - queries.start
                safe = jnp.minimum(safe, jnp.min(jnp.where(real & ~fine, 0, 1)))
            return safe

        safe = self._by_queries(turn, jnp.int32(1))
        self.safe[0] = safe
        # A running maximum starts from the bottom.
        self.shift[...] = jnp.where(safe == 1, self.shift[...], LOWEST)
        self.total[...] = jnp.zeros_like(self.total)

    def _of_head(self, head, turned):
        """``turned`` ``[lanes, queries]`` with zeros in the other head's channels."""
        if self.together == 1:
            return turned
        channel = jax.lax.broadcasted_iota(jnp.int32, turned.shape, 0)
        mine = (channel >= head * self.width) & (channel < (head + 1) * self.width)
        return jnp.where(mine, turned.astype(jnp.float32), 0).astype(turned.dtype)

    def _start_head(self, head, queries, scaled, mean, radius):
        """A head's columns for some queries; says of each whether the bounded softmax is safe, ``[1, queries]``."""
        columns = self._of(head, queries)
        self.qt[:, columns] = scaled
        scaled = scaled.astype(jnp.float32)
        reach = jnp.sqrt(jnp.sum(scaled * scaled, axis=0, keepdims=True)) * radius
        terms = scaled * mean
        centre = jnp.sum(terms, axis=0, keepdims=True)
        self.acc[:, columns] = jnp.zeros((self.width, queries.size), jnp.float32)
        self.shift[:, columns] = centre + jnp.maximum(reach - HEADROOM, 0)
        return (reach <= 2 * HEADROOM) & (jnp.sum(jnp.abs(terms), axis=0, keepdims=True) <= LARGEST_CENTRE)

    def _by_queries(self, step, carry):
        """A loop over the queries, some registers' worth at a time: little code, little memory for what is spilled."""
        size = math.gcd(self.blocks.queries, 512)
        at = lambda number: pl.ds(pl.multiple_of(number * size, size), size)  # noqa: E731
        return jax.lax.fori_loop(0, self.blocks.queries // size, lambda n, carry: step(at(n), carry), carry)

    def _of(self, head, queries):
        """A head's columns for these queries."""
        return pl.ds(pl.multiple_of(queries.start + head * self.blocks.queries, queries.size), queries.size)

    def add(self, k, v, tile):
        """Add a tile, ``k`` and ``v`` ``[keys, lanes]``, number ``tile`` of its group, to the sums."""
        last = tile == self.geometry.tiles - 1
        kept = (jnp.where(last, self.geometry.first_new, 0), jnp.where(last, self.geometry.end, self.blocks.keys))
        pl.when(self.safe[0] == 1)(lambda: self._bounded(k, v, kept))
        pl.when(self.safe[0] == 0)(lambda: self._online(k, v, kept))

    def finish(self, out, lse):
        def step(queries, _):
            heads = []
            for head in range(self.together):
                columns = self._of(head, queries)
                weight = jnp.sum(self.total[:, columns], axis=0, keepdims=True)
                heads.append(self.acc[:, columns] / weight)
                lse[head : head + 1, queries] = self.shift[:, columns] + jnp.log2(weight)
            out[queries] = (heads[0] if len(heads) == 1 else jnp.concatenate(heads)).T.astype(out.dtype)
            return _

        self._by_queries(step, 0)

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
                part = self._logits(k, row, self._columns(column), column // self.blocks.queries)
                logits[now + ahead] = self._kept(part, row, kept)
            if 0 <= now < count:
                columns = self._columns(self.parts[now][1])
                weight = jnp.exp2(logits.pop(now) - self.shift[:, columns])
                self.total[:, columns] += _sum_to_sublanes(weight)
                weights[now] = weight.astype(v.dtype)
            if now >= behind:
                row, column = self.parts[now - behind]
                self.acc[:, self._columns(column)] += self._values(v, row, column, weights.pop(now - behind))

    def _online(self, k, v, kept):
        """The exact fall-back for logits of any size: a running maximum in ``shift``, part by part."""
        blocks = self.blocks
        for head in range(self.together):

            def step(number, _, head=head):
                per_row = blocks.queries // blocks.columns
                row = pl.multiple_of(jax.lax.div(number, per_row) * blocks.slice, blocks.slice)
                column = jax.lax.rem(number, per_row) * blocks.columns + head * blocks.queries
                columns = self._columns(pl.multiple_of(column, blocks.columns))
                logits = self._kept_anywhere(self._logits(k, row, columns, head), row, kept)
                before = self.shift[:, columns]
                maximum = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
                weight, fade = jnp.exp2(logits - maximum), jnp.exp2(before - maximum)
                self.shift[:, columns] = maximum
                self.total[:, columns] = self.total[:, columns] * fade + _sum_to_sublanes(weight)
                values = self._values(v, row, head * blocks.queries, weight.astype(v.dtype))
                self.acc[:, columns] = self.acc[:, columns] * fade + values

            jax.lax.fori_loop(0, len(self.parts) // self.together, step, None)

    def _columns(self, column):
        return pl.ds(column, self.blocks.columns)

    def _logits(self, k, row, columns, head):
        """Base-2 logits of a head, float32 ``[slice, columns]``."""
        # The first head's channels are cut off for nothing; the second's would have to be shifted.
        depth = self.width if head == 0 else self.together * self.width
        return self._dot(k[pl.ds(row, self.blocks.slice), :depth], self.qt[:depth, columns], 1)

    def _kept(self, logits, row, kept):
        """``logits`` of the rows from ``row`` on, the lowest where a row is not in ``kept``; ``row`` is static."""
        # Whole registers of eight rows that are keys in every tile need no test.
        low = min(len(logits), max(0, -(-(self.geometry.first_new - row) // 8) * 8))
        high = max(low, min(len(logits), (self.geometry.end - row) // 8 * 8))
        cuts = [(0, low), (low, high), (high, len(logits))]
        parts = [
            logits[start:stop]
            if start == low and stop == high
            else self._kept_anywhere(logits[start:stop], row + start, kept)
            for start, stop in cuts
            if start < stop
        ]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _kept_anywhere(self, logits, row, kept):
        if self.geometry.first_new == 0 and self.geometry.end == self.blocks.keys:
            return logits
        rows = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + row
        return jnp.where((rows >= kept[0]) & (rows < kept[1]), logits, LOWEST)

    def _values(self, v, row, column, weights):
        """``[D, columns]``: the weighted sum of a slice's values, of the head that ``column`` belongs to."""
        values = v[pl.ds(row, self.blocks.slice), :]
        if self.geometry.tiles == 1 and self.geometry.end < self.blocks.keys:
            # Behind the end the memory holds anything, and 0 times that may be NaN.
            rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + row
            values = jnp.where(rows < self.geometry.end, values.astype(jnp.float32), 0).astype(values.dtype)
        if self.together == 1:
            return self._dot(values, weights, 0)
        # Turned first: rows are cut for nothing, lanes would have to be shifted.
        first = column // self.blocks.queries * self.width
        return self._dot(values.T[first : first + self.width], weights, 1)

    def _dot(self, a, b, axis):
        dimensions = (((axis,), (0,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


def _sum_to_sublanes(weights):
    """``[keys, queries]`` → ``[8, queries]``: additions of whole registers only."""
    return jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
