"""Weights from a checkpoint straight to the devices that need them.

The host never holds more than the tensors being read at the moment: each slice is read (and converted) into memory of
its own, handed to JAX and forgotten. Layers that run as one scan are written one by one into a stacked array that
already lies on the devices; where devices compute in host memory (the CPU backend), they are read straight into it.
"""

from __future__ import annotations

import collections
import contextlib
import math
import mmap
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from comfyui_tpu.runtime.checkpoint import Checkpoint, TensorInfo
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, PlanError
from comfyui_tpu.runtime.memory import simulate_allocation
from comfyui_tpu.runtime.reporting import current_reporter

_BLOCK_BYTES = 8 << 20  # rows read at a time: small enough for the cache, large enough for the disk
_OWN_PAGES_BYTES = 1 << 20  # larger buffers get pages of their own

# Per axis of a tensor, the first index of a slice and the one after its last.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Target:
    """One device array to fill.

    Attributes:
        shape: of the array; with ``stacked``, ``(number of sources, *shape of each source)``.
        dtype: of the array. Types that JAX does not hold (64 bit, usually) become what it holds instead.
        sharding: where the array lies. The layer axis of a stacked array cannot be sharded.
        sources: checkpoint tensors: one, or with ``stacked`` one a layer.
        stacked: the sources lie along a new leading axis; always so with more than one.
        units: (axis, number): that axis of a source (sharded by the spec) consists of so many equal units, and each
            device gets its part of every unit instead of one stretch of the whole axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    sources: tuple[str, ...]
    stacked: bool = False
    units: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stacked", self.stacked or len(self.sources) > 1)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape that each source must have."""
        return tuple(self.shape[1:] if self.stacked else self.shape)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape in which a source is read: an axis of units as two, which changes no byte's place."""
        if self.units is None:
            return self.source_shape
        axis, number = self.units
        shape = self.source_shape
        return (*shape[:axis], number, shape[axis] // number, *shape[axis + 1 :])

    @property
    def view_sharding(self) -> Sharding:
        """Where one source lies, as :attr:`view_shape`."""
        sharding = self.source_sharding
        if self.units is None or isinstance(sharding, SingleDeviceSharding):
            return sharding
        spec = [*sharding.spec, *[None] * (self.units[0] + 1 - len(sharding.spec))]
        spec.insert(self.units[0], None)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)

    @property
    def device_dtype(self) -> np.dtype:
        """The dtype the array has on the devices."""
        return np.dtype(jax.dtypes.canonicalize_dtype(self.dtype))

    @property
    def source_sharding(self) -> Sharding:
        """Where one source lies: as the stacked array does, without the layer axis."""
        if not self.stacked or isinstance(self.sharding, SingleDeviceSharding):
            return self.sharding
        spec = PartitionSpec(*self.sharding.spec[1:])
        return NamedSharding(self.sharding.mesh, spec, memory_kind=self.sharding.memory_kind)


def load(
    checkpoint: Checkpoint,
    targets: Mapping[str, Target],
    *,
    ignore: Iterable[re.Pattern] = (),
    readers: int = 4,
    stage: str = "loading transformer",
) -> dict[str, jax.Array]:
    """Fill ``targets`` from ``checkpoint``; return the arrays under the targets' names.

    Everything that can be checked is checked before a weight is read. This process reads only what its devices need,
    and what several of them need only once. Host memory grows by at most ``readers`` tensors (in the target's dtype)
    beyond the device arrays. Progress is reported in tensors under ``stage`` (with the shard's number where there are
    several); Cancel is noticed between tensors.

    Args:
        ignore: patterns (``search``) of checkpoint tensors that may stay unused.
        readers: how many tensors are read at the same time.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or kind, or cannot be read.
        PlanError: a sharding does not fit its array.
        InvalidInput: ``readers`` is not positive.
        Whatever the reporter raises to stop the work. After any exception nothing stays on the devices.
    """
    if readers < 1:
        raise InvalidInput(f"expected at least 1 reader; got {readers}")
    _check_names(checkpoint, targets, list(ignore))
    for name, target in targets.items():
        for source in target.sources:
            _check_source(name, target, checkpoint.tensors[source])
    checkpoint = checkpoint.viewed({source: t.view_shape for t in targets.values() for source in t.sources})
    jobs = _jobs(checkpoint, targets)
    shards = _stages(stage, jobs)
    reporter = current_reporter()  # readers run in other threads, which have no reporter
    arrays: dict[str, jax.Array] = {}
    try:
        with deleted_on_error(arrays), contextlib.closing(_read_ahead(checkpoint, jobs, readers)) as read:
            for done, (job, array) in enumerate(read, start=1):
                _place(job, array, arrays)
                reporter.progress(shards[job.info.file], done, len(jobs))
                reporter.check_cancelled()
    finally:
        for job in jobs:
            if job.stack is not None:
                job.stack.drop()
    return arrays


