"""A reader for the text of an optimised HLO module: computations, instructions, loops, and where each came from."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_NO_FIGURE = 2**63 - 1  # the largest 64-bit number: how the compiler writes that it has no estimate


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: as written.
        shape: the text of the result's type.
        operands: names of instructions in the same computation.
        literal: what stands between the parentheses: a constant's value, a parameter's number.
        attributes: the rest of the line: called computations, backend config, metadata.
        root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool = False

    @functools.cached_property
    def estimated_cycles(self) -> int:
        """The compiler's own estimate for one execution; 0 where it has none."""
        return 0 if self.without_figure else self._written_cycles

    @property
    def without_figure(self) -> bool:
        """Whether the compiler wrote that it has no estimate for this operation."""
        return self._written_cycles >= _NO_FIGURE

    @functools.cached_property
    def _written_cycles(self) -> int:
        return _number(r'"estimated_cycles":"(\d+)"', self.attributes) or 0

    @property
    def op_name(self) -> str:
        """The JAX name stack the instruction came from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def stack_frame(self) -> int | None:
        return _number(r"stack_frame_id=(\d+)", self.attributes)

    @property
    def custom_call_target(self) -> str:
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def kernel_name(self) -> str:
        """Of a Pallas kernel: the name its ``pallas_call`` was given."""
        scopes = self.op_name.split("/")
        return scopes[-2] if len(scopes) > 1 and scopes[-1] == "pallas_call" else self.name.split(".")[0]

    @property
    def kernel_flops(self) -> int | None:
        """Of a Pallas kernel: the flop its own cost estimate says, if it has one."""
        return _number(r'"cost_estimate":\{"flops":"?(\d+)', self.attributes)

    def called(self, attribute: str) -> tuple[str, ...]:
        """Computations named by an attribute such as ``calls``, ``body`` or ``branch_computations``."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(_NAME.findall(match.group(1))) if match else ()

    def bytes(self, hbm_only: bool = False) -> int:
        """Size of the result without padding to tiles; of arrays in HBM alone if asked for."""
        return sum(size for size, in_hbm in _arrays(self.shape) if in_hbm or not hbm_only)

    def largest_array(self) -> int:
        """Bytes of the largest array in the result."""
        return max((size for size, _ in _arrays(self.shape)), default=0)

    def moved(self) -> int:
        """Bytes that this start of a copy moves: the smaller of what it reads and makes, for parts are copied too."""
        return min([size for size, _ in _arrays(self.shape)][:2], default=0)

    @property
    def channel(self) -> str:
        """What the parts of one collective have in common: its channel's number, as written."""
        match = re.search(r"\bchannel_id=\d+", self.attributes)
        return match.group() if match else ""

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Source and target of each transfer of a collective permutation."""
        match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", self.attributes)
        return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", match.group(1))) if match else ()

    def group(self, devices: int) -> tuple[int, ...]:
        """The devices of the first group of this collective, of ``devices`` in all."""
        return _first_group(self.attributes, devices)


@dataclass(frozen=True)
class Module:
    """An HLO module: computations by name (instructions in schedule order), its entry, and its source locations."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    frames: dict[int, tuple[str, str, int, int]]

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a while loop's body runs; None where it cannot be told.

        Either the compiler says so, or the condition compares the counter, which starts at 0, with one constant.
        """
        known = _number(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known is not None:
            return known
        limits = {
            int(instruction.literal)
            for name in loop.called("condition")
            for instruction in self.computations.get(name, ())
            if instruction.opcode == "constant" and instruction.literal.isdigit()
        }
        return limits.pop() if len(limits) == 1 else None

    def source(self, instruction: Instruction) -> tuple[tuple[str, str, int], ...]:
        """Where ``instruction`` came from: (file, function, line), innermost first."""
        found = []
        frame = instruction.stack_frame
        while frame and frame in self.frames and len(found) < 200:
            file, function, line, parent = self.frames[frame]
            found.append((file, function, line))
            frame = parent
        return tuple(found)


def parse(text: str) -> Module:
    """Read what ``compiled.as_text()`` returns.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, current, lines = "", "", []
    for line in text.splitlines():
        if current:
            if line.startswith("}"):
                computations[current] = tuple(filter(None, map(parse_instruction, lines)))
                current = ""
            else:
                lines.append(line)
            continue
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current, lines = header.group(2), []
            entry = current if header.group(1) else entry
    if not entry:
        raise ValueError("expected the text of an HLO module with an ENTRY computation; found none")
    return Module(entry, computations, _frames(text))


def parse_instruction(line: str) -> Instruction | None:
    """One instruction; None for a line that is none."""
    match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)
    if opcode is None or not rest[opcode.end() :].startswith("("):
        return None
    start = opcode.end()
    end = _closing(rest, start)
    literal, attributes = rest[start + 1 : end], rest[end + 1 :]
    operands = tuple(_NAME.findall(literal))
    return Instruction(match.group(2), opcode.group(), shape, operands, literal, attributes, bool(match.group(1)))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else None


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether in HBM) of each array of a possibly nested type."""
    for kind, dims, layout in _SHAPE.findall(shape):
        elements = math.prod(int(n) for n in dims.split(",") if n)
        # Memory space 1, S(1), is the vector memory on the chip; without a mark an array lies in HBM.
        yield math.ceil(elements * _bits(kind) / 8), "S(" not in layout


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    match = re.match(r"[a-z]+(\d+)", kind)
    return int(match.group(1)) if match else 0


def _first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """From the four ways in which HLO writes groups; all devices where none is written."""
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes)
    if explicit:
        return tuple(map(int, explicit.group(1).split(",")))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape = [int(n) for n in iota.group(2).split(",")]
        order = [int(n) for n in iota.group(3).split(",")] if iota.group(3) else None
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)
        return tuple(ids[: int(iota.group(1))].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        taking_part = set(re.findall(r"'([^']+)'", mesh.group(2)))
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return tuple(ids[tuple(slice(None) if axis in taking_part else 0 for axis in sizes)].reshape(-1).tolist())
    return tuple(range(devices))


def _frames(text: str) -> dict[int, tuple[str, str, int, int]]:
    """Stack frame id → (file, function, line, parent's id or 0)."""
    files, functions = _table(text, "FileNames"), _table(text, "FunctionNames")
    locations = {
        key: (files.get(_field(row, "file_name_id"), ""), functions.get(_field(row, "function_name_id"), ""), row)
        for key, row in _table(text, "FileLocations").items()
    }
    frames = {}
    for key, row in _table(text, "StackFrames").items():
        file, function, location = locations.get(_field(row, "file_location_id"), ("", "", ""))
        # Parents are written one higher than their ids, so that 1 is none.
        parent = max((_field(row, "parent_frame_id") or 1) - 1, 0)
        frames[key] = (file.strip('"'), function.strip('"'), _field(location, "line") or 0, parent)
    return frames


def _table(text: str, title: str) -> dict[int, str]:
    match = re.search(rf"^{title}\n((?:\d+ .*\n?)*)", text, re.MULTILINE)
    rows = match.group(1).splitlines() if match else []
    return {int(key): value for key, value in (row.split(" ", 1) for row in rows)}


def _field(row: str, name: str) -> int | None:
    return _number(rf"\b{name}=(\d+)", row)
