"""Compiled programs: one per (component, method, shapes, options), kept for the life of the process.

A program holds no weights, so it survives their eviction and serves every checkpoint of the same configuration.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from comfyui_tpu.runtime import compile_cache
from comfyui_tpu.runtime.reporting import current_reporter

log = logging.getLogger(__name__)

# For programs of several TPUs. The exchange of heads is many permutations, of which the compiler otherwise keeps few on
# the way at once.
_TPU_OPTIONS: dict[str, Any] = {"xla_max_concurrent_async_collective_permutes": 32}
# By JAX's name of the device. On v6e (Trillium) the SparseCores gather weights, beside the TensorCore's work, when the
# compiler is told to; for v7x it lets them by itself, and for v4, v5e and v5p it leaves this to the TensorCore anyway.
_OPTIONS_BY_KIND: dict[str, dict[str, Any]] = {
    "TPU v6 lite": {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True},
}

_programs: dict[Hashable, Program] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Program:
    """An executable ``run(params, kept, given)`` and how long it took to build (seconds).

    ``workspace_bytes``: what it takes on each device beside its arguments: temporaries, and outputs that reuse none.
    """

    run: Callable[[dict[str, jax.Array], Any, Any], Any]
    trace_seconds: float
    compile_seconds: float
    workspace_bytes: int = 0


def abstract(tree: Any) -> Any:
    """A pytree of arrays as ``ShapeDtypeStruct``s with the same shardings: all that compiling needs to know."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def trace(
    function: Callable[[dict, Any, Any], Any],
    params: Any,
    kept: Any,
    given: Any,
    output_sharding: Callable[[tuple[int, ...]], jax.sharding.Sharding],
) -> jax.stages.Traced:
    """Trace ``function(params, kept, given)`` from shapes alone; works for devices that are only described.

    Args:
        function: a pure JAX function.
        params, kept, given: pytrees of ShapeDtypeStructs with shardings; the memory of ``given`` is donated.
        output_sharding: placement for each output, by its shape.
    """
    outputs = jax.eval_shape(function, params, kept, given)
    out_shardings = jax.tree.map(lambda x: output_sharding(x.shape), outputs)
    return jax.jit(function, out_shardings=out_shardings, donate_argnums=2).trace(params, kept, given)


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What the compiler is told of a program for ``devices``, beyond its own defaults."""
    if len(devices) == 1 or devices[0].platform != "tpu":
        return {}
    return _TPU_OPTIONS | _OPTIONS_BY_KIND.get(devices[0].device_kind, {})


def compile_lowered(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """Compile with ``options``; without them where this compiler does not know one, which costs speed alone."""
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if not options or "No such compile option" not in str(error):
            raise
        log.warning("compiling without the options %s: %s", sorted(options), str(error).splitlines()[0])
        return lowered.compile()


def program(
    key: Hashable, label: str, make_lowered: Callable[[], jax.stages.Lowered], options: Mapping[str, Any]
) -> Program:
    """The program under ``key``, compiled with ``options`` if this process has not seen it; tells the reporter.

    The reporter may cancel before tracing and between tracing and compiling; XLA's compiler itself cannot be stopped.
    """
    with _lock:
        if key in _programs:
            return _programs[key]
        reporter = current_reporter()
        reporter.check_cancelled()
        reporter.message(f"compiling {label}")
        compile_cache.enable()
        start = time.perf_counter()
        lowered = make_lowered()
        traced = time.perf_counter()
        reporter.check_cancelled()
        compiled = compile_lowered(lowered, options)
        done = time.perf_counter()
        _programs[key] = Program(compiled, traced - start, done - traced, _workspace_bytes(compiled))
        reporter.message(f"compiled {label} in {done - start:.1f} s")
        return _programs[key]


def _workspace_bytes(compiled: jax.stages.Compiled) -> int:
    """Temporaries and new outputs by the compiler's own figures; 0 where the backend has none."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return max(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes, 0)
