"""Steps of the real models by the compiler's estimate, at full depth and size: what the regression guard compares.

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
# Wan 2.2's experts run Wan 2.1's program but for the width of its first layer.
MODELS = ("wan2.1-t2v-14b", "cogvideox1.5-5b", "flux.2-dev")


def versions() -> dict[str, str]:
    from comfyui_tpu.plan.estimate import PACKAGES

    return {package: importlib.metadata.version(package) for package in PACKAGES}


def measured(model: str) -> dict:
    """A step's seconds and cycles, and how long the compiler took, for the catalogue's usual task."""
    from comfyui_tpu.plan import catalogue, hardware
    from comfyui_tpu.plan.estimate import Job, estimate
    from comfyui_tpu.plan.rehearsal import open_model, rehearse
    from comfyui_tpu.plan.report import assemble

    topology, entry = hardware.parse(TOPOLOGY), catalogue.entry(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = catalogue.write(entry.configs, Path(temporary))
        opened = open_model(folder, hardware.describe_devices(topology))
        calls = rehearse(opened, entry.task)
        wanted = [index for index, call in enumerate(calls) if call.components[0].startswith("transformer")]
        job = Job(folder, entry.task, topology)
        programs = estimate(job, calls, wanted=wanted, use_cache=False, workers=1)
        found = assemble(model, opened, topology, entry.task, programs)
    return {
        "seconds_per_step": round(found.seconds_per_step, 4),
        "million_cycles": {category: round(cycles / 1e6, 1) for category, cycles in found.step_cycles().items()},
        "plan": found.plans["transformer"],
        "warnings": [warning for program in programs for warning in program.warnings],
        "compile_seconds": round(found.compile_seconds),
    }


def all_measured() -> dict[str, dict]:
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return dict(zip(MODELS, pool.map(measured, MODELS, chunksize=1), strict=True))


if __name__ == "__main__":
    import tests.plan.conftest  # noqa: F401  the compiler's settings

    found = {"note": "compiler estimates, nothing measured on a TPU", "topology": TOPOLOGY, "versions": versions()}
    STORED.write_text(json.dumps({**found, "models": all_measured()}, indent=2) + "\n", encoding="utf-8")
