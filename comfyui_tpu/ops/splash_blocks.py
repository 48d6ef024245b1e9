"""Tile sizes of the attention kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Blocks:
    """How a tile is cut.

    Attributes:
        queries: queries in a tile, a multiple of ``columns``.
        keys: keys in a tile, a multiple of ``slice``.
        columns: queries that one part of the pipeline handles.
        slice: keys that one part of the pipeline handles.
        ahead: how many parts the logits run ahead of their exponentials.
        behind: how many parts the values follow behind them.
    """

    queries: int
    keys: int
    columns: int
    slice: int
    ahead: int = 1
    behind: int = 1

    def __post_init__(self):
        if self.queries % self.columns or self.keys % self.slice or self.columns % 128 or self.slice % 16:
            raise ValueError(
                "a tile's queries must be a multiple of its columns (multiples of 128), its keys of its slice "
                f"(a multiple of 16); got {self}"
            )

    @property
    def slices(self) -> int:
        return self.keys // self.slice


def largest_waste_slices(keys: int, blocks: Blocks) -> int:
    """How many slices of the last tile are, at least in part, beyond the end of ``keys``."""
    beyond = -keys % blocks.keys
    return -(-beyond // blocks.slice)


def fit(blocks: Blocks | None, queries: int, keys: int, head_dim: int, itemsize: int) -> Blocks:
    return blocks
