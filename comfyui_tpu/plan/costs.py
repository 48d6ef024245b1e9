"""The cost reader: where a compiled program spends its cycles, read from its optimised HLO.

Cycles of XLA's operations are the compiler's own estimates (``estimated_cycles``). Collectives, and copies between HBM
and vector memory that run beside the computation, are timed by their bytes; of these only what the computation has to
wait for counts. All of it is an estimate: nothing here was measured on a TPU.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from comfyui_tpu.plan import hlo
from comfyui_tpu.plan.hardware import HOP_SECONDS, Topology, collective_seconds

MATMUL, ATTENTION, ELEMENTWISE, RELAYOUT, COLLECTIVES = "matmul", "attention", "elementwise", "relayout", "collectives"
CATEGORIES = (MATMUL, ATTENTION, ELEMENTWISE, RELAYOUT, COLLECTIVES)
LABELS = {
    MATMUL: "matmul and convolution",
    ATTENTION: "attention",
    ELEMENTWISE: "elementwise and normalisation",
    RELAYOUT: "relayout and copies",
    COLLECTIVES: "collectives",
}

_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_COLLECTIVES += ("collective-broadcast",)
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all"}
# Operations that only move or repeat values.
_MOVES = {"copy", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "reshape", "transpose", "broadcast", "iota"}
_MOVES |= {"concatenate", "gather", "reverse", "bitcast-convert", "copy-start", "slice-start"}
_COPIES = {"copy", "reshape", "transpose", "concatenate"}
_READS_A_PART = {"dynamic-slice", "slice", "gather"}
_CALLS = ("while", "call", "conditional")
# Generic names for what runs beside the computation, and the attribute that says what does.
_STARTS = {"async-start": "calls", "call-start": "to_apply"}
# A collective that fusions on the TensorCore carry on while they compute: how the names of its first and last begin.
_FUSED_START, _FUSED_DONE = "async-collective-start", "async-collective-done"
_KERNEL = "tpu_custom_call"
_NORMS = ("layer_norm_", "rms_norm_")  # how the names of the kernels in ops/row_kernels.py begin
_HBM = "hbm"
_ATTENTION_FILES = r"/comfyui_tpu/ops/[a-z_]*(attention|splash)[a-z_]*\.py$"
# Between a model's own line and the operation lie lines of torch, torchax and JAX, which say little.
_MODEL_PACKAGES = ("/diffusers/", "/transformers/", "/comfyui_tpu/models/")

KernelCycles = Callable[[hlo.Instruction], float | None]


@dataclass(frozen=True)
class Operation:
    """One instruction of the program, with all its executions together.

    Attributes:
        name, opcode, shape: as in the HLO text.
        category: one of :data:`CATEGORIES`.
        cycles: of all executions.
        executions: how often it runs in one call of the program.
        module: the model's function and line it came from, such as ``"WanTransformerBlock.forward
            (transformer_wan.py:488)"``; where no line is known, the end of its JAX name; may be empty.
    """

    name: str
    opcode: str
    category: str
    cycles: float
    executions: int
    module: str
    shape: str


@dataclass
class Cost:
    """What one call of a program costs a chip.

    Attributes:
        operations: everything that takes time.
        hbm_bytes: moved between HBM and the chip.
        collective_bytes: sent or received in collectives, whether waited for or not.
        unknown_loops: loops whose length could not be told; their bodies count once.
        without_figure: operations that the compiler itself has no estimate for; they count as long as their bytes take.
        unknown_kernels: Pallas kernels, by name, without cycles and without a cost estimate; they count nothing.
        kernels_at_peak: Pallas kernels, by name, without cycles: their flop count as if at the matmul peak.
    """

    operations: list[Operation] = field(default_factory=list)
    hbm_bytes: float = 0
    collective_bytes: float = 0
    unknown_loops: int = 0
    without_figure: int = 0
    unknown_kernels: Counter = field(default_factory=Counter)
    kernels_at_peak: Counter = field(default_factory=Counter)

    @property
    def cycles(self) -> float:
        return sum(operation.cycles for operation in self.operations)

    def by_category(self) -> dict[str, float]:
        """Cycles of each category."""
        found = dict.fromkeys(CATEGORIES, 0.0)
        for operation in self.operations:
            found[operation.category] += operation.cycles
        return found

    def add(self, other: Cost, times: int) -> None:
        """``other``, ``times`` times."""
        self.operations += [
            dataclasses.replace(o, cycles=o.cycles * times, executions=o.executions * times) for o in other.operations
        ]
        self.hbm_bytes += other.hbm_bytes * times
        self.collective_bytes += other.collective_bytes * times
        self.unknown_loops += other.unknown_loops
        self.without_figure += other.without_figure
        self.unknown_kernels.update(other.unknown_kernels)
        self.kernels_at_peak.update(other.kernels_at_peak)


def no_kernels(instruction: hlo.Instruction) -> float | None:
    """Where nobody knows the kernels' cycles."""
    return None


