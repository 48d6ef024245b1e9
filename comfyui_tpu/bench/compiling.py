"""Compiling jobs in processes of their own, and reading what the compiler wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from comfyui_tpu.bench.kernels import KERNEL_NAMES, Job
from comfyui_tpu.plan.bundles import DUMP_FLAGS, Schedule, read
from comfyui_tpu.plan.hardware import COMPILER_ENVIRONMENT

LONGEST_SECONDS = 1800


class BenchError(RuntimeError):
    """A job could not be compiled for a reason other than the size of its tiles."""


@dataclass(frozen=True)
class Compiled:
    """A compiled job.

    Attributes:
        schedule: None where the tiles do not fit into the vector memory; ``reason`` then says so.
        seconds: the compiler's time, for the program around the kernel as well.
        cycles_around: of the operations around the kernel (padding, means, norms), as XLA estimates them.
    """

    job: Job
    schedule: Schedule | None
    seconds: float = 0.0
    cycles_around: float = 0.0
    reason: str = ""


def compile_all(jobs: Iterable[Job], at_once: int, report: Callable[[str], None]) -> list[Compiled]:
    """Compile jobs, ``at_once`` of them at a time; ``report`` gets a line for each."""

    def run(job: Job) -> Compiled:
        done = compile_one(job)
        outcome = f"compiled in {done.seconds:.0f} s" if done.schedule else f"does not fit: {done.reason}"
        report(f"{job.kernel} {job.blocks} {outcome}")
        return done

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run, jobs))


def compile_one(job: Job) -> Compiled:
    """Compile one job in a process of its own.

    Raises:
        BenchError: the compiler is missing or refuses the program.
        BundleError: it wrote something else than expected.
    """
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-bench-", ignore_cleanup_errors=True) as folder:
        outcome = _outcome(job, folder)
        if "does_not_fit" in outcome:
            return Compiled(job, None, reason=outcome["does_not_fit"])
        return Compiled(
            job, read(folder, KERNEL_NAMES[job.kernel]), outcome["compile_seconds"], outcome["cycles_around"]
        )


def _outcome(job: Job, folder: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "comfyui_tpu.bench.compile_one"],
            input=json.dumps(job.to_json()),
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"compiling {job.kernel} with {job.blocks} took more than {LONGEST_SECONDS} s") from error
    if done.returncode:
        raise BenchError(f"compiling {job.kernel} with {job.blocks} failed: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: str) -> dict[str, str]:
    """No TPU is looked for, several compilers may run at once, and the compiler writes its schedules to ``folder``."""
    return {
        **COMPILER_ENVIRONMENT,
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": DUMP_FLAGS.format(folder=folder),
    }


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
