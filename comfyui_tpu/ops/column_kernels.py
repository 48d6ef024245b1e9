"""A Pallas TPU kernel that makes what a convolution reads: normed and activated columns, each beside its neighbours.

XLA takes four passes over HBM for it: the past and the rows of other devices joined to the video, the norm, the columns
moved by one both ways, and the convolution that joins the three. Here a row is read once and written once.

Columns lie along the lanes and channels along the sublanes, ``[T, S, C, U]``: as XLA itself lays videos whose channels
are no whole number of 128 lanes, so that nothing is turned before or after. A norm over channels then adds registers,
and a column's neighbours are one lane away.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
NAME = "normed_columns"
FLOPS = 8  # of a value, by our own account: so the planner learns how many values a kernel reads
# Cycles of 1024 values read, from the compiler's schedules (docs/attention.md tells how to read them; jax 0.10.2,
# libtpu 0.0.42.1): of a device (v4 and v5p have two cores), at most. Reading and writing takes at least as long.
_CYCLES = {"v4": 8.8, "v5e": 11.2, "v5p": 5.6, "v6e": 6.7, "v7x": 6.9}


@dataclass(frozen=True)
class Part:
    """Some rows of a video and where they belong among those of the result.

    Attributes:
        video: ``[T, S, C, U]``.
        frame: of the result, for the first one here.
        row, apart: of the result, for the first one here, and how far apart they are.
        real: how many of the rows count, the others give zeros: an int32 array of one number; all when None.
    """

    video: jax.Array
    frame: int
    row: int
    apart: int = 1
    real: jax.Array | None = None


def estimated_cycles(name: str, generation: str, flops: int) -> float | None:
    """Cycles that a kernel computes for, without waiting for HBM; None for another kernel.

    Args:
        name: as the kernel was named.
        generation: as in :mod:`comfyui_tpu.ops.splash_blocks`; v5e's cycles for others.
        flops: that the kernel declares.
    """
    return flops / FLOPS / 1024 * _CYCLES.get(generation, _CYCLES["v5e"]) if name == NAME else None


def fits(channels: int, columns: int) -> bool:
    """Whether the kernel takes ``columns`` of so many ``channels`` side by side, and XLA lays them as it does."""
    return channels % SUBLANES == 0 and (columns * channels) % LANES != 0


def normed_columns(
    parts: list[Part], gain: jax.Array, frames: int, rows: int, columns: int = 1, interpret: bool = False
) -> jax.Array:
    """SiLU of an RMS norm over channels, of each column beside its neighbours.

    Args:
        parts: together all rows of all frames of the result, each once. The first should be one that no other call has
            as well: XLA would make what such calls share once, early, and copy it.
        gain: ``[C]``: what the norm ``x / max(|x|, 1e-12) · √C`` is multiplied by.
        frames, rows: of the result.
        columns: that lie side by side in a video's ``columns·C`` channels.
        interpret: run the kernel in Pallas' interpreter (any backend; for tests).

    Returns:
        ``[frames, rows, (columns + 2)·C, U]`` float32: the column before, those of the video, the column after; zeros
        beyond the first and the last.
    """
    channels, width = gain.shape[0], parts[0].video.shape[-1]
    scale = jnp.broadcast_to((gain * math.sqrt(channels))[:, None], (channels, LANES))
    out = jax.ShapeDtypeStruct((frames, rows, (columns + 2) * channels, width), jnp.float32)
    made = None
    for part in parts:
        made = _written(part, scale, made, out, interpret)
    return made


def _written(part: Part, scale: jax.Array, made: jax.Array | None, out: jax.ShapeDtypeStruct, interpret: bool):
    """The result with ``part`` in its place; ``made`` is what there is of it already."""
    frames, rows, depth, width = part.video.shape
    real = jnp.full((1,), rows, jnp.int32) if part.real is None else part.real
    lanes = pl.cdiv(width, LANES) * LANES
    wide = out.shape[2]
    values = frames * rows * depth * lanes
    read = pl.BlockSpec((None, None, depth, lanes), lambda t, s: (t, s, 0, 0))
    write = pl.BlockSpec((None, None, wide, lanes), lambda t, s: (part.frame + t, part.row + part.apart * s, 0, 0))
    fixed = pl.BlockSpec(scale.shape, lambda t, s: (0, 0))
    earlier = [] if made is None else [made]
    moved = 4 * frames * rows * (depth + wide) * lanes
    cost = pl.CostEstimate(flops=FLOPS * values, transcendentals=2 * values, bytes_accessed=moved)
    return pl.pallas_call(
        functools.partial(_kernel, width=width),
        grid=(frames, rows),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            read,
            fixed,
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in earlier),
        ],
        out_specs=write,
        out_shape=out,
        input_output_aliases={3: 0} if earlier else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=cost,
        interpret=interpret,
        name=NAME,
    )(real, part.video, scale, *earlier)


def _kernel(real, x, scale, *refs, width):
    """One row: ``x`` ``[columns·C, lanes]``, ``scale`` ``[C, 128]``; the last of ``refs`` is the result."""
    out = refs[-1]
    channels, lanes = scale.shape[0], x.shape[-1]
    lane = jax.lax.broadcasted_iota(jnp.int32, (channels, lanes), 1)
    # Lanes beyond the last column hold anything.
    counts = (lane < width) & (pl.program_id(1) < real[0])
    columns = [slice(start, start + channels) for start in range(0, x.shape[0], channels)]
    normed = [_normed(x[each], scale[...], counts) for each in columns]
    before = jnp.where(lane == 0, 0.0, pltpu.roll(normed[-1], 1, 1))
    after = jnp.where(lane == width - 1, 0.0, pltpu.roll(normed[0], lanes - 1, 1))
    for number, part in enumerate([before, *normed, after]):
        out[number * channels : (number + 1) * channels] = part


def _normed(x: jax.Array, scale: jax.Array, counts: jax.Array) -> jax.Array:
    """``[C, lanes]``, zeros where nothing ``counts``."""
    length = jnp.sum(x * x, axis=0, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.maximum(length, 1e-24)) * jnp.tile(scale, (1, x.shape[1] // LANES))
    return jnp.where(counts, jax.nn.silu(x), 0.0)
