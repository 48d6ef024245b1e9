"""Pallas TPU kernels that read rows once, normalise them and write them once.

A tile is some rows of full width. Float32 statistics are taken from the tile in VMEM, in as many passes as they need:
HBM sees one. Each pass walks the tile in chunks of rows, and a chunk in columns of 128 lanes, so that little more than
a column of values is alive at a time. Rows beyond the end of a ragged last tile are whatever the memory holds; no row
looks at another one, and Pallas does not write them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
CHUNK = 32  # rows: enough independent work to hide what each operation waits for
MOST_ROWS = 256  # of a tile
FEW_ROWS, ENOUGH_TILES = 64, 16  # tiles get shorter where there are few, for the first and last are not overlapped
# Of blocks that are moved while others are at work, so there are two of each. v4, v5e and v5p have 16 MiB for all.
TILE_BYTES = 10 * 2**20


def tile_rows(batch: int, rows: int, row_bytes: int) -> int:
    """Rows of a tile: as many as fit; 0 where not even the fewest do.

    Args:
        row_bytes: of a row of all blocks, read and written.
    """
    fitting = TILE_BYTES // (2 * row_bytes) // CHUNK * CHUNK
    most = min(MOST_ROWS, fitting, pl.cdiv(rows, CHUNK) * CHUNK)
    while most > FEW_ROWS and batch * pl.cdiv(rows, most) < ENOUGH_TILES:
        most = max(FEW_ROWS, most // 2 // CHUNK * CHUNK)
    return most


def layer_norm_row_bytes(x: jax.Array, out_dtype: jnp.dtype) -> int:
    """For :func:`tile_rows`; of the float32 scratch there is one, not two, so it counts half."""
    return x.shape[2] * (x.dtype.itemsize + jnp.dtype(out_dtype).itemsize + 2)


def layer_norm_rows(
    x: jax.Array, gain: jax.Array, offset: jax.Array, *, eps: float, out_dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """``(x - mean) / sqrt(var + eps) · gain + offset`` of rows ``[B, S, C]``; ``gain``, ``offset`` ``[B, 1, C]``."""
    batch, rows, width = x.shape
    tile = tile_rows(batch, rows, layer_norm_row_bytes(x, out_dtype))
    by_row = pl.BlockSpec((None, tile, width), lambda b, i: (b, i, 0))
    by_batch = pl.BlockSpec((None, 1, width), lambda b, i: (b, 0, 0))
    return pl.pallas_call(
        functools.partial(_layer_norm_kernel, eps=eps),
        grid=(batch, pl.cdiv(rows, tile)),
        in_specs=[by_row, by_batch, by_batch],
        out_specs=by_row,
        out_shape=jax.ShapeDtypeStruct(x.shape, out_dtype),
        scratch_shapes=[pltpu.VMEM((tile, size), jnp.float32) for size in (width, LANES, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_cost(x, out_dtype, 9, 2 * gain.size * gain.dtype.itemsize),
        interpret=interpret,
        name="layer_norm_modulate",
    )(x, gain, offset)


def norm_rotary_rows(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    cosines: jax.Array | None,
    sines: jax.Array | None,
    *,
    eps: float,
    head_dim: int,
    whole: bool,
    centred: bool,
    interpret: bool = False,
) -> jax.Array:
    """Rows ``[B, S, H·D]`` normalised over their ``whole`` width or over each head, then turned by the angles, if any.

    Args:
        weight, bias: ``[C]`` over the whole width, else ``[D]``.
        cosines, sines: ``[S, D]``.
        centred: subtract the mean first (over heads only).
    """
    batch, rows, width = x.shape
    period = width if whole else max(head_dim, LANES)
    affine = [jnp.tile(t.astype(jnp.float32), period // t.size)[None] for t in (weight, bias) if t is not None]
    tables = [t.astype(jnp.float32) for t in (cosines, sines) if t is not None]
    row_bytes = 2 * width * x.dtype.itemsize + 4 * len(tables) * max(head_dim, LANES)
    tile = tile_rows(batch, rows, row_bytes)
    # The batch goes fastest: tables stay where they are while it does.
    by_row = pl.BlockSpec((None, tile, width), lambda i, b: (b, i, 0))
    by_token = pl.BlockSpec((tile, head_dim), lambda i, b: (i, 0))
    fixed = pl.BlockSpec((1, period), lambda i, b: (0, 0))
    work = functools.partial(_norm_rotary_kernel, eps=eps, head_dim=head_dim, whole=whole, centred=centred)
    return pl.pallas_call(
        functools.partial(work, biased=bias is not None),
        grid=(pl.cdiv(rows, tile), batch),
        in_specs=[by_row, *[fixed] * len(affine), *[by_token] * len(tables)],
        out_specs=by_row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((tile, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, x.dtype, 9, 4 * sum(t.size for t in tables)),
        interpret=interpret,
        name=kernel_name(head_dim, whole, centred, bool(tables)),
    )(x, *affine, *tables)


def kernel_name(head_dim: int, whole: bool, centred: bool, rotated: bool) -> str:
    """Says what decides the kernel's cycles, for :func:`estimated_cycles`."""
    words = ["layer_norm" if centred else "rms_norm", "width" if whole else f"head{head_dim}"]
    return "_".join(words + ["rotary"] * rotated)


