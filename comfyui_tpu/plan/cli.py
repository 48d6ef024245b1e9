"""The planner's command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfyui_tpu.models.common import Task
from comfyui_tpu.plan import catalogue, hardware, html, table
from comfyui_tpu.plan.alternatives import topologies_that_fit
from comfyui_tpu.plan.asked import asked
from comfyui_tpu.plan.choose import choose
from comfyui_tpu.plan.estimate import AUTO, EFFORTS, Job, estimate
from comfyui_tpu.plan.rehearsal import Call, open_model, rehearse, transformer_plans
from comfyui_tpu.plan.report import SCHEMA, ModelEstimate, assemble, to_json
from comfyui_tpu.runtime import plan_choice
from comfyui_tpu.runtime.checkpoint import read_config
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, PlanError
from comfyui_tpu.runtime.files import write_text

OK, FAILED, DOES_NOT_FIT = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 fits, 2 does not fit, 1 anything else went wrong."""
    options = _parser().parse_args(arguments)
    try:
        with _checkpoint(options.model, options.blocks) as (folder, task):
            return _plan(options, folder, asked(options, task))
    except (CheckpointError, InvalidInput, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_tpu.plan",
        description="Compile a model for a TPU that need not be there, and report memory and time as estimated by the "
        "TPU compiler. Nothing is measured on a TPU. Exit code 2: the model does not fit.",
    )
    parser.add_argument("model", help=f"{', '.join(catalogue.CATALOGUE)}, or a checkpoint folder")
    parser.add_argument("--topology", default="v6e:2x4", help="generation and shape (default: %(default)s)")
    parser.add_argument("--height", type=int, help="in pixels")
    parser.add_argument("--width", type=int, help="in pixels")
    parser.add_argument("--frames", type=int, help="frames of the video")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale; at most 1 runs without the negative branch")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="TOPOLOGY_OR_JSON",
        help="more topologies, or files that --json wrote, to show side by side",
    )
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--plan", metavar="NAME", help="how the transformers are spread over the chips")
    plans.add_argument(
        "--plans",
        action="store_true",
        help="estimate all such plans side by side, and keep the best as this user's choice for that kind of TPU",
    )
    parser.add_argument("--json", metavar="PATH", help="write the estimate as JSON ('-': to the terminal instead)")
    parser.add_argument("--html", metavar="PATH", help="write the estimate as one self-contained page")
    parser.add_argument(
        "--effort",
        choices=(AUTO, *EFFORTS),
        default=AUTO,
        help="how hard the compiler tries (default: as in production, less for stock autoencoders, which take it long)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="COMPONENT",
        help="compile only these components, such as transformer, for a quick look",
    )
    parser.add_argument("--blocks", type=int, help="cut the transformers to this many blocks of each kind")
    parser.add_argument("--no-cache", action="store_true", help="compile again what an earlier run compiled")
    return parser


@contextlib.contextmanager
def _checkpoint(model: str, blocks: int | None) -> Iterator[tuple[Path, Task]]:
    """A folder with the configs of ``model``, and its usual task."""
    folder = Path(model)
    if folder.is_dir() and blocks is None:
        yield folder, _usual_task(folder)
        return
    if folder.is_dir():
        raise PlanError("--blocks cuts models of the catalogue; a folder is planned as it is.")
    entry = catalogue.entry(model)
    configs = entry.configs if blocks is None else catalogue.with_blocks(entry.configs, blocks)
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-plan-") as temporary:
        yield catalogue.write(configs, Path(temporary) / model), entry.task


def _usual_task(folder: Path) -> Task:
    """The task of the first catalogue model of the same pipeline."""
    pipeline = read_config(folder, "model_index.json").get("_class_name")
    for entry in catalogue.CATALOGUE.values():
        if entry.configs["model_index.json"]["_class_name"] == pipeline:
            return entry.task
    raise CheckpointError(f"{folder} is a checkpoint for {pipeline}, which the planner does not know.")


def _plan(options: argparse.Namespace, folder: Path, task: Task) -> int:
    topology = hardware.parse(options.topology)
    others = [name for name in options.compare if not name.endswith(".json")]
    topologies = [topology, *map(hardware.parse, others)]
    saved = [_saved(Path(name)) for name in options.compare if name.endswith(".json")]
    start = time.perf_counter()
    if options.plans:
        found = _estimate_plans(options, folder, task, topology)
    else:
        found = [_estimate(options, folder, task, each, options.plan) for each in topologies]
    print(f"planned in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    first = found[0]
    alternatives = [] if first.fits else topologies_that_fit(first, folder)
    _write(options, found, saved, alternatives)
    return OK if first.fits else DOES_NOT_FIT


def _estimate_plans(
    options: argparse.Namespace, folder: Path, task: Task, topology: hardware.Topology
) -> list[ModelEstimate]:
    """Every plan of the transformers, the best first; it becomes this user's choice."""
    if options.compare:
        raise PlanError("--plans compares the plans on one topology; leave out --compare.")
    model = open_model(folder, hardware.describe_devices(topology))
    names = [plan.name for plan in transformer_plans(model)]
    found = {name: _estimate(options, folder, task, topology, name) for name in names}
    if not any(estimate.fits for estimate in found.values()):
        return list(found.values())
    best = choose(found)
    plan_choice.keep(model.transformer.spec.config_class, topology.generation.name, topology.devices, best)
    print(f"chosen from now on for {topology.devices} × {topology.generation.name}: {best}", file=sys.stderr)
    return [found.pop(best), *found.values()]


def _estimate(
    options: argparse.Namespace, folder: Path, task: Task, topology: hardware.Topology, plan: str | None
) -> ModelEstimate:
    model = open_model(folder, hardware.describe_devices(topology), plan)
    calls = rehearse(model, task)
    programs = estimate(
        Job(folder, task, topology, plan),
        calls,
        wanted=_wanted(calls, options.only),
        effort=options.effort,
        use_cache=not options.no_cache,
        report=lambda line: print(f"{topology.name}: {line}", file=sys.stderr, flush=True),
    )
    return assemble(folder.name, model, topology, task, programs)


def _wanted(calls: list[Call], only: list[str] | None) -> list[int]:
    """Indices of the calls of the components in ``only``; of all without it."""
    names = {name for call in calls for name in call.components}
    if only and not set(only) <= names:
        raise PlanError(f"--only takes components among {', '.join(sorted(names))}; got {' '.join(only)}.")
    return [index for index, call in enumerate(calls) if not only or set(only) & set(call.components)]


def _saved(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"--compare: {path} is no file that --json wrote ({error}).") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise PlanError(f"--compare: {path} was not written by this version's --json. Plan it again.")
    return found


def _write(options: argparse.Namespace, found: list[ModelEstimate], saved: list[dict], alternatives: list[str]) -> None:
    first = {**to_json(found[0]), **({} if found[0].fits else {"topologies_that_fit": alternatives})}
    columns = [first, *map(to_json, found[1:]), *saved]
    if options.json == "-":
        print(json.dumps(first, indent=2))
    else:
        print(table.render(first))
        if len(columns) > 1:
            print(table.compare(columns))
    if options.json and options.json != "-":
        write_text(options.json, json.dumps(first, indent=2))
    if options.html:
        write_text(options.html, html.render(columns))