@contextlib.contextmanager
def deleted_on_error(arrays: dict[str, jax.Array]) -> Iterator[None]:
    """Delete ``arrays`` if the ``with`` block raises: the exception's traceback may keep them alive for long."""
    try:
        yield
    except BaseException:
        for array in arrays.values():
            array.delete()
        raise


def _stages(stage: str, jobs: list[_Job]) -> dict[Path, str]:
    """Shard → the stage's name while it is read; of several shards each has its number."""
    files = sorted({job.info.file for job in jobs})
    if len(files) < 2:
        return dict.fromkeys(files, stage)
    return {file: f"{stage} (shard {number} of {len(files)})" for number, file in enumerate(files, start=1)}


@dataclass(frozen=True)
class _Job:
    """One checkpoint tensor to read: the array ``name``, or layer number ``layer`` of it (into ``stack`` if given)."""

    name: str
    target: Target
    layer: int
    info: TensorInfo
    stack: _HostStack | None


def _check_names(checkpoint: Checkpoint, targets: Mapping[str, Target], ignore: list[re.Pattern]) -> None:
    """A checkpoint of another architecture must not load just because some of its names fit."""
    wanted = {source for target in targets.values() for source in target.sources}
    missing = sorted(wanted - set(checkpoint.tensors))
    unused = set(checkpoint.tensors) - wanted
    unexpected = sorted(name for name in unused if not any(pattern.search(name) for pattern in ignore))
    if missing or unexpected:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the model: {_listed(missing, 'missing')}, "
            f"{_listed(unexpected, 'unexpected')}. Check that model_id names a checkpoint of this architecture."
        )


def _listed(names: list[str], what: str, limit: int = 4) -> str:
    if not names:
        return f"no tensor is {what}"
    more = ", …" if len(names) > limit else ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{more})"


def _jobs(checkpoint: Checkpoint, targets: Mapping[str, Target]) -> list[_Job]:
    """What to read, checked, in the order in which it lies on the disk (also the same order in every process)."""
    jobs = []
    for name, target in targets.items():
        _check_sharding(name, target)
        stack = _HostStack(target) if target.stacked and _computes_in_host_memory(target.sharding) else None
        for layer, source in enumerate(target.sources):
            jobs.append(_Job(name, target, layer, checkpoint.tensors[source], stack))
    return sorted(jobs, key=lambda job: (job.info.file, job.info.offset, job.name))


def _check_sharding(name: str, target: Target) -> None:
    if target.stacked and (not target.shape or target.shape[0] != len(target.sources)):
        raise PlanError(f"{name}: expected a leading axis of {len(target.sources)} layers; got shape {target.shape}")
    try:
        target.sharding.shard_shape(target.shape)
    except (ValueError, IndexError) as error:  # IndexError: the spec names more axes than the array has
        raise PlanError(
            f"{name}: expected a sharding that divides shape {target.shape} evenly; got {target.sharding}. Choose "
            f"another plan or number of devices. ({error})"
        ) from error
    if target.stacked and not _keeps_layers_whole(target.sharding):
        raise PlanError(
            f"{name}: expected a NamedSharding of stacked layers that leaves their axis 0 whole, or a single device; "
            f"got {target.sharding}"
        )


def _keeps_layers_whole(sharding: Sharding) -> bool:
    if isinstance(sharding, NamedSharding):
        return not sharding.spec or sharding.spec[0] in (None, ())
    return isinstance(sharding, SingleDeviceSharding)


