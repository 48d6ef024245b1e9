"""A reader for the TPU compiler's final schedule of a kernel: its bundles, loops, branches and used units.

The compiler writes them when ``LIBTPU_INIT_ARGS`` says ``DUMP_FLAGS`` before JAX starts. A bundle is one very long
instruction word and takes one cycle, so that a kernel's time is the sum over its bundles of how often each runs: a
*compiler estimate*, which knows nothing of waiting for memory.

Every ``sbr.rel`` names the region it jumps to. A jump back is the end of a loop, a jump forward skips the code between;
the bundles right after a branch run either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The expression keeps the hundreds of megabytes of the compiler's earlier passes off the disk.
DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.*"
DELAY_SLOTS = (
    4  # v7x has between one and six; counting four there moves a few cycles between a loop and what follows it
)

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{", re.MULTILINE)
_TARGET = re.compile(r" *\w+ +(?:LB|PF):")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?)%(\w+)\))? target = \$region(\d+)")
_REGION = re.compile(r"\bStart(?:/End empty)? region (\d+)")
_OPERAND = re.compile(r"inlined_call_operand\.(\w+) \[shape: (\w+\[[\d,]*\]), index: \d+, kind: (\w+)")


class BundleError(ValueError):
    """A dump is not what its reader expects."""


@dataclass(frozen=True)
class Span:
    """Bundles ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, other: Span) -> bool:
        return self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True)
class Loop(Span):
    """A loop's body.

    Attributes:
        trips: how often it runs each time it is reached; None where the text does not say.
    """

    trips: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A kernel as the hardware will run it.

    Attributes:
        bundles: the text of each.
        loops: outer ones before those inside them.
        branches: code that may be skipped, in the order of the text.
        units: names of the units in the order of the compiler's table.
        capacity: ``[units]``, how many instructions of each a bundle can hold.
        used: ``[bundles, units]``.
    """

    bundles: tuple[str, ...]
    loops: tuple[Loop, ...]
    branches: tuple[Span, ...]
    units: tuple[str, ...]
    capacity: np.ndarray
    used: np.ndarray

    def holds(self, span: Span, word: str) -> bool:
        """Whether a bundle of ``span`` has ``word`` in its text."""
        return any(word in text for text in self.bundles[span.slice])

    def inside(self, span: Span) -> tuple[Loop, ...]:
        """Loops within ``span``, without itself."""
        return tuple(loop for loop in self.loops if loop in span and (loop.start, loop.stop) != (span.start, span.stop))

    def operands(self, space: str) -> tuple[str, ...]:
        """Kinds and shapes of the kernel's operands and results that the compiler placed in ``"hbm"`` or ``"vmem"``."""
        found = _OPERAND.findall(self.bundles[0])
        return tuple(f"{kind} {shape}" for where, shape, kind in found if where == space)

    def utilisation(self, weights: np.ndarray) -> dict[str, float]:
        """Share of each unit's instructions that is used, with ``weights`` ``[bundles]`` as how often each runs."""
        shares = weights @ self.used / (weights.sum() * self.capacity)
        return dict(zip(self.units, map(float, shares), strict=True))

    def runs(self, trips: Callable[[Loop], float], share: Callable[[Span], float]) -> np.ndarray:
        """How often each bundle runs, ``[bundles]``.

        Args:
            trips: of each loop.
            share: of each branch: how often of the times it is reached it is not skipped.
        """
        weights = np.ones(len(self.bundles))
        for loop in self.loops:
            weights[loop.slice] *= trips(loop)
        for branch in self.branches:
            weights[branch.slice] *= share(branch)
        return weights


def read(folder: str | Path, kernel: str) -> Schedule:
    """The schedule of the kernel named ``kernel`` (as given to ``pallas_call``) in a dump folder.

    Raises:
        BundleError: there is none, or its two files do not fit together.
    """
    folder = Path(folder)
    names = re.compile(rf"\d+-{re.escape(kernel)}(?:\.\d+)?-\d+-final_bundles\.txt")
    files = sorted(path for path in folder.glob("*-final_bundles.txt") if names.fullmatch(path.name))
    if not files:
        raise BundleError(f"expected the final bundles of a kernel {kernel!r} in {folder}, found none")
    bundles = max(files, key=lambda path: path.stat().st_size)
    prefix = bundles.name.rsplit("-", 2)[0]
    tables = sorted(folder.glob(f"{prefix}-*-final_hlo-static-per-bundle-utilization.txt"))
    if not tables:
        raise BundleError(f"expected a table of used units beside {bundles.name}, found none")
    return parse(bundles.read_text(encoding="utf-8"), tables[-1].read_text(encoding="utf-8"))


def parse(text: str, table: str) -> Schedule:
    """A schedule from the texts of its bundles and of its table of used units.

    Raises:
        BundleError: they are malformed or of different kernels.
    """
    bundles = split(text)
    units, capacity, used = _used_units(table)
    if not bundles or len(bundles) != len(used):
        raise BundleError(f"expected as many bundles as rows of used units, got {len(bundles)} and {len(used)}")
    loops, branches = _jumps(bundles)
    return Schedule(bundles, loops, branches, units, capacity, used)


def split(text: str) -> tuple[str, ...]:
    """The texts of the bundles, some of which have several lines."""
    starts = [match.start() for match in _BUNDLE.finditer(text)]
    return tuple(text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True))


def _used_units(table: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    lines = [line for line in table.splitlines() if line.strip() and not line.startswith("==")]
    units = tuple(name.strip() for name in lines[0].split(",")) if lines else ()
    rows = [line.split() for line in lines[1:]]
    if not rows or any(len(row) != len(units) or not all(n.isdigit() for n in row) for row in rows):
        raise BundleError("expected a table of used units: their names, their capacities, and a row for each bundle")
    numbers = np.array(rows, dtype=np.int64)
    return units, numbers[0], numbers[1:]


def _jumps(bundles: tuple[str, ...]) -> tuple[tuple[Loop, ...], tuple[Span, ...]]:
    targets = {int(region): at for at, text in enumerate(bundles) for region in _REGION.findall(text)}
    # The way out of the kernel, for a core that has nothing to do, has no name in the text.
    out = len(bundles) - 1 if _TARGET.match(bundles[-1]) else None
    loops, branches = [], []
    for at, text in enumerate(bundles):
        for negated, predicate, region in _BRANCH.findall(text):
            target, behind = targets.get(int(region), out), _behind(bundles, at)
            if target is None:
                raise BundleError(f"a branch jumps to region {region}, which the text does not have")
            if target <= at:
                trips = _trips("".join(bundles[target:behind]), predicate) if negated else None
                loops.append(Loop(target, behind, trips))
            elif target > behind:
                branches.append(Span(behind, target))
    return tuple(sorted(loops, key=lambda loop: (loop.start, -loop.stop))), tuple(branches)


def _behind(bundles: tuple[str, ...], branch: int) -> int:
    """The first bundle after a branch that does not run when it is taken."""
    slots = bundles[branch + 1 : branch + 1 + DELAY_SLOTS]
    return branch + 1 + next((n for n, text in enumerate(slots) if _TARGET.match(text)), len(slots))


def _trips(body: str, predicate: str) -> int | None:
    """Of a loop that counts from zero and ends when ``predicate`` holds; None unless bound and step are constants."""
    test = re.search(rf"%{predicate} = scmp\.ge\.s32\.totalorder %(\w+), (\d+)", body)
    step = test and re.search(rf"%{test.group(1)} = sadd\.s32 (\d+), ", body)
    return math.ceil(int(test.group(2)) / int(step.group(1))) if step and int(step.group(1)) else None
