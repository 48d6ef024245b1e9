"""Compiling a task's programs for a described topology, and what the compiler says about each.

Programs compile side by side in processes, and what was learnt about one is kept on the disk, under everything it
depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import comfyui_tpu
from comfyui_tpu.models.common import Task
from comfyui_tpu.models.video_decoder import SpreadAutoencoder
from comfyui_tpu.plan import costs, flops, hlo
from comfyui_tpu.plan.hardware import Topology, describe_devices
from comfyui_tpu.plan.kernels import OurKernels
from comfyui_tpu.plan.rehearsal import Call, open_model, rehearse
from comfyui_tpu.runtime import compile_cache
from comfyui_tpu.runtime.files import write_text
from comfyui_tpu.runtime.program import compile_lowered, compiler_options

log = logging.getLogger(__name__)

TOP_OPERATIONS = 20
# How hard the compiler tries: production's own way, -O1 (XLA's number for it is 19), and as little as it can.
EFFORTS: dict[str, dict[str, Any]] = {
    "production": {},
    "quick": {"optimization_level": 19},
    "quickest": {"exec_time_optimization_effort": -1.0},
}
AUTO = "auto"  # quick for autoencoders that are traced as they stand, which take the compiler long; else production
PACKAGES = ("jax", "libtpu", "torch", "torchax", "diffusers", "transformers")


@dataclass(frozen=True)
class ProgramEstimate:
    """What the compiler says about one program; bytes and cycles are of one chip and one call.

    Attributes:
        label: component and method.
        components: all components that run it.
        calls: how often the task does.
        inputs: shapes of the inputs, for people.
        effort: how hard the compiler tried, one of :data:`EFFORTS`.
        trace_seconds, compile_seconds: on the machine that compiled it.
        cpu_seconds: processor time of both, which other work on the machine does not lengthen.
        input_bytes, output_bytes, temp_bytes, alias_bytes, code_bytes: HBM besides the weights; aliased outputs reuse
            the memory of inputs.
        argument_bytes: weights and inputs as laid out by the compiler.
        flops: of all chips together.
        cycles: by category, see :mod:`comfyui_tpu.plan.costs`.
        hbm_traffic_bytes, collective_bytes: moved to and from HBM, and through the links.
        operations: the dearest, as rows of ``costs.Operation``.
        warnings: what the numbers leave out.
        failure: the compiler's message if the program does not fit a chip's memory; then all else is partly empty.
    """

    label: str
    components: tuple[str, ...]
    calls: int
    inputs: str
    effort: str
    trace_seconds: float
    compile_seconds: float
    cpu_seconds: float
    input_bytes: int
    output_bytes: int = 0
    temp_bytes: int = 0
    alias_bytes: int = 0
    code_bytes: int = 0
    argument_bytes: int = 0
    flops: int = 0
    cycles: dict[str, float] = field(default_factory=dict)
    hbm_traffic_bytes: float = 0
    collective_bytes: float = 0
    operations: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    failure: str = ""

    @property
    def total_cycles(self) -> float:
        return sum(self.cycles.values())

    @property
    def working_bytes(self) -> int:
        """HBM that a call needs besides resident weights."""
        return self.input_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes


@dataclass(frozen=True)
class Job:
    """What is planned: enough for a process of its own to find every program again.

    ``plan``: name of the transformers' plan; production's choice when None.
    """

    folder: Path
    task: Task
    topology: Topology
    plan: str | None = None


def estimate(
    job: Job,
    calls: list[Call],
    *,
    wanted: list[int] | None = None,
    effort: str = AUTO,
    kernel_cycles: costs.KernelCycles | None = None,
    use_cache: bool = True,
    workers: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[ProgramEstimate]:
    """Compile every program of ``calls`` for the job's topology and read its costs.

    Args:
        calls: what ``job`` runs, from :func:`rehearsal.rehearse`.
        wanted: indices of the calls to estimate; all when None.
        effort: one of :data:`EFFORTS` for all programs, or :data:`AUTO`.
        kernel_cycles: cycles of Pallas kernels, see :func:`costs.read`; it goes to other processes. Ours are
            known when None.
        use_cache: take what an earlier run of the same code and versions learnt.
        workers: processes that compile; as many as there are processors when None. 1 compiles in this process.
        report: called with one line as each program is done.

    Returns:
        One estimate for each call that was wanted, in their order. Once a program does not fit, those not yet compiled
        are left out.
    """
    kernel_cycles = kernel_cycles or OurKernels(job.topology.generation.name)
    efforts = [_effort(call, effort) for call in calls]
    paths = [_cache_path(call, job.topology, each, kernel_cycles) for call, each in zip(calls, efforts, strict=True)]
    indices = range(len(calls)) if wanted is None else wanted
    found = {index: _stored(paths[index], calls[index]) if use_cache else None for index in indices}
    for known in filter(None, found.values()):
        report(_progress(known) + " (known from an earlier run)")
    missing = [index for index, known in found.items() if known is None]
    if any(known and known.failure for known in found.values()):
        missing = []
    # The dearest first, so that the last to finish did not start last.
    todo = [(index, efforts[index]) for index in sorted(missing, key=lambda index: _dearness(calls[index]))]
    compile_one = functools.partial(_compile, topology=job.topology, kernel_cycles=kernel_cycles)
    with contextlib.closing(_compiled(job, calls, todo, compile_one, workers or os.cpu_count() or 1)) as made:
        for index, program in made:
            found[index] = program
            report(_progress(program))
            if use_cache:
                _store(paths[index], program)
            if program.failure:
                break  # the answer is no; the rest would take minutes more
    return [program for program in found.values() if program is not None]


def _effort(call: Call, effort: str) -> str:
    if effort != AUTO:
        return effort
    ours = isinstance(call.module, SpreadAutoencoder) and call.method.startswith("decode")
    return "quick" if call.module.plan.shard_space and not ours else "production"


def _compiled(
    job: Job, calls: list[Call], wanted: list[tuple[int, str]], compile_one: Callable[..., Any], workers: int
) -> Iterator[tuple[int, ProgramEstimate]]:
    """(index, estimate) of the wanted (index, effort) as they are done."""
    if workers == 1 or len(wanted) < 2:
        yield from ((index, compile_one(calls[index], effort=effort)) for index, effort in wanted)
        return
    # Processes, because the compiler compiles one program at a time in each; started afresh, because a fork of one in
    # which the compiler's threads run may hang.
    work = functools.partial(_work, job, compile_one)
    pool = multiprocessing.get_context("spawn").Pool(min(workers, len(wanted)))
    try:
        yield from pool.imap_unordered(work, wanted)
        pool.close()
    except BaseException:
        pool.terminate()  # nobody wants what still runs
        raise
    finally:
        pool.join()


def _work(job: Job, compile_one: Callable[..., Any], which: tuple[int, str]) -> tuple[int, ProgramEstimate]:
    index, effort = which
    calls = _calls_of(job)
    # The compiler's own handler would print stack traces when the pool ends this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return index, compile_one(calls[index], effort=effort)


@functools.lru_cache(maxsize=1)
def _calls_of(job: Job) -> list[Call]:
    """The same list as the parent process has: rehearsing is deterministic."""
    return rehearse(open_model(job.folder, describe_devices(job.topology), job.plan), job.task)


def _dearness(call: Call) -> int:
    """Sorts programs by how long the compiler takes: later chunks of autoencoders, transformers, the rest."""
    if call.module.plan.shard_space:
        return 0 if call.given else 2
    return 1 if call.components[0].startswith("transformer") else 3


def _progress(found: ProgramEstimate) -> str:
    outcome = "does not fit" if found.failure else f"{found.total_cycles / 1e6:,.0f} M cycles"
    return f"{found.label}: {outcome}, compiled in {found.compile_seconds:.0f} s"


def _compile(call: Call, *, topology: Topology, effort: str, kernel_cycles: costs.KernelCycles) -> ProgramEstimate:
    start, started_cpu = time.perf_counter(), time.process_time()
    traced = call.module.trace(call.method, call.kept, call.given)
    trace_seconds = time.perf_counter() - start
    known = {
        "label": call.label,
        "components": tuple(call.components),
        "calls": call.count,
        "inputs": _describe_inputs(call),
        "effort": effort,
        "trace_seconds": trace_seconds,
        "input_bytes": sum(map(_bytes_on_a_chip, jax.tree.leaves((call.kept, call.given)))),
        "flops": flops.count(traced.jaxpr),
    }
    start = time.perf_counter()
    try:
        options = compiler_options(call.module.devices) | EFFORTS[effort]
        compiled = compile_lowered(traced.lower(), options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        spent = {"compile_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - started_cpu}
        message = str(error).splitlines()[0]
        needed = _temporaries_needed(message, call.module.bytes_per_device + known["input_bytes"])
        return ProgramEstimate(**known, **spent, temp_bytes=needed, failure=message)
    spent = {"compile_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - started_cpu}
    memory = compiled.memory_analysis()
    devices = [call.module.devices.index(device) for device in call.module.mesh.devices.flat]
    cost = costs.read(hlo.parse(compiled.as_text()), topology, kernel_cycles, devices)
    dearest = sorted(cost.operations, key=lambda operation: -operation.cycles)[:TOP_OPERATIONS]
    return ProgramEstimate(
        **known,
        **spent,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        cycles=cost.by_category(),
        hbm_traffic_bytes=cost.hbm_bytes,
        collective_bytes=cost.collective_bytes,
        operations=tuple(map(dataclasses.asdict, dearest)),
        warnings=tuple(_warnings(call, cost, effort)),
    )


def _warnings(call: Call, cost: costs.Cost, effort: str) -> Iterator[str]:
    if cost.unknown_loops:
        yield f"{call.label}: {cost.unknown_loops} loops of unknown length are counted once."
    if cost.without_figure:
        yield f"{call.label}: the compiler has no cycles for {cost.without_figure} operations; their bytes are counted."
    if cost.unknown_kernels:
        yield f"{call.label}: Pallas kernels of unknown cost count nothing: {', '.join(cost.unknown_kernels)}."
    if cost.kernels_at_peak:
        names = ", ".join(cost.kernels_at_peak)
        yield f"{call.label}: Pallas kernels count their flop at the matmul peak, which is too fast: {names}."
    if effort != "production":
        yield f"{call.label}: compiled with fewer optimisations than production ('--effort production' does as it)."


def _temporaries_needed(message: str, arguments: int) -> int:
    """Bytes besides its arguments that a program needs, from the compiler's refusal; 0 where it does not say."""
    match = re.search(r"(temporaries \(|Used )([\d.]+)([KMGT])", message)
    if not match:
        return 0
    size = int(float(match.group(2)) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[match.group(3)])
    return size if match.group(1).startswith("temporaries") else max(size - arguments, 0)