def _check_source(name: str, target: Target, info: TensorInfo) -> None:
    if info.shape != target.source_shape:
        raise CheckpointError(
            f"{info.file}: expected {info.name!r} of shape {target.source_shape} for {name}; got {info.shape}. "
            "The model's config.json and its weights do not belong together: download both again."
        )
    if _number_kind(info.dtype) != _number_kind(target.dtype):
        raise CheckpointError(
            f"{info.file}: expected {info.name!r} as {_number_kind(target.dtype)} (for {np.dtype(target.dtype)} "
            f"weights); got {info.dtype}. Quantised checkpoints are not supported: use the original one."
        )


def _number_kind(dtype: np.dtype) -> str:
    kinds = {"floating point": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}
    return next((kind for kind, family in kinds.items() if jnp.issubdtype(dtype, family)), str(np.dtype(dtype)))


class _HostStack:
    """Stacked layers of devices that compute in host memory: each layer is read to where it stays.

    The way of other devices would touch every byte three times here (an empty stack, the layer, the copy). Untouched
    memory costs nothing, so stacks are made before anything is read.
    """

    def __init__(self, target: Target):
        self._target = target
        self._devices_of = _boxes(target.view_sharding, target.view_shape)
        self._missing = len(target.sources)
        self._slices = {box: _empty((self._missing, *_extent(box)), target.device_dtype) for box in self._devices_of}

    def layer(self, index: int) -> dict[Box, np.ndarray]:
        """Where to read the slices of a layer to."""
        return {box: stacked[index, ...] for box, stacked in self._slices.items()}

    def arrived(self) -> jax.Array | None:
        """Count one more layer; with the last one, the stacked array."""
        self._missing -= 1
        if self._missing:
            return None
        return _on_devices(self._target.shape, self._target.sharding, self._slices, self._devices_of)

    def drop(self) -> None:
        """Give the memory back, as far as no array lives in it."""
        self._slices = {}


def _computes_in_host_memory(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def _read_ahead(checkpoint: Checkpoint, jobs: list[_Job], readers: int) -> Iterator[tuple[_Job, jax.Array | None]]:
    """Each job with its array on the devices, in order, while up to ``readers`` of the next are being read.

    Jobs that read into their stack have no array of their own. However this ends, no thread keeps running and no array
    stays behind that was not handed out.
    """
    stop = threading.Event()
    ahead: collections.deque[tuple[_Job, Future]] = collections.deque()
    pool = ThreadPoolExecutor(readers, thread_name_prefix="weights")
    try:
        for job in jobs:
            if len(ahead) == readers:
                yield _next(ahead)
            ahead.append((job, pool.submit(_read, checkpoint, job, stop)))
        while ahead:
            yield _next(ahead)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for _, future in ahead:
            if not future.cancelled() and future.exception() is None and future.result() is not None:
                future.result().delete()


def _next(ahead: collections.deque[tuple[_Job, Future]]) -> tuple[_Job, jax.Array | None]:
    job, future = ahead.popleft()
    return job, future.result()


class _Stopped(Exception):
    """Ends a reader's work after another part has failed; nobody sees it."""


def _read(checkpoint: Checkpoint, job: _Job, stop: threading.Event) -> jax.Array | None:
    """Read one tensor into its job's stack, or onto the devices of its sharding (runs in a reader thread)."""
    if job.stack is not None:
        _read_slices(checkpoint, job.info, job.stack.layer(job.layer), stop)
        return None
    target = job.target
    devices_of = _boxes(target.view_sharding, target.view_shape)
    slices = {box: _empty(_extent(box), job.target.device_dtype) for box in devices_of}
    _read_slices(checkpoint, job.info, slices, stop)
    return _on_devices(target.source_shape, target.source_sharding, slices, devices_of)


def _on_devices(
    shape: tuple[int, ...],
    sharding: Sharding,
    slices: Mapping[Box, np.ndarray],
    devices_of: Mapping[Box, list[jax.Device]],
) -> jax.Array:
    """One array from its slices (an axis of units merged again, which a device's part of it allows without a copy).

    On the CPU backend it may live in their very memory: they must not change any more.
    """
    extent = sharding.shard_shape(tuple(shape))
    for box, devices in devices_of.items():
        simulate_allocation(devices, slices[box].nbytes)
    parts = [(slices[box].reshape(extent), device) for box, devices in devices_of.items() for device in devices]
    shards = [jax.device_put(part, device) for part, device in parts]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards))


