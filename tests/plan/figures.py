"""Steps of the real models and Wan's decoding by the compiler's estimate, at full depth and size, for the guard.

``python -m tests.plan.figures`` compiles them all (minutes) and writes ``figures.json`` beside this file.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

STORED = Path(__file__).with_suffix(".json")
TOPOLOGY = "v6e:2x4"
# Wan 2.2's experts run Wan 2.1's program but for the width of its first layer. The dearest first.
PROGRAMS = (
    ("wan2.1-t2v-14b", "decode_next"),
    ("wan2.1-t2v-14b", "denoise"),
    ("cogvideox1.5-5b", "denoise"),
    ("flux.2-dev", "denoise"),
)


def versions() -> dict[str, str]:
    from comfyui_tpu.plan.estimate import PACKAGES

    return {package: importlib.metadata.version(package) for package in PACKAGES}


def measured(model: str, method: str) -> dict:
    """A program's seconds and cycles (a step's; all chunks' together), and how long the compiler took."""
    from comfyui_tpu.plan import catalogue, hardware
    from comfyui_tpu.plan.estimate import Job, estimate
    from comfyui_tpu.plan.rehearsal import open_model, rehearse

    topology, entry = hardware.parse(TOPOLOGY), catalogue.entry(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = catalogue.write(entry.configs, Path(temporary))
        calls = rehearse(open_model(folder, hardware.describe_devices(topology)), entry.task)
        (wanted,) = [index for index, call in enumerate(calls) if call.method == method]
        (program,) = estimate(Job(folder, entry.task, topology), calls, wanted=[wanted], use_cache=False, workers=1)
    times = entry.task.num_inference_steps if method == "denoise" else 1
    cycles = {category: number * program.calls / times for category, number in program.cycles.items()}
    return {
        "seconds": round(sum(cycles.values()) / topology.generation.clock, 4),
        "million_cycles": {category: round(number / 1e6, 1) for category, number in cycles.items()},
        "plan": calls[wanted].module.plan.name,
        "warnings": list(program.warnings),
        "compile_seconds": round(program.compile_seconds),
    }


def name_of(model: str, method: str) -> str:
    return f"{model} {method}"


def all_measured() -> dict[str, dict]:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.starmap(measured, PROGRAMS, chunksize=1)
    return {name_of(*program): figures for program, figures in zip(PROGRAMS, found, strict=True)}


if __name__ == "__main__":
    import tests.plan.conftest  # noqa: F401  the compiler's settings

    found = {"note": "compiler estimates, nothing measured on a TPU", "topology": TOPOLOGY, "versions": versions()}
    STORED.write_text(json.dumps({**found, "programs": all_measured()}, indent=2) + "\n", encoding="utf-8")
