"""Taking times while a pipeline runs: stages and steps, loading and compiling, the devices' memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfyui_tpu.models.common import OpenedModel, StepInfo, Task
from comfyui_tpu.runtime.reporting import Reporter, reporting

STEP = "one denoising step"
WHOLE = "whole run"

Clock = Callable[[], float]
# A model, a task, the number of the run, what to call after each step → stages; see bench.stages.stages.
MakeStages = Callable[[OpenedModel, Task, int, Callable[[StepInfo], None]], dict[str, Callable[[dict], Any]]]


class Watch(Reporter):
    """Knows from the runtime's own reports how long loading and compiling took.

    Attributes:
        loaded: component → seconds from the report before its first tensor to its last tensor.
        compiled: program → seconds of tracing and compiling (or of fetching it from the compile cache).
    """

    def __init__(self, clock: Clock = time.perf_counter):
        self._clock = clock
        self._latest = clock()
        self._since: dict[str, float] = {}
        self.loaded: dict[str, float] = {}
        self.compiled: dict[str, float] = {}

    def check_cancelled(self) -> None:
        self._latest = self._clock()

    def message(self, text: str) -> None:
        now = self._latest = self._clock()
        verb, _, rest = text.partition(" ")
        if verb == "compiling":
            self._since[rest] = now
        elif verb == "compiled":
            label = rest.rpartition(" in ")[0]
            self.compiled[label] = self.compiled.get(label, 0.0) + now - self._since.pop(label, now)

    def progress(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage.startswith("loading "):
            name = stage.split()[1]  # what follows says which of its files
            # The first report comes after the first tensor: loading began at the report before it.
            start = self._since.setdefault(name, self._latest)
            if done >= total:
                self.loaded[name] = self.loaded.get(name, 0.0) + now - start
                del self._since[name]
        self._latest = now


@dataclass
class Times:
    """Seconds of one run.

    Attributes:
        stages: stage → seconds, loading and compiling within them included.
        steps: of each denoising step after the first one, which also carries the preparation.
        loaded, compiled: see :class:`Watch`.
    """

    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    loaded: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


def time_run(
    model: OpenedModel, task: Task, run: int, make_stages: MakeStages, clock: Clock = time.perf_counter
) -> Times:
    """Run the whole pipeline once. Every stage returns its result in the host's memory: nothing is still running."""
    step_ends: list[float] = []
    times, results = Times(), {}
    with reporting(Watch(clock)) as watch:
        for name, work in make_stages(model, task, run, lambda info: step_ends.append(clock())).items():
            start = clock()
            results[name] = work(results)
            times.stages[name] = clock() - start
    times.steps = [end - before for before, end in itertools.pairwise(step_ends)]
    times.loaded, times.compiled = watch.loaded, watch.compiled
    return times


@dataclass(frozen=True)
class Spread:
    """Median, shortest and longest of ``count`` measured times, in seconds."""

    median: float
    shortest: float
    longest: float
    count: int


def spread(seconds: list[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def summary(runs: list[Times]) -> dict[str, Spread]:
    """What the timed runs came to, by stage; a denoising step and the whole run have lines of their own."""
    found: dict[str, Spread] = {}
    for name in runs[0].stages:
        steps = [seconds for times in runs for seconds in times.steps]
        if name == "denoise" and steps:
            found[STEP] = spread(steps)
        found[name] = spread([times.stages[name] for times in runs])
    found[WHOLE] = spread([times.seconds for times in runs])
    return found


def peak_memory(devices: tuple) -> dict[str, int] | None:
    """``{"peak": bytes, "limit": bytes}`` of the fullest device since this process began; None where nobody counts."""
    peaks = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" not in stats:
            return None
        peaks.append((int(stats["peak_bytes_in_use"]), int(stats.get("bytes_limit", 0))))
    peak, limit = max(peaks)
    return {"peak": peak, "limit": limit}