def _bytes_on_a_chip(described: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(described.sharding.shard_shape(described.shape))) * described.dtype.itemsize


def _describe_inputs(call: Call) -> str:
    shapes = [
        f"{name} {'×'.join(map(str, value.shape))}"
        for name, value in call.kept.items()
        if isinstance(value, jax.ShapeDtypeStruct)
    ]
    return ", ".join(shapes)


# --- what earlier runs learnt -----------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Beside XLA's compile cache: ``~/.cache/comfyui-tpu/plan`` (``COMFYUI_TPU_CACHE`` moves both)."""
    return compile_cache.default_folder().with_name("plan")


def _cache_path(call: Call, topology: Topology, effort: str, kernel_cycles: Any) -> Path:
    module = call.module
    leaves = jax.tree.leaves_with_path((call.kept, call.given))
    inputs = [(str(path), x.shape, str(x.dtype), str(x.sharding.spec)) for path, x in leaves]
    config = {key: value for key, value in module.raw_config.items() if not key.startswith("_")}
    identity = [
        *(code_version(), topology.name, repr(module.plan), module.compute_dtype.name, repr(module.options)),
        *(call.components[0], json.dumps(config, sort_keys=True), call.method, inputs, effort),
        getattr(kernel_cycles, "__name__", repr(kernel_cycles)),
    ]
    return cache_folder() / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.json"


@functools.cache
def code_version() -> str:
    """Hash of the sources that make programs and read them, and of the versions they run with."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((package, ""))
    digest = hashlib.sha256(repr(versions).encode())
    root = Path(comfyui_tpu.__file__).parent
    for room in ("models", "ops", "plan", "runtime"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _stored(path: Path | None, call: Call) -> ProgramEstimate | None:
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sequences = {name: tuple(found[name]) for name in ("operations", "warnings")}
        own = {"components": tuple(call.components), "calls": call.count, "label": call.label}
        return ProgramEstimate(**{**found, **sequences, **own})
    except (ValueError, TypeError, KeyError, OSError) as error:
        log.warning("ignoring a damaged planner result: %s (%s)", path, error)
        return None


def _store(path: Path, found: ProgramEstimate) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(path, json.dumps(dataclasses.asdict(found)))
    except OSError as error:
        log.warning("the planner's result is not kept: %s", error)
