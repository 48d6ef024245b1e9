"""The attention kernels that are compared: how each is called, and how often each part of its schedule runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from comfyui_tpu.ops.splash_blocks import Blocks, fit, heads_together, padded_head_dim
from comfyui_tpu.plan.bundles import BundleError, Loop, Schedule, Span
from comfyui_tpu.plan.hardware import Topology
from comfyui_tpu.runtime.errors import PlanError

OURS, JAX_SPLASH, TOKAMAX_SPLASH = "ours", "jax_splash", "tokamax_splash"
PEERS = (JAX_SPLASH, TOKAMAX_SPLASH)
KERNEL_NAMES = {OURS: "splash_attention", **dict.fromkeys(PEERS, "splash_mha_fwd_no_residuals")}
EXPONENTIAL, MAXIMUM, CORE = "vpow2", "= vmax.", "/* core id */"


@dataclass(frozen=True)
class Shape:
    """One device's attention: ``heads`` × ``queries`` × ``keys``, ``head_dim`` deep, bfloat16."""

    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of both products at the true lengths; a multiply-add counts two."""
        return 4 * self.heads * self.queries * self.keys * self.head_dim


@dataclass(frozen=True)
class SplashBlocks:
    """Tile of a peer's kernel; ``compute`` is the part of a tile's keys taken at once."""

    queries: int
    keys: int
    compute: int


@dataclass(frozen=True)
class Job:
    """One compilation."""

    kernel: str
    topology: str
    shape: Shape
    blocks: Blocks | SplashBlocks

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Job:
        blocks = Blocks if values["kernel"] == OURS else SplashBlocks
        shape = Shape(**values["shape"])
        return Job(values["kernel"], values["topology"], shape, blocks(**values["blocks"]))

    @property
    def compiled_shape(self) -> Shape:
        """What is compiled: the peers take whole blocks only."""
        if self.kernel == OURS:
            return self.shape
        queries, keys = (
            math.ceil(length / block) * block
            for length, block in ((self.shape.queries, self.blocks.queries), (self.shape.keys, self.blocks.keys))
        )
        return replace(self.shape, queries=queries, keys=keys)

    @property
    def heads_together(self) -> int:
        """Heads that one step of the grid handles."""
        return heads_together(padded_head_dim(self.shape.head_dim)) if self.kernel == OURS else 1

    @property
    def query_blocks(self) -> int:
        return math.ceil(self.shape.queries / self.blocks.queries)

    @property
    def tiles(self) -> int:
        """Blocks of keys that a block of queries meets."""
        return math.ceil(self.shape.keys / self.blocks.keys)


@dataclass(frozen=True)
class Count:
    """What a schedule comes to, in cycles. A compiler estimate.

    Attributes:
        total: of the whole call.
        tile: of one tile, whatever runs once a tile included, and nothing that runs once a block of queries.
        limiting_unit: the unit with the largest share of its instructions used in the code for a tile.
        utilisation: that share of every unit.
        notes: what was assumed.
    """

    total: float
    tile: float
    limiting_unit: str
    utilisation: dict[str, float]
    notes: tuple[str, ...]


def our_blocks(topology: Topology, shape: Shape) -> Blocks:
    """The tile that production takes for a shape.

    Raises:
        PlanError: the kernel is not made for this head_dim.
    """
    try:
        return fit(topology.generation.name, shape.queries, shape.keys, padded_head_dim(shape.head_dim))
    except ValueError as error:
        raise PlanError(str(error)) from error


def splash_candidates(shape: Shape) -> list[SplashBlocks]:
    """Tiles to try with a peer's kernel: the best for long sequences on v6e, and ones that leave little padding."""
    wanted = [(2048, 2048), (1024, 2048), (_even(shape.queries, 2048), _even(shape.keys, 2304))]
    tiles = [(min(q, _up(shape.queries)), min(k, _up(shape.keys))) for q, k in wanted]
    return [SplashBlocks(q, k, _part(k)) for q, k in dict.fromkeys(tiles)]