# Cycles of 1024 values, from the compiler's schedules (docs/attention.md tells how to read them; jax 0.10.2, libtpu
# 0.0.42.1) of bfloat16 rows, with the rotation; heads of 128 and 64. A v4 bundle has two vector slots, the others four.
_OVER_WIDTH = {"v4": 7.35, "v5e": 4.1, "v5p": 4.1, "v6e": 3.1, "v7x": 3.05}
_OVER_LONG_HEADS = {"v4": 16.5, "v5e": 6.35, "v5p": 6.45, "v6e": 3.95, "v7x": 3.95}
_OVER_SHORT_HEADS = {"v4": 30.2, "v5e": 18.9, "v5p": 19.1, "v6e": 12.9, "v7x": 12.9}
_MODULATION = {"v4": 6.3, "v5e": 3.1, "v5p": 3.1, "v6e": 3.05, "v7x": 3.0}
_CORES = {"v4": 2, "v5p": 2}  # of a device; each takes half of the tiles


def estimated_cycles(name: str, generation: str, batch: int, rows: int, width: int) -> float | None:
    """Cycles that a kernel computes for, without waiting for HBM; None for another kernel.

    Args:
        name: as the kernel was named.
        generation: as in :mod:`comfyui_tpu.ops.splash_blocks`; v5e's cycles for others.
    """
    found = re.fullmatch(r"layer_norm_modulate|(?:rms|layer)_norm_(width|head(\d+))(?:_rotary)?", name)
    if not found:
        return None
    over, head_dim = found.groups()
    heads = _OVER_LONG_HEADS if int(head_dim or 0) >= LANES else _OVER_SHORT_HEADS
    table = _MODULATION if over is None else _OVER_WIDTH if over == "width" else heads
    values = batch * -(-rows // CHUNK) * CHUNK * width
    return values / 1024 * table.get(generation, table["v5e"]) / _CORES.get(generation, 1)


def _cost(x: jax.Array, out_dtype: jnp.dtype, flops: int, more_bytes: int) -> pl.CostEstimate:
    moved = x.size * (x.dtype.itemsize + jnp.dtype(out_dtype).itemsize) + more_bytes
    return pl.CostEstimate(flops=flops * x.size, transcendentals=x.size // x.shape[-1], bytes_accessed=moved)


def _layer_norm_kernel(x, gain, offset, out, centred, mean, scale, *, eps):
    """Scratch: ``centred`` ``[rows, C]``; ``mean`` and ``scale`` ``[rows, 128]``, every lane alike."""
    width = x.shape[1]

    def squared(rows, lanes, part):
        centred[rows, lanes] = part = part - mean[rows]
        return part * part

    _sums(x, mean, lambda rows, lanes, part: part)
    mean[...] = _across(mean[...]) / width
    _sums(x, scale, squared)
    scale[...] = jax.lax.rsqrt(_across(scale[...]) / width + eps)

    def write(rows):
        for lanes in _columns(width):
            part = centred[rows, lanes] * scale[rows]
            out[rows, lanes] = (part * gain[:, lanes] + offset[:, lanes]).astype(out.dtype)

    _by_chunks(x.shape[0], write)


def _norm_rotary_kernel(x, *refs, eps, head_dim, whole, centred, biased):
    """``refs``: weight, bias if any, cosines and sines if any, the result; scratch ``scale`` ``[rows, 128]``."""
    *given, out, scale = refs
    weight, bias, tables = given[0], given[1] if biased else None, given[1 + biased :]
    width = x.shape[1]
    if whole:
        _sums(x, scale, lambda rows, lanes, part: part * part)
        scale[...] = jax.lax.rsqrt(_across(scale[...]) / width + eps)

    def write(rows):
        rotary = [_repeated(table[rows]) for table in tables]
        for columns in _groups(width, LANES if whole else max(head_dim, LANES)):
            parts = [x[rows, lanes].astype(jnp.float32) for lanes in columns]
            parts = [part * scale[rows] for part in parts] if whole else _normalised(parts, head_dim, eps, centred)
            for lanes, part in zip(columns, parts, strict=True):
                at = _within(lanes, weight.shape[1])
                part = part * weight[:, at]
                part = part if bias is None else part + bias[:, at]
                # As between two operations of a model: rounded before it is turned.
                part = part.astype(x.dtype)
                if rotary:
                    part = _turned(part, *(table[:, _within(lanes, table.shape[1])] for table in rotary))
                out[rows, lanes] = part.astype(out.dtype)

    _by_chunks(x.shape[0], write)


def _normalised(parts: list[jax.Array], head_dim: int, eps: float, centred: bool) -> list[jax.Array]:
    """The columns of one head, or one column with several heads, normalised over each head."""
    if centred:
        mean = _head_mean(parts, head_dim)
        parts = [part - mean for part in parts]
    scale = jax.lax.rsqrt(_head_mean([part * part for part in parts], head_dim) + eps)
    return [part * scale for part in parts]


def _head_mean(parts: list[jax.Array], head_dim: int) -> jax.Array:
    """Means over each head of ``head_dim`` lanes, broadcastable to a column."""
    total = functools.reduce(jnp.add, parts)
    if head_dim >= LANES:
        return jnp.sum(total, axis=1, keepdims=True) / head_dim
    head = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) // head_dim
    mean = jnp.zeros_like(total)
    for index in range(LANES // head_dim):
        of_head = jnp.sum(jnp.where(head == index, total, 0), axis=1, keepdims=True)
        mean = jnp.where(head == index, of_head / head_dim, mean)
    return mean


def _turned(part: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Pairs of neighbouring lanes (a, b) → (a·cos − b·sin, a·sin + b·cos), in float32."""
    even = jax.lax.broadcasted_iota(jnp.int32, part.shape, 1) % 2 == 0
    signed = jnp.where(even, -sines, sines)
    return part.astype(jnp.float32) * cosines + _exchanged(part).astype(jnp.float32) * signed


def _exchanged(part: jax.Array) -> jax.Array:
    """Every lane's neighbour in its pair. Two rows of bfloat16 share a lane and move together."""
    packed = part if part.dtype == jnp.float32 else pltpu.bitcast(part, jnp.int32)
    neighbour = jax.lax.broadcasted_iota(jnp.int32, packed.shape, 1) ^ 1
    moved = jnp.take_along_axis(packed, neighbour, axis=1, mode="promise_in_bounds")
    return moved if part.dtype == jnp.float32 else pltpu.bitcast(moved, part.dtype)


def _repeated(table: jax.Array) -> jax.Array:
    """``[rows, D]`` → at least 128 lanes, each head of a column finding its angles."""
    return jnp.concatenate([table] * max(1, LANES // table.shape[1]), axis=1)


def _sums(x, into, term: Callable[[pl.Slice, slice, jax.Array], jax.Array]) -> None:
    """Of ``term`` over the columns of each row, as 128 partial sums. Four chains of additions at once."""

    def step(rows):
        sums = [None] * 4
        for number, lanes in enumerate(_columns(x.shape[1])):
            part = term(rows, lanes, x[rows, lanes].astype(jnp.float32))
            before = sums[number % 4]
            sums[number % 4] = part if before is None else before + part
        into[rows] = functools.reduce(jnp.add, [each for each in sums if each is not None])

    _by_chunks(x.shape[0], step)


def _across(sums: jax.Array) -> jax.Array:
    """The sum of each row's lanes, in every lane."""
    return jnp.broadcast_to(jnp.sum(sums, axis=1, keepdims=True), sums.shape)


def _by_chunks(rows: int, step: Callable[[pl.Slice], None]) -> None:
    def run(chunk, carry):
        step(pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK))
        return carry

    jax.lax.fori_loop(0, rows // CHUNK, run, None)


def _columns(width: int) -> Iterator[slice]:
    return (slice(start, start + LANES) for start in range(0, width, LANES))


def _groups(width: int, size: int) -> Iterator[list[slice]]:
    """Columns, those of a head together."""
    return ([slice(c.start + at, c.stop + at) for c in _columns(size)] for at in range(0, width, size))


def _within(lanes: slice, period: int) -> slice:
    """Where a column lies in an array that repeats."""
    start = lanes.start % period
    return slice(start, start + LANES)