def _boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[jax.Device]]:
    """Which slices of an array this process needs, and for which of its devices."""
    boxes: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    return boxes


def _extent(box: Box) -> tuple[int, ...]:
    return tuple(end - start for start, end in box)


def _read_slices(
    checkpoint: Checkpoint, info: TensorInfo, slices: Mapping[Box, np.ndarray], stop: threading.Event
) -> None:
    """Fill slices of a tensor, converting to their dtype. A row that several of them share is read once."""
    if not info.shape:
        _convert(checkpoint.read(info.name), slices[()], info)
        return
    for first, last in sorted({box[0] for box in slices}):
        of_rows = {box[1:]: array for box, array in slices.items() if box[0] == (first, last)}
        _read_rows(checkpoint, info, first, last, of_rows, stop)


def _read_rows(
    checkpoint: Checkpoint,
    info: TensorInfo,
    first: int,
    last: int,
    of_rows: Mapping[Box, np.ndarray],
    stop: threading.Event,
) -> None:
    """Fill arrays with different columns of the rows ``first`` to ``last``, one block of rows after the other."""
    step = max(1, _BLOCK_BYTES * info.shape[0] // max(info.nbytes, 1))
    whole = of_rows.get(tuple((0, size) for size in info.shape[1:]))
    direct = whole is not None and whole.dtype == info.dtype
    block = None if direct else np.empty((min(step, last - first), *info.shape[1:]), info.dtype)
    for start in range(first, last, step):
        if stop.is_set():
            raise _Stopped
        end = min(start + step, last)
        within = slice(start - first, end - first)
        read = checkpoint.read(info.name, slice(start, end), out=whole[within] if direct else block[: end - start])
        for columns, array in () if direct else of_rows.items():
            _convert(read[(slice(None), *(slice(*column) for column in columns))], array[within], info)


def _convert(source: np.ndarray, out: np.ndarray, info: TensorInfo) -> None:
    """Copy with conversion to ``out.dtype`` (floats round to nearest even, as torch does)."""
    with np.errstate(over="ignore"):  # a value beyond float16 becomes infinity, also as torch does
        out[...] = source
    if jnp.issubdtype(out.dtype, jnp.integer) and not np.array_equal(out, source):
        raise CheckpointError(f"{info.file}: expected {info.name!r} to fit into {out.dtype}; its values are too large.")


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory goes back to the system as soon as nobody uses it.

    ``malloc`` keeps freed blocks of this size in per-thread arenas: with several readers the process would stay that
    much larger. Huge pages cut the cost of first touching the memory to a third.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _OWN_PAGES_BYTES:
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def _place(job: _Job, array: jax.Array | None, arrays: dict[str, jax.Array]) -> None:
    """Make what was read the array of the job's target, or part of it."""
    if job.stack is not None:
        if (stacked := job.stack.arrived()) is not None:
            arrays[job.name] = stacked
    elif job.target.stacked:
        _put_on_stack(job, array, arrays)
    else:
        arrays[job.name] = array


def _put_on_stack(job: _Job, array: jax.Array, arrays: dict[str, jax.Array]) -> None:
    """Write a layer into the stacked array on the devices, and delete the layer."""
    try:
        if job.name not in arrays:
            arrays[job.name] = _empty_stack(job.target)
        put = jax.jit(_put_layer, donate_argnums=0, out_shardings=job.target.sharding)
        arrays[job.name] = jax.block_until_ready(put(arrays[job.name], array, np.int32(job.layer)))
    finally:
        array.delete()


def _empty_stack(target: Target) -> jax.Array:
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=target.sharding)
    return zeros(tuple(target.shape), target.device_dtype)


def _put_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    """Write one layer into a stack whose memory is donated, so that there is never a second one."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, axis=0)