def read(
    module: hlo.Module,
    topology: Topology,
    kernel_cycles: KernelCycles = no_kernels,
    devices: Sequence[int] | None = None,
) -> Cost:
    """The cost of one call of ``module`` on one chip of ``topology``.

    Args:
        kernel_cycles: cycles of one execution of a Pallas kernel (a ``tpu_custom_call``); None if unknown. Then its
            own cost estimate counts, at the matmul peak.
        devices: the program's devices in the order of its mesh, as numbers in the topology's list; that list when None.
    """
    devices = range(topology.devices) if devices is None else devices
    return _Reader(module, topology, kernel_cycles, devices).computation(module.entry)


class _Schedule:
    """The time on a chip, in cycles, and the transfers beside the computation.

    Transfers that take the same resource follow one another there: the memory's bandwidth, and each direction of each
    link between chips.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._free_at: dict[Hashable, float] = {}
        self._ready_at: dict[str, float] = {}

    def start(self, name: str, transfer: _Transfer) -> None:
        """A transfer called ``name`` begins on each of its resources as soon as that is free."""
        for resource, duration in transfer.takes.items():
            self._free_at[resource] = max(self.now, self._free_at.get(resource, 0.0)) + duration
        last = max((self._free_at[resource] for resource in transfer.takes), default=self.now)
        self._ready_at[name] = last + transfer.latency

    def wait_for(self, names: tuple[str, ...]) -> float:
        """How long until the transfer among ``names`` is done."""
        return max((max(0.0, self._ready_at.pop(name, 0.0) - self.now) for name in names), default=0.0)


@dataclass(frozen=True)
class _Transfer:
    """For how many cycles a transfer takes each resource, and how many pass until the last of it arrives."""

    takes: Mapping[Hashable, float]
    latency: float = 0.0


class _Reader:
    """Walks computations in the order in which the compiler scheduled them."""

    def __init__(
        self, module: hlo.Module, topology: Topology, kernel_cycles: KernelCycles, devices: Sequence[int]
    ) -> None:
        self.module = module
        self.topology = topology
        self.kernel_cycles = kernel_cycles
        self.devices = devices

    def computation(self, name: str) -> Cost:
        instructions = self.module.computations.get(name, ())
        shapes = {instruction.name: instruction for instruction in instructions}
        cost, schedule = Cost(), _Schedule()
        for instruction in instructions:
            if instruction.opcode in _FREE:
                continue
            cost.hbm_bytes += self._hbm_bytes(instruction, shapes)
            if instruction.opcode in _CALLS:
                inner, times = self._inner(instruction, cost)
                cost.add(inner, times)
                schedule.now += inner.cycles * times
                continue
            cycles = self._cycles(instruction, shapes, schedule, cost)
            schedule.now += cycles
            if cycles > 0:
                cost.operations.append(self._operation(instruction, shapes, cycles))
        return cost

    def _cycles(
        self, instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction], schedule: _Schedule, cost: Cost
    ) -> float:
        """How long the chip is busy with an instruction, or waits for it."""
        if instruction.opcode.endswith("-done"):
            return schedule.wait_for(instruction.operands)
        collective = self._collective(instruction)
        if collective is not None and instruction.name.startswith(_FUSED_DONE):
            return schedule.wait_for((collective.channel,))
        name, beside = instruction.name, instruction.opcode.endswith("-start")
        if collective is not None:
            cost.collective_bytes += self._payload(collective, self.topology.devices)
            transfer = self._over_links(collective)
            if name.startswith(_FUSED_START):
                name, beside = collective.channel, True
        elif beside:
            transfer = self._copy(instruction)
        else:
            return self._compute(instruction, shapes, cost)
        schedule.start(name, transfer)
        return 0.0 if beside else schedule.wait_for((name,))

    def _inner(self, instruction: hlo.Instruction, cost: Cost) -> tuple[Cost, int]:
        """The computation that a loop, call or branch runs, and how often."""
        if instruction.opcode == "while":
            trips = self.module.trip_count(instruction)
            cost.unknown_loops += trips is None
            return self.computation(instruction.called("body")[0]), 1 if trips is None else trips
        if instruction.opcode == "call":
            return self.computation(instruction.called("to_apply")[0]), 1
        names = instruction.called("branch_computations")
        names = names or (*instruction.called("true_computation"), *instruction.called("false_computation"))
        return max(map(self.computation, names), key=lambda branch: branch.cycles), 1

    def _copy(self, instruction: hlo.Instruction) -> _Transfer:
        """A copy between HBM and vector memory."""
        return _Transfer({_HBM: self._through_hbm(instruction.moved())})

    def _over_links(self, collective: hlo.Instruction) -> _Transfer:
        """A permutation takes the links on its devices' ways; any other collective all links, as long as it lasts."""
        clock, payload = self.topology.generation.clock, self._payload(collective, self.topology.devices)
        if collective.opcode.startswith("collective-permute"):
            routes = [self.topology.route(*(self.devices[each] for each in pair)) for pair in collective.pairs()]
            passing = Counter(link for route in routes for link in route)
            one = clock * payload / self.topology.generation.link_bandwidth
            latency = clock * HOP_SECONDS * max(map(len, routes), default=0)
            return _Transfer({link: times * one for link, times in passing.items()}, latency)
        grid = self.topology.grid_of([self.devices[each] for each in collective.group(self.topology.devices)])
        duration = clock * collective_seconds(collective.opcode, payload, grid, self.topology)
        return _Transfer(dict.fromkeys(self.topology.links, duration))

    @staticmethod
    def _payload(collective: hlo.Instruction, devices: int) -> int:
        """Bytes of the largest of a chip's operand and result in a collective."""
        result = collective.largest_array()
        return result * len(collective.group(devices)) if collective.opcode == "reduce-scatter" else result

    def _collective(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The collective that an instruction is or starts; None if it does neither.

        Those that run beside the computation under a generic name, on the TensorCore (``async-start``, fusions) or on a
        SparseCore (``call-start``), stand in a computation of their own.
        """
        if instruction.opcode.startswith(_COLLECTIVES):
            return instruction
        attribute = _STARTS.get(instruction.opcode)
        if instruction.opcode == "fusion" and instruction.name.startswith((_FUSED_START, _FUSED_DONE)):
            attribute = "calls"
        for name in instruction.called(attribute) if attribute else ():
            for inner in self.module.computations.get(name, ()):
                if (found := self._collective(inner)) is not None:
                    return found
        return None

    def _compute(self, instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction], cost: Cost) -> float:
        if instruction.without_figure:
            cost.without_figure += 1
            return self._through_hbm(self._hbm_bytes(instruction, shapes))
        if instruction.custom_call_target != _KERNEL:
            return instruction.estimated_cycles or self._moved(instruction, shapes)
        cycles = self.kernel_cycles(instruction)
        if cycles is not None:
            return cycles
        flops = instruction.kernel_flops
        if flops is None:
            cost.unknown_kernels[instruction.kernel_name] += 1
            return 0.0
        cost.kernels_at_peak[instruction.kernel_name] += 1
        return flops / self.topology.generation.flops_per_cycle

    def _moved(self, instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction]) -> float:
        """Of a move that the compiler gives no cycles: through HBM and back.

        Such are a reshape that its tiles make a copy, and an update in place, of which only the new part moves.
        """
        if instruction.opcode == "dynamic-update-slice":
            moved = min(instruction.bytes(hbm_only=True), self._part_written([], instruction, shapes))
        else:
            moved = instruction.bytes(hbm_only=True) if instruction.opcode in _COPIES else 0
        return self._through_hbm(2 * moved)

    def _through_hbm(self, moved: float) -> float:
        """Cycles that so many bytes take at HBM's full bandwidth."""
        generation = self.topology.generation
        return moved / generation.hbm_bandwidth * generation.clock

    def _operation(self, instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction], cycles: float) -> Operation:
        # To wait for a transfer is time spent on it.
        done = instruction.opcode.endswith("-done") and instruction.operands
        source = shapes.get(instruction.operands[0], instruction) if done else instruction
        return Operation(
            name=instruction.name,
            opcode=instruction.opcode,
            category=self.category(source),
            cycles=cycles,
            executions=1,
            module=self.origin(instruction),
            shape=instruction.shape.split("{")[0].lstrip("("),
        )

    def category(self, instruction: hlo.Instruction) -> str:
        """Which of :data:`CATEGORIES` an instruction belongs to."""
        if self._collective(instruction) is not None:
            return COLLECTIVES
        inside = self._opcodes(instruction)
        if instruction.opcode.endswith(("-start", "-done")) or inside <= _MOVES | _FREE:
            return RELAYOUT
        if "scaled_dot_product_attention" in instruction.op_name or self._from_attention(instruction):
            return ATTENTION
        kernel = instruction.custom_call_target == _KERNEL and not instruction.kernel_name.startswith(_NORMS)
        matmul = kernel or {"convolution", "dot"} & inside
        return MATMUL if matmul else ELEMENTWISE

    def _opcodes(self, instruction: hlo.Instruction) -> set[str]:
        """What an instruction does; of a fusion everything in it."""
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        called = [i for name in instruction.called("calls") for i in self.module.computations.get(name, ())]
        return set().union(*map(self._opcodes, called)) if called else {"fusion"}

    def _from_attention(self, instruction: hlo.Instruction) -> bool:
        return any(re.search(_ATTENTION_FILES, file) for file, _, _ in self.module.source(instruction))

    def origin(self, instruction: hlo.Instruction) -> str:
        """The innermost line of a model's own code, for people; of our operators also theirs."""
        operator = ""
        for file, function, line in self.module.source(instruction):
            name = file.rsplit("/", 1)[-1]
            if "/comfyui_tpu/ops/" in file:
                operator = operator or f"{name}:{line} in "
            elif any(package in file for package in _MODEL_PACKAGES):
                return f"{operator}{function} ({name}:{line})"
        return operator.removesuffix(" in ") or "/".join(instruction.op_name.split("/")[-2:])

    def _hbm_bytes(self, instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction]) -> int:
        """Bytes that one execution reads from and writes to HBM, as far as its arrays lie there."""
        if instruction.opcode in _CALLS or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode.endswith("-start"):
            return instruction.moved()
        fused = [i for name in instruction.called("calls") for i in self.module.computations.get(name, ())]
        written = instruction.bytes(hbm_only=True)
        if instruction.opcode in _READS_A_PART:
            return instruction.bytes() + written
        if self._root(fused, instruction) == "dynamic-update-slice":
            return 2 * min(written, self._part_written(fused, instruction, shapes))
        parts = _parts_read(fused)
        read = 0
        for index, name in enumerate(instruction.operands):
            if name in shapes:
                whole = shapes[name].bytes(hbm_only=True)
                read += min(whole, parts.get(index, whole))
        return read + written

    @staticmethod
    def _root(fused: list[hlo.Instruction], instruction: hlo.Instruction) -> str:
        return next((i.opcode for i in fused if i.root), instruction.opcode)

    @staticmethod
    def _part_written(
        fused: list[hlo.Instruction], instruction: hlo.Instruction, shapes: dict[str, hlo.Instruction]
    ) -> int:
        """Bytes of the part that an in-place update replaces; the whole result for anything else."""
        update = next((i for i in fused if i.opcode == "dynamic-update-slice"), None)
        names = {i.name: i for i in fused} if update else shapes
        update = update or instruction
        if update.opcode != "dynamic-update-slice" or len(update.operands) < 2:
            return instruction.bytes()
        part = names.get(update.operands[1])
        return part.bytes() if part else instruction.bytes()


def _parts_read(fused: list[hlo.Instruction]) -> dict[int, int]:
    """Parameter number → bytes, for parameters of a fusion that are only ever sliced."""
    found = {}
    for parameter in fused:
        if parameter.opcode != "parameter":
            continue
        users = [i for i in fused if parameter.name in i.operands]
        if users and all(i.opcode in _READS_A_PART for i in users):
            found[int(parameter.literal)] = sum(i.bytes() for i in users)
    return found
