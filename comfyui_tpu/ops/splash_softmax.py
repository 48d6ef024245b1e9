"""The arithmetic of the attention kernel: the softmax of a block of queries, tile of keys by tile.

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

So a block of queries is safe when r ≤ 128 for all of them. c and |q| are computed in the matrix unit, from the queries
as rounded for it: c with k̄ as a sum of two bfloat16 numbers, which leaves out 2^−17 of it, |q| from squares rounded to
bfloat16. Those errors only move m: that of r stays below 1, being less than 0.6 % of 128, and that of c while |q|·|k̄| ≤
2^14, which is checked as well and bounds Σ|qᵢ·k̄ᵢ| (the slack above is far larger). Blocks that are not safe, including
any with a NaN, take the exact online softmax with its running maximum. Queries and keys that went through an RMS norm
of weight about 1 at head_dim 128 have r ≤ 16.4.

**Ragged lengths.** A key beyond the end has its logit replaced by the lowest finite number before the exponential,
which gives a weight of exactly 0. So has a key that was there before: the last tile starts early, so that it ends
where the keys end, and nothing is padded. Which rows of a tile can be either is known when the kernel is built; only
they pay for this test. Queries beyond the end are computed and never written.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from comfyui_tpu.ops.splash_blocks import Blocks

HEADROOM = 64.0  # H above, in powers of two
LARGEST_CENTRE = 2.0**14
PACKED_ROWS = 16  # of a register of bfloat16: what is copied starts and ends on such rows
# The lowest logit: finite, so that no row ever computes inf - inf, and far below any real one.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
CHUNK = 512  # queries that are started and ended together: some registers' worth


@dataclass(frozen=True)
class Geometry:
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

    @property
    def turned(self) -> bool:
        """Whether queries are kept with channels along sublanes: the matrix unit is given them more often where two
        heads share lanes, and turns them each time else."""
        return self.together > 1


class RunningSoftmax:
    """The running sums of a block of queries, and what a tile of keys adds to them.

    References to memory that lasts from tile to tile: ``scaled`` ``[columns, lanes]``, the queries, or
    ``[lanes, columns]`` if turned; ``acc`` ``[D, columns]`` and ``total`` ``[8, columns]``, the sums of weighted values
    and of weights (eight partial sums, one a sublane); ``shift`` ``[1, columns]``; ``safe`` ``[1]``, whether the
    bounded softmax may be used.
    """

    def __init__(self, *, scaled, acc, total, shift, safe, geometry):
        self.scaled, self.acc, self.total, self.shift, self.safe = scaled, acc, total, shift, safe
        self.geometry, self.blocks, self.together = geometry, geometry.blocks, geometry.together
        self.width = geometry.lanes // geometry.together
        self.precision = jax.lax.Precision.HIGHEST if scaled.dtype == jnp.float32 else None
        self.parts = [
            (row, column)
            for row in range(0, self.blocks.keys, self.blocks.slice)
            for column in range(0, self.together * self.blocks.queries, self.blocks.columns)
        ]

    def start(self, q, mean, radii, factor, kept_rows):
        """Scale the queries; choose each one's shift, and whether the block is safe.

        Args:
            q: ``[queries, lanes]``.
            mean: the mean key, float32 ``[8, lanes]``: eight times the same.
            radii: of each head, how far its keys are from the mean at most.
            factor: on the logits, log2 e included.
            kept_rows: how many of the queries are real.
        """
        heads = range(self.together)
        lengths = [jnp.sqrt(jnp.sum(jnp.square(self._of_head(head, mean)), 1, keepdims=True)) for head in heads]
        mean = self._in_two_parts(mean)
        worst = jnp.zeros((8, 128), jnp.int32)
        for queries in self._by_queries():
            # As the matrix unit will see them: with a large mean key, rounding alone can move a row far.
            scaled = (q[queries].astype(jnp.float32) * factor).astype(self.scaled.dtype)
            for head in heads:
                part = self._of_head(head, scaled)
                fine = self._start_head(head, queries, part, mean, radii[head], lengths[head])
                # Queries beyond the end are whatever the memory holds.
                real = jax.lax.broadcasted_iota(jnp.int32, fine.shape, 1) < kept_rows - queries.start
                unsafe = jnp.where(real & ~fine, 1, 0)
                for lane in range(0, queries.size, 128):
                    worst = jnp.maximum(worst, unsafe[:, lane : lane + 128])
        safe = 1 - jnp.max(worst)
        self.safe[0] = safe
        # A running maximum starts from the bottom.
        self.shift[...] = jnp.where(safe == 1, self.shift[...], LOWEST)
        self.total[...] = jnp.zeros_like(self.total)

    def _in_two_parts(self, mean):
        """``[8, lanes]`` float32 → ``[16, lanes]``: in the queries' dtype, and behind it what that rounded off."""
        high = mean.astype(self.scaled.dtype).astype(jnp.float32)
        return jnp.concatenate([high, mean - high]).astype(self.scaled.dtype)

    def _of_head(self, head, rows):
        """``[rows, lanes]`` with zeros in the other head's channels."""
        if self.together == 1:
            return rows
        channel = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        mine = (channel >= head * self.width) & (channel < (head + 1) * self.width)
        return jnp.where(mine, rows.astype(jnp.float32), 0).astype(rows.dtype)

    def _start_head(self, head, queries, scaled, mean, radius, mean_length):
        """A head's columns for some queries; says of each whether the bounded softmax is safe, ``[8, queries]``.

        Sums over channels are taken in the matrix unit, which gives them as rows: eight times the same.
        """
        columns = self._of(head, queries)
        if self.geometry.turned:
            self.scaled[:, columns] = scaled.T
        else:
            self.scaled[columns] = scaled
        squares = jnp.square(scaled.astype(jnp.float32)).astype(scaled.dtype)
        length = jnp.sqrt(self._dot(jnp.ones((8, squares.shape[1]), squares.dtype), squares, 1, 1))
        reach = length * radius
        centre = self._dot(mean, scaled, 1, 1)
        shift = centre[:8] + centre[8:] + jnp.maximum(reach - HEADROOM, 0)
        self.shift[:, columns] = shift[:1]
        self.acc[:, columns] = jnp.zeros((self.width, queries.size), jnp.float32)
        return (reach <= 2 * HEADROOM) & (length * mean_length <= LARGEST_CENTRE)

    def _by_queries(self):
        """The queries, some registers' worth at a time."""
        size = self.blocks.queries
        return [pl.ds(start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]

    def _of(self, head, queries):
        """A head's columns for these queries."""
        return pl.ds(queries.start + head * self.blocks.queries, queries.size)

    def add(self, k, v, tile):
        """Add a tile, ``k`` and ``v`` ``[keys, lanes]``, number ``tile`` of its group, to the sums."""
        last = tile == self.geometry.tiles - 1
        kept = (jnp.where(last, self.geometry.first_new, 0), jnp.where(last, self.geometry.end, self.blocks.keys))
        pl.when(self.safe[0] == 1)(lambda: self._bounded(k, v, kept))
        pl.when(self.safe[0] == 0)(lambda: self._online(k, v, kept))

    def finish(self, out, lse):
        """Write the result, ``out`` ``[queries, lanes]``, and ``lse`` ``[heads, queries]``."""
        for queries in self._by_queries():
            heads = []
            for head in range(self.together):
                columns = self._of(head, queries)
                weight = jnp.sum(self.total[:, columns], axis=0, keepdims=True)
                heads.append(self.acc[:, columns] * (1 / weight))
                lse[head : head + 1, queries] = self.shift[:, columns] + jnp.log2(weight)
            out[queries] = (heads[0] if len(heads) == 1 else jnp.concatenate(heads)).astype(out.dtype).T

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
        keys = k[pl.ds(row, self.blocks.slice), :depth]
        if self.geometry.turned:
            return self._dot(keys, self.scaled[:depth, columns], 1, 0)
        return self._dot(keys, self.scaled[columns, :depth], 1, 1)

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
            return self._dot(values, weights, 0, 0)
        # Turned first: rows are cut for nothing, lanes would have to be shifted.
        first = column // self.blocks.queries * self.width
        return self._dot(values.T[first : first + self.width], weights, 1, 0)

    def _dot(self, a, b, axis_of_a, axis_of_b):
        dimensions = (((axis_of_a,), (axis_of_b,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


def _sum_to_sublanes(weights):
    """``[keys, queries]`` → ``[8, queries]``: additions of whole registers only."""
    return jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
