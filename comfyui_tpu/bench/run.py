"""``python -m comfyui_tpu.bench run MODEL``: time a model's pipeline on the machine it runs on.

Unlike this room's other commands this one measures: what it prints was timed here, on the devices it names.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from comfyui_tpu.bench import measure, stages
from comfyui_tpu.bench.compiling import BenchError
from comfyui_tpu.comfy.model_lookup import find_local
from comfyui_tpu.models.common import OpenedModel, Task
from comfyui_tpu.plan.asked import asked
from comfyui_tpu.runtime.reporting import Reporter, reporting

SCHEMA = 1
MODELS = Path("ComfyUI/models/diffusers")
STEPS, REPEATS = 8, 3
PACKAGES = ("comfyui-tpu", "jax", "libtpu", "torch", "torchax", "diffusers", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint folder, a name in the models folder, or a Hugging Face repo id")
    parser.add_argument("--models", type=Path, default=MODELS, help="ComfyUI's models folder (default: %(default)s)")
    for name, text in (("height", "in pixels"), ("width", "in pixels"), ("frames", "frames of the video")):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: the sampler node's; small on a CPU)")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps, from 2 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the sampler node's)")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="timed runs after the warm-up (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="PATH", help="write the result as JSON ('-': to the terminal instead)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the report, ready for JSON.

    Raises:
        TPUError: the model cannot be found or run as asked. BenchError: the options or the devices do not allow it.
    """
    if options.steps < 2 or options.repeats < 1:
        raise BenchError(
            f"--steps must be at least 2 (the first one is not a typical one) and --repeats at least 1; got "
            f"{options.steps} and {options.repeats}."
        )
    devices = _devices()
    model = stages.open_checkpoint(_folder(options.model, options.models))
    task = _task(options, model, devices[0].platform == "cpu")
    runs = []
    for number in range(options.repeats + 1):
        runs.append(measure.time_run(model, task, number, stages.stages))
        name = f"timed run {number} of {options.repeats}" if number else "warm-up"
        print(f"{name}: {runs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return _report(options.model, model, task, devices, runs)


def _devices() -> tuple[jax.Device, ...]:
    if not os.environ.get("JAX_PLATFORMS") and not _has_device_files():
        # Without a TPU libtpu would look for one first, and complain at length.
        jax.config.update("jax_platforms", "cpu")
    try:
        return tuple(jax.devices())
    except RuntimeError as error:
        raise BenchError(
            f"JAX cannot use this machine's devices: {error} One process at a time can use a TPU: stop ComfyUI first."
        ) from error


def _has_device_files(root: Path = Path("/dev")) -> bool:
    """Whether there is something through which libtpu could reach chips."""
    return any(root.glob("accel[0-9]*")) or any(root.glob("vfio/[0-9]*"))


def _folder(model: str, models: Path) -> Path:
    """The checkpoint's folder: this command's user may name any folder, besides what a node's ``model_id`` may be."""
    if (Path(model) / "model_index.json").is_file():
        return Path(model)
    local = find_local(model, [models])
    if local is not None:
        return local
    from comfyui_tpu.comfy.hub import download_checkpoint

    repository, _, revision = model.partition("@")
    with reporting(_Progress()):
        return download_checkpoint(repository, revision or None)


class _Progress(Reporter):
    """Says on the terminal which file of a repository is being downloaded."""

    _stage = ""

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self.message(stage)


def _task(options: argparse.Namespace, model: OpenedModel, on_cpu: bool) -> Task:
    usual = stages.usual_task(model)
    return asked(options, stages.small_task(usual) if on_cpu else usual)


def _report(
    name: str, model: OpenedModel, task: Task, devices: tuple[jax.Device, ...], runs: list[measure.Times]
) -> dict[str, Any]:
    first, *timed = runs
    return {
        "schema": SCHEMA,
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        # A folder's name and not its path: this is to be shared.
        "model": Path(name).name if Path(name).is_dir() else name,
        "pipeline": type(model).__name__,
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform},
        "task": dataclasses.asdict(task),
        "plans": {component.spec.name: component.describe_plan() for component in model.components},
        "weights_bytes_per_device": {component.spec.name: component.bytes_per_device for component in model.components},
        "versions": versions(),
        "warm_up": dataclasses.asdict(first),
        "timed": [dataclasses.asdict(times) for times in timed],
        "summary": {stage: dataclasses.asdict(each) for stage, each in measure.summary(timed).items()},
        "peak_memory": measure.peak_memory(devices),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# --- the table to share -----------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join([*_heading(report), "", *_timed(report), "", *_warm_up(report), "", *_notes(report)])


def _heading(report: dict[str, Any]) -> list[str]:
    task, devices = report["task"], report["devices"]
    size = f"{task['width']} × {task['height']}" + (f" × {task['num_frames']}" if task["num_frames"] > 1 else "")
    kind = "CPU (no TPU)" if devices["platform"] == "cpu" else devices["kind"]
    return [
        f"### {report['model']} on {devices['count']} × {kind}",
        "",
        f"{size}, {task['num_inference_steps']} steps, guidance {task['guidance_scale']:g}; "
        f"measured {report['measured']} with `python -m comfyui_tpu.bench run`.",
    ]


def _timed(report: dict[str, Any]) -> list[str]:
    rows = ["| timed runs | median s | shortest | longest | times |", "|---|---|---|---|---|"]
    for stage, each in report["summary"].items():
        times = " | ".join(f"{each[key]:.3f}" for key in ("median", "shortest", "longest"))
        rows.append(f"| {stage} | {times} | {each['count']} |")
    return rows


def _warm_up(report: dict[str, Any]) -> list[str]:
    first = report["warm_up"]
    rows = ["| warm-up (not in the times above) | s |", "|---|---|"]
    rows += [f"| load {component} | {seconds:.2f} |" for component, seconds in first["loaded"].items()]
    rows += [f"| compile {program} | {seconds:.2f} |" for program, seconds in first["compiled"].items()]
    return [*rows, f"| whole warm-up run | {sum(first['stages'].values()):.2f} |"]


def _notes(report: dict[str, Any]) -> list[str]:
    plans = dict.fromkeys(report["plans"].values())
    named = (f"{', '.join(k for k, v in report['plans'].items() if v == plan)}: {plan}" for plan in plans)
    lines = [
        f"* plan: {'; '.join(named)}",
        f"* peak HBM a chip: {_memory(report['peak_memory'])}",
        "* compile: also fetching a program from the compile cache (COMFYUI_TPU_CACHE, an empty folder: all anew)",
    ]
    again = sorted({name for times in report["timed"] for name in (*times["loaded"], *times["compiled"])})
    if again:
        lines.append(f"* loaded or compiled again during the timed runs: {', '.join(again)}")
    return [*lines, "* " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())]


def _memory(memory: dict[str, int] | None) -> str:
    if memory is None:
        return "– (this backend keeps no count)"
    return f"{memory['peak'] / 2**30:.2f} of {memory['limit'] / 2**30:.2f} GiB"
