"""A model's estimate as a whole: does it fit, how long do a step and a video take, and where does the time go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfyui_tpu.models.common import OpenedModel, Task
from comfyui_tpu.plan.costs import CATEGORIES
from comfyui_tpu.plan.estimate import ProgramEstimate
from comfyui_tpu.plan.hardware import Topology

STEP_COMPONENTS = ("transformer", "transformer_2")
SCHEMA = 1


@dataclass(frozen=True)
class ModelEstimate:
    """Everything the planner found out about a model, a task and a topology.

    Attributes:
        model: its name, for people.
        weights: component → bytes of weights on each chip.
        plans: component → its plan's name.
        programs: in the order in which the task first calls them.
    """

    model: str
    topology: Topology
    task: Task
    weights: dict[str, int]
    plans: dict[str, str]
    programs: tuple[ProgramEstimate, ...]

    # --- memory

    @property
    def hbm_bytes_per_chip(self) -> int:
        """With the weights of all components resident, at the moment that needs most."""
        return sum(self.weights.values()) + self.largest.working_bytes

    @property
    def largest(self) -> ProgramEstimate:
        """The program with the largest activations."""
        return max(self.programs, key=lambda program: program.working_bytes)

    @property
    def alone_bytes(self) -> int:
        """What the neediest component takes when it is alone: the others left, as they do when memory runs short."""
        return max(
            self.weights[component] + program.working_bytes
            for program in self.programs
            for component in program.components
        )

    @property
    def fits(self) -> bool:
        """Whether it runs at all: each component on its own."""
        return self.missing_bytes <= 0 and not any(program.failure for program in self.programs)

    @property
    def fits_resident(self) -> bool:
        """Whether all components stay loaded at once."""
        return self.fits and self.hbm_bytes_per_chip <= self.topology.generation.hbm_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the neediest component goes past a chip's memory (negative: what is left)."""
        return self.alone_bytes - self.topology.generation.hbm_bytes

    def hbm_map(self) -> dict[str, int]:
        """What lies in a chip's HBM at the worst moment: bytes by use."""
        return {
            **{f"{name} weights": size for name, size in self.weights.items()},
            f"activations of {self.largest.label}": self.largest.working_bytes,
        }

    # --- time

    def seconds(self, program: ProgramEstimate) -> float:
        """Of one call."""
        return program.total_cycles / self.topology.generation.clock

    def phase_seconds(self) -> dict[str, float]:
        """Seconds that each component computes for the whole task."""
        found: dict[str, float] = {}
        for program in self.programs:
            name = program.components[0]
            found[name] = found.get(name, 0.0) + program.calls * self.seconds(program)
        return found

    @property
    def step_programs(self) -> tuple[ProgramEstimate, ...]:
        return tuple(program for program in self.programs if program.components[0] in STEP_COMPONENTS)

    def _per_step(self, program: ProgramEstimate) -> float:
        return program.calls / self.task.num_inference_steps

    @property
    def seconds_per_step(self) -> float:
        """One denoising step as the user sees it, both guidance branches included."""
        return sum(self._per_step(program) * self.seconds(program) for program in self.step_programs)

    @property
    def seconds_per_task(self) -> float:
        """All programs of a picture or video; the time between them, on the host, is not in it."""
        return sum(self.phase_seconds().values())

    def step_cycles(self) -> dict[str, float]:
        """Cycles of one step by category."""
        found = dict.fromkeys(CATEGORIES, 0.0)
        for program in self.step_programs:
            for category, cycles in program.cycles.items():
                found[category] += cycles * self._per_step(program)
        return found

    @property
    def step_flops(self) -> float:
        return sum(program.flops * self._per_step(program) for program in self.step_programs)

    @property
    def mfu(self) -> float:
        """Share of the chips' bfloat16 peak that the step's matmuls reach."""
        peak = self.topology.devices * self.topology.generation.peak_flops
        return self.step_flops / (peak * self.seconds_per_step) if self.seconds_per_step else 0.0

    def roofline_seconds(self) -> dict[str, float]:
        """How long a step takes at least if only one thing limits it: matmuls, or this program's HBM traffic."""
        generation = self.topology.generation
        traffic = sum(program.hbm_traffic_bytes * self._per_step(program) for program in self.step_programs)
        return {
            "compute": self.step_flops / (self.topology.devices * generation.peak_flops),
            "memory": traffic / generation.hbm_bandwidth,
        }

    @property
    def compile_seconds(self) -> float:
        """Tracing and compiling every program once, one after the other, on the machine that did it."""
        return sum(program.trace_seconds + program.compile_seconds for program in self.programs)

    def warnings(self) -> list[str]:
        compiled = {component for program in self.programs for component in program.components}
        missing = sorted(set(self.weights) - compiled)
        left_out = [f"Not compiled, and in no time or activation above: {', '.join(missing)}."] if missing else []
        return left_out + [warning for program in self.programs for warning in program.warnings]


def assemble(
    name: str, model: OpenedModel, topology: Topology, task: Task, programs: list[ProgramEstimate]
) -> ModelEstimate:
    """The estimate of ``model`` from those of its programs."""
    return ModelEstimate(
        model=name,
        topology=topology,
        task=task,
        weights={component.spec.name: component.bytes_per_device for component in model.components},
        plans={component.spec.name: component.plan.name for component in model.components},
        programs=tuple(programs),
    )


def to_json(estimate: ModelEstimate) -> dict[str, Any]:
    """The estimate as JSON values; times in seconds, memory in bytes of one chip."""
    generation = estimate.topology.generation
    # A program that was not compiled has no time.
    timed = not any(program.failure for program in estimate.programs)
    return {
        "schema": SCHEMA,
        "note": "compiler estimate, not measured on a TPU",
        "model": estimate.model,
        "topology": estimate.topology.name,
        "devices": estimate.topology.devices,
        "task": dataclasses.asdict(estimate.task),
        "plans": estimate.plans,
        "fits": estimate.fits,
        "fits_resident": estimate.fits_resident,
        "hbm_bytes_per_chip": estimate.hbm_bytes_per_chip,
        "hbm_bytes_available": generation.hbm_bytes,
        "hbm_bytes_missing": max(estimate.missing_bytes, 0),
        "hbm_map": estimate.hbm_map(),
        "seconds_per_step_estimate": estimate.seconds_per_step if timed else None,
        "seconds_per_task_estimate": estimate.seconds_per_task if timed else None,
        "seconds_by_component": estimate.phase_seconds(),
        "cycles": estimate.step_cycles(),
        "flops_per_step": estimate.step_flops,
        "roofline_seconds": estimate.roofline_seconds(),
        "mfu_estimate": estimate.mfu if timed else None,
        "compile_seconds": estimate.compile_seconds,
        "assumptions": {
            "clock_hz": generation.clock,
            "peak_flops": generation.peak_flops,
            "hbm_bytes_per_second": generation.hbm_bandwidth,
            "link_bytes_per_second_one_way": generation.link_bandwidth,
        },
        "warnings": estimate.warnings(),
        "programs": [_program_json(estimate, program) for program in estimate.programs],
    }


def _program_json(estimate: ModelEstimate, program: ProgramEstimate) -> Mapping[str, Any]:
    return {
        **dataclasses.asdict(program),
        "seconds_per_call": estimate.seconds(program),
        "working_bytes": program.working_bytes,
    }