def _up(length: int, step: int = 128) -> int:
    return math.ceil(length / step) * step


def _even(length: int, most: int) -> int:
    """The block of at most ``most`` that cuts ``length`` into as few and as equal pieces as possible."""
    return _up(math.ceil(length / math.ceil(length / most)))


def _part(keys: int) -> int:
    """The largest part of at most 1024 that divides a block of keys."""
    return max(part for part in range(128, min(keys, 1024) + 1, 128) if keys % part == 0)


def head_dim_bound(topology: Topology, head_dim: int) -> float:
    """The share of peak that attention can reach: Q·Kᵀ fills ``head_dim`` of the matrix unit's depth, P·V all of it."""
    depth = 256 if topology.generation.name in ("v6e", "v7x") else 128
    return 2 * head_dim / (math.ceil(head_dim / depth) * depth + head_dim)


def count(job: Job, schedule: Schedule, online: bool = False) -> Count:
    """The cycles of a compiled kernel.

    Args:
        job: what was compiled.
        schedule: the compiler's.
        online: count our kernel's exact online softmax instead of the bounded one.

    Raises:
        BundleError: the schedule is not built as this kernel is.
    """
    return _count_ours(job, schedule, online) if job.kernel == OURS else _count_splash(job, schedule)


def _count_ours(job: Job, schedule: Schedule, online: bool) -> Count:
    grid, steps = _grid(schedule, job, job.query_blocks)
    bounded, fallback = _softmaxes(schedule, grid)
    taken, other = (fallback, bounded) if online else (bounded, fallback)
    over_tiles = [loop for loop in schedule.inside(grid) if bounded in loop]
    if len(over_tiles) != (job.tiles > 1):
        raise BundleError(f"expected {int(job.tiles > 1)} loop over {job.tiles} tiles, found {len(over_tiles)}")
    for loop in over_tiles:
        if loop.trips not in (None, job.tiles):
            raise BundleError(f"expected {job.tiles} tiles, the loop over them runs {loop.trips} times")
    known = {grid: steps} | dict.fromkeys(over_tiles, job.tiles)
    weights, notes = _weights(schedule, known, {other: 0.0} | _first_copies(job, schedule, grid, bounded))
    tile = weights[over_tiles[0].slice].sum() / job.tiles if over_tiles else weights[taken.slice].sum()
    notes.append(f"the {'bounded' if online else 'online'} softmax, which the same program also holds, is not counted")
    in_vmem = [name for name in schedule.operands("vmem") if name.count(",") == 2 and "bf16" in name]
    if in_vmem:
        notes.append(f"at this size the compiler keeps in VMEM, and copies from there: {'; '.join(in_vmem)}")
    return _counted(schedule, weights, tile / steps, taken, notes)


def _count_splash(job: Job, schedule: Schedule) -> Count:
    grid, steps = _grid(schedule, job, job.query_blocks * job.tiles)
    main = min(_with_exponentials(schedule, grid), key=len, default=grid)
    ends = _first_and_last(schedule, grid, main) if job.tiles > 1 else ()
    weights, notes = _weights(schedule, {grid: steps}, dict.fromkeys(ends, 1 / job.tiles))
    tile = weights[(grid if ends else main).slice].sum() - sum(weights[end.slice].sum() for end in ends)
    if ends and ends[0] in main:
        main = Span(ends[0].stop, ends[1].start)  # tokamax: what is done for every tile has no branch of its own
    shape = job.compiled_shape
    if (shape.queries, shape.keys) != (job.shape.queries, job.shape.keys):
        notes.append(f"padded to {shape.queries} × {shape.keys}; the mask that needs is not counted")
    return _counted(schedule, weights, tile / steps, main, notes)


