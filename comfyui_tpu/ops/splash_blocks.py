"""Tile sizes of the attention kernel: a table per TPU generation, fitted to the lengths at hand.

The table comes from ``python -m comfyui_tpu.bench tune``, which compiles candidates with the TPU compiler and ranks
them by their static cycles (a compiler estimate; jax 0.10.2, libtpu 0.0.42.1). docs/attention.md tells how to read
them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """How a tile is cut.

    Attributes:
        queries: queries in a tile, of each head in it (:func:`heads_together`), a multiple of ``columns``.
        keys: keys in a tile, a multiple of ``slice``.
        columns: queries that one part of the pipeline handles.
        slice: keys that one part of the pipeline handles.
        ahead: how many parts the logits run ahead of their exponentials.
        behind: how many parts the values follow behind them.
        vmem_mib: the scoped VMEM the kernel asks for; the compiler's default when None (32 MiB on v6e).
    """

    queries: int
    keys: int
    columns: int
    slice: int
    ahead: int = 1
    behind: int = 1
    vmem_mib: int | None = None

    def __post_init__(self):
        if self.queries % self.columns or self.keys % self.slice or self.columns % 128 or self.slice % 128:
            raise ValueError(
                "a tile's queries must be a multiple of its columns and its keys of its slice, both multiples of 128; "
                f"got {self}"
            )

    @property
    def slices(self) -> int:
        return self.keys // self.slice


@dataclass(frozen=True)
class Limits:
    """The tiles to choose from for a generation and head_dim, and what they cost.

    Attributes:
        queries, keys: the most of each in a tile; queries of each head in it.
        area: the most queries times keys: straight-line code grows with it, and so does the time to compile it.
        columns: as in :class:`Blocks`; None for all the tile's queries at once.
        slices: the slices to choose from.
        ahead, behind: as in :class:`Blocks`.
        step: queries come in multiples of it (the width of the matrix unit).
        cycles: of 1024 logits, when nothing else is in the way.
        part_cycles: what each part of the pipeline costs besides (the matrix unit changes operands).
        vmem_mib: as in :class:`Blocks`.
        least: how many queries and keys there have to be.
    """

    queries: int
    keys: int
    area: int
    columns: int | None
    slices: tuple[int, ...]
    ahead: int
    behind: int
    step: int
    cycles: float
    part_cycles: float
    vmem_mib: int | None = None
    least: int = 0


# On the 256-wide matrix units of v6e and v7x, parts of 256 × 256 hide the loading of weights behind streaming keys
# where a head is 64 deep; at 128 that loading costs nothing, and whole rows of queries change operands least often.
_WIDE = {
    64: (Limits(1536, 3072, 5 * 2**19, 256, (256,), 4, 2, 256, 1.25, 6),),
    128: (Limits(3072, 4608, 11 * 2**20, None, (512, 256), 1, 1, 256, 1.5, 100),),
    256: (Limits(1536, 2048, 4 * 2**20, None, (512, 256), 1, 1, 256, 2.5, 100),),
}
# v6e has 128 MiB of vector memory: some of them let long sequences be cut in fewer pieces, each of which costs time.
# That code takes the compiler twice as long.
_LARGE = Limits(6912, 2048, 27 * 2**19, None, (512,), 1, 1, 256, 1.5, 170, vmem_mib=56, least=32_000)
# v4, v5e and v5p: 128-wide units and 16 MiB of scoped VMEM.
_NARROW = {
    64: (Limits(768, 2048, 3 * 2**19, 256, (512, 256), 1, 1, 256, 2.6, 60),),
    128: (Limits(1024, 2048, 2 * 2**20, None, (512, 256), 1, 1, 128, 5.3, 100),),
    256: (Limits(512, 1024, 2**19, None, (256,), 1, 1, 128, 10.5, 100),),
}
TABLE = {
    "v4": _NARROW,
    "v5e": _NARROW,
    "v5p": _NARROW,
    "v6e": {**_WIDE, 128: (*_WIDE[128], _LARGE)},
    "v7x": _WIDE,
}
SAFE = "v5e"  # for a generation that the table lacks: fits everywhere

# Cycles of starting and ending a tile, and of starting and ending a block of queries, per query.
_TILE_CYCLES = 150
_QUERY_CYCLES = 0.55


@functools.lru_cache(maxsize=256)
def fit(generation: str, queries: int, keys: int, head_dim: int, itemsize: int = 2) -> Blocks:
    """The tile that costs least for these lengths, with what lies beyond their ends.

    Args:
        generation: ``"v4"``, ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"v7x"``; others get the smallest tiles.
        queries, keys: how many of each.
        head_dim: after padding: 64 or a multiple of 128. Beyond 256 the kernel is not offered.
        itemsize: bytes of an element; 4-byte elements take half the queries.
    """
    return _best(generation, queries, keys, head_dim, itemsize)[0]


def _best(generation: str, queries: int, keys: int, head_dim: int, itemsize: int) -> tuple[Blocks, float]:
    """The tile and what :func:`_cycles` says of it."""
    together = heads_together(head_dim)
    costs = [
        (_cycles(blocks, limits, queries, keys, together), -blocks.queries, blocks)
        for limits in _limits(generation, min(queries, keys), head_dim, itemsize)
        for blocks in _candidates(limits)
    ]
    cycles, _, blocks = min(costs, key=lambda cost: cost[:2])
    return blocks, cycles


def estimated_cycles(generation: str, heads: int, queries: int, keys: int, head_dim: int) -> float:
    """A call's cycles with the tiles of :func:`fit`, by the table's model of them (bfloat16, bounded softmax).

    The model follows the bundle counts of ``python -m comfyui_tpu.bench attention`` (docs/attention.md says how well).
    """
    head_dim = padded_head_dim(head_dim)
    _, cycles = _best(generation, queries, keys, head_dim, 2)
    return math.ceil(heads / heads_together(head_dim)) * cycles


def padded_head_dim(width: int) -> int:
    """64, or the next multiple of 128 lanes: zeros change no logit and are cut off the values."""
    return 64 if width <= 64 else -(-width // 128) * 128


def heads_together(head_dim: int) -> int:
    """How many heads of a padded ``head_dim`` share 128 lanes, and so a tile."""
    return 2 if head_dim == 64 else 1


def _limits(generation: str, length: int, head_dim: int, itemsize: int) -> list[Limits]:
    rows = TABLE.get(generation, TABLE[SAFE])
    if head_dim > max(rows):
        raise ValueError(f"the attention kernel is made for head_dim up to {max(rows)}; got {head_dim}")
    found = rows[next(width for width in sorted(rows) if head_dim <= width)]
    found = [limits for limits in found if length >= limits.least]
    if itemsize <= 2:
        return found
    return [replace(limits, queries=limits.queries // 2, area=limits.area // 2) for limits in found]


def _candidates(limits: Limits) -> Iterator[Blocks]:
    for queries in range(limits.step, limits.queries + 1, limits.step):
        for size in limits.slices:
            for keys in range(size, min(limits.keys, limits.area // queries) + 1, size):
                columns = limits.columns or queries
                yield Blocks(queries, keys, columns, size, limits.ahead, limits.behind, limits.vmem_mib)


def _cycles(blocks: Blocks, limits: Limits, queries: int, keys: int, together: int) -> float:
    """About how long ``together`` heads take: what :class:`Limits` says of a tile, times the tiles."""
    columns = together * blocks.queries
    parts = blocks.slices * (columns // blocks.columns)
    tile = columns * blocks.keys / 1024 * limits.cycles + parts * limits.part_cycles + _TILE_CYCLES
    tiles = math.ceil(keys / blocks.keys)
    return math.ceil(queries / blocks.queries) * (tiles * tile + columns * _QUERY_CYCLES)


def generation_of(device_kind: str) -> str:
    """The generation in JAX's name of a device: ``"TPU v6 lite"`` → ``"v6e"``; the name itself when unknown."""
    names = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}
    names |= {"7x": "v7x", "v7x": "v7x", "v7": "v7x"}
    kind = device_kind.lower().removeprefix("tpu").strip()
    return names.get(kind, kind)
