"""Group norms of spread videos over a whole chunk, scaled and shifted place by place, for use inside ``jax.shard_map``.

Videos are as in :mod:`comfyui_tpu.ops.causal_conv`: ``[T, S, U, columns·C]`` of which the rows are spread.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from comfyui_tpu.ops.causal_conv import PAST, Rows

_ALIKE = 8  # a product with one row would be a sum on the vector unit, which takes twice as long


def group_statistics(
    x: jax.Array, rows: Rows, groups: int, eps: float, columns: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Mean and 1 / standard deviation of each channel's group, ``[columns·C]`` float32, over all of the video.

    Rows that are none do not count. The variance is about the mean, as in ``norm.group_norm``.
    """
    members = x.shape[-1] // columns // groups
    count = x.shape[0] * rows.total * x.shape[2] * columns * members

    def mean_of(sums: jax.Array) -> jax.Array:
        ours = sums.reshape(columns, groups, members).sum((0, 2))
        return jnp.tile(jnp.repeat(jax.lax.psum(ours, rows.names) / count, members), columns)

    wide = x.astype(jnp.float32)
    # XLA sums what a convolution makes while it makes it; the squares, which need the mean, are another pass.
    mean = mean_of(jnp.sum(rows.real(wide), axis=(0, 1, 2)))
    squares = jnp.square(wide - mean)
    counted = rows.real(jnp.ones((*x.shape[:3], 1), jnp.float32))[..., 0]
    sums = jax.lax.dot_general(
        jnp.broadcast_to(counted, (_ALIKE, *counted.shape)),
        squares,
        (((1, 2, 3), (0, 1, 2)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return mean, jax.lax.rsqrt(mean_of(sums[0]) + eps)


def modulated(x: jax.Array, mean: jax.Array, scale: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
    """``silu((x - mean) · scale · factor + shift)``, with room before for the past and around for neighbours.

    Every frame and row of ``factor`` and ``shift`` belongs to as many of ``x``; where their frames are odd, the first
    to one frame alone.

    Args:
        x: ``[T, S, U, C]``; the result is ``[T + 2, S + 2, U, C]``. What is in the room is not defined.
        mean, scale: ``[C]`` float32.
        factor, shift: ``[T', S', U, C]`` float32.
    """
    factor = factor * scale
    shift = shift - mean * factor
    frames, rows, *columns = x.shape
    few, blocks, *_ = factor.shape
    high, single = rows // blocks, few % 2

    # Loops, because XLA would repeat factor and shift in HBM rather than in the pass that uses them.
    def spread(out: jax.Array, start: int, each: int, first: int, last: int) -> jax.Array:
        """Fills ``each`` frames for each of ``factor`` from ``first`` to before ``last``, beginning with ``start``."""

        def step(index: jax.Array, out: jax.Array) -> jax.Array:
            at, row = index // blocks, index % blocks
            t, s = start + each * at, high * row
            part = jax.lax.dynamic_slice(x, (t, s, 0, 0), (each, high, *columns)).astype(jnp.float32)
            part = jax.nn.silu(part * factor[first + at, row] + shift[first + at, row])
            return jax.lax.dynamic_update_slice(out, part.astype(x.dtype), (PAST + t, 1 + s, 0, 0))

        return jax.lax.fori_loop(0, (last - first) * blocks, step, out)

    out = jax.lax.empty((frames + PAST, rows + 2, *columns), x.dtype)
    if single:
        out = spread(out, 0, 1, 0, 1)
    if few > single:
        out = spread(out, single, (frames - single) // (few - single), single, few)
    return out