def _first_and_last(schedule: Schedule, grid: Loop, main: Span) -> tuple[Span, Span]:
    """Where a peer's kernel starts a block of queries and where it ends one, around what it does for every tile."""
    exponentials = [at for at in range(main.start, main.stop) if EXPONENTIAL in schedule.bundles[at]]
    branches = [branch for branch in schedule.branches if branch in grid]
    before = [branch for branch in branches if branch.stop <= exponentials[0]]
    after = [branch for branch in branches if branch.start > exponentials[-1]]
    if not before or not after:
        raise BundleError("expected code for the first, for every and for the last block of keys in a peer's kernel")
    return max(before, key=len), max(after, key=len)


def _counted(schedule: Schedule, weights: np.ndarray, tile: float, main: Span, notes: list[str]) -> Count:
    ran = np.zeros_like(weights)
    ran[main.slice] = weights[main.slice]
    utilisation = schedule.utilisation(ran)
    # Fills and spills are also loads and stores.
    limiting = max((unit for unit in utilisation if ":" not in unit), key=utilisation.get)
    return Count(float(weights.sum()), float(tile), limiting, utilisation, tuple(notes))


def _grid(schedule: Schedule, job: Job, of_a_head: int) -> tuple[Loop, int]:
    """The loop over the grid and the steps of one core: where a device has two, each is given half of the heads."""
    groups = math.ceil(job.shape.heads / job.heads_together)
    cores = 2 if CORE in schedule.bundles[0] else 1
    steps = math.ceil(groups / cores) * of_a_head
    if steps == 1:
        return Loop(0, len(schedule.bundles), 1), steps  # the compiler makes no loop of it
    grid = max(schedule.loops, key=len, default=None)
    if grid is None or not schedule.holds(grid, EXPONENTIAL):
        raise BundleError("expected a loop over the grid with exponentials in it")
    # Moving blocks in and out takes up to two more turns.
    if grid.trips is not None and not 0 <= grid.trips - steps <= 2:
        raise BundleError(f"expected {steps} steps of the grid, its loop runs {grid.trips} times")
    return grid, steps


def _with_exponentials(schedule: Schedule, grid: Loop) -> list[Span]:
    """Branches in the loop over the grid; one may hold all that is done for a step."""
    return [branch for branch in schedule.branches if branch in grid and schedule.holds(branch, EXPONENTIAL)]


def _softmaxes(schedule: Schedule, grid: Loop) -> tuple[Span, Span]:
    """Our kernel's two branches: the bounded softmax, and the online one, which takes maxima."""
    branches = _with_exponentials(schedule, grid)
    bounded = [branch for branch in branches if not schedule.holds(branch, MAXIMUM)]
    others = [branch for branch in branches if not any(each in branch for each in bounded)]
    online = [branch for branch in others if not any(each in branch for each in others if each != branch)]
    if len(bounded) != 1 or len(online) != 1:
        raise BundleError(
            f"expected a bounded and an online softmax in our kernel, found {len(bounded)} and {len(online)}"
        )
    return bounded[0], online[0]


def _first_copies(job: Job, schedule: Schedule, grid: Loop, bounded: Span) -> dict[Span, float]:
    """A head's first tile is asked for by its first block of queries alone."""
    found = [
        branch
        for branch in schedule.branches
        if branch in grid and branch.stop <= bounded.start and schedule.inside(branch)
    ]
    return dict.fromkeys(found[:1], 1 / job.query_blocks)


def _weights(schedule: Schedule, trips: dict[Loop, float], shares: dict[Span, float]) -> tuple[np.ndarray, list[str]]:
    """How often each bundle runs; loops are as ``trips`` says, else as the text says; branches always run else."""
    unknown = [loop for loop in schedule.loops if loop not in trips and loop.trips is None]
    weights = schedule.runs(
        lambda loop: trips.get(loop, loop.trips if loop.trips is not None else 1.0),
        lambda branch: shares.get(branch, 1.0),
    )
    counted = [loop for loop in unknown if weights[loop.start] > 0]
    return weights, [f"{len(counted)} loop(s) of unknown length are counted once"] if counted else []
