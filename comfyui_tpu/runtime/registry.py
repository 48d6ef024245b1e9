"""One owner for every array on the devices.

Components lease their weights for the time of a call. Between calls the registry may evict them, least recently used
first, when another component needs the room; the next lease loads them again. Users never unload by hand.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

from comfyui_tpu.runtime.errors import OutOfDeviceMemory

log = logging.getLogger(__name__)

Arrays = Mapping[str, jax.Array]
T = TypeVar("T")

# Room kept free on a chip when deciding whether a component fits: programs, their temporaries, fragmentation.
HEADROOM = 0.10


@dataclass
class _Entry:
    label: str
    arrays: Arrays
    users: int = 0
    last_used: int = 0
    release_when_idle: bool = False
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = device_bytes(self.arrays)


def device_bytes(arrays: Arrays) -> int:
    """Bytes that ``arrays`` occupy on this process's devices, all copies of replicated data counted."""
    return sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards)


class Registry:
    """Owns device arrays by key. Safe to call from several threads; loading is serialised."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.RLock()
        self._loading = threading.RLock()
        self._clock = itertools.count(1)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of all owned arrays, summed over devices."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def holdings(self) -> dict[str, int]:
        """Label → bytes of everything held, most recently used first."""
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: -entry.last_used)
            return {entry.label: entry.bytes for entry in entries}

    def devices(self) -> set[jax.Device]:
        """This process's devices that hold something. Never initialises JAX: who holds nothing has none."""
        with self._lock:
            arrays = [array for entry in self._entries.values() for array in entry.arrays.values()]
            return {device for array in arrays for device in array.sharding.addressable_devices}

    @contextlib.contextmanager
    def lease(
        self, key: Hashable, label: str, load: Callable[[], Arrays], bytes_per_device: int = 0
    ) -> Iterator[Arrays]:
        """The arrays under ``key``, loaded by ``load()`` if absent, not evicted while the ``with`` block runs.

        Args:
            key: identifies checkpoint, component, plan and devices.
            label: for people, e.g. ``"transformer of wan21-tiny"``.
            load: makes the arrays; must leave nothing behind when it raises.
            bytes_per_device: what ``load`` will occupy on the fullest device, to make room beforehand (0: unknown).
        """
        entry = self._acquire(key, label, load, bytes_per_device)
        try:
            yield entry.arrays
        finally:
            self._return(key, entry)

    def _acquire(self, key, label, load, bytes_per_device) -> _Entry:
        with self._loading:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    return self._use(entry)
            self._make_room(bytes_per_device)
            arrays = self.run_with_room(load, what=f"loading the {label}")
            with self._lock:
                entry = self._entries[key] = _Entry(label, arrays)
                return self._use(entry)

    def _use(self, entry: _Entry) -> _Entry:
        entry.users += 1
        entry.last_used = next(self._clock)
        return entry

    def _return(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            if entry.release_when_idle and entry.users == 0 and self._entries.get(key) is entry:
                self._drop(key)

    def _make_room(self, bytes_per_device: int) -> None:
        """Evict idle components, least recently used first, until ``bytes_per_device`` fit (where devices tell)."""
        while bytes_per_device and (free := _free_bytes()) is not None and free < bytes_per_device:
            if not self._evict_oldest():
                return

    def _evict_oldest(self) -> bool:
        with self._lock:
            idle = [(entry.last_used, key) for key, entry in self._entries.items() if entry.users == 0]
            if not idle:
                return False
            key = min(idle, key=lambda pair: pair[0])[1]
            log.info("evicting the %s to make room", self._entries[key].label)
            self._drop(key)
            return True

    def run_with_room(self, work: Callable[[], T], what: str, repeatable: bool = True) -> T:
        """``work()``; when the devices run out of memory, evict everything idle and try once more.

        Raises:
            OutOfDeviceMemory: there was no room in the end (or ``work`` is not ``repeatable``).
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not repeatable:
                raise self._out_of_memory(what) from error
            freed = self.evict_idle()
            log.warning("out of device memory while %s; evicted %.2f GiB, trying again", what, freed / 2**30)
        # Outside of the except block, so that the first attempt's arrays are no longer held by its traceback.
        try:
            return work()
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(what) from error
            raise

    def _out_of_memory(self, what: str) -> OutOfDeviceMemory:
        held = ", ".join(f"{label} {size / 2**30:.2f} GiB" for label, size in self.holdings().items()) or "nothing"
        return OutOfDeviceMemory(
            f"The devices ran out of memory (HBM) while {what}, with every idle model evicted. Still held: {held}. "
            "Lower the number of frames or the size, or use more chips."
        )

    def evict_idle(self) -> int:
        """Free everything that nobody uses right now; returns the bytes freed."""
        with self._lock:
            idle = [key for key, entry in self._entries.items() if entry.users == 0]
            freed = sum(self._entries[key].bytes for key in idle)
            for key in idle:
                self._drop(key)
        return freed

    def release_all(self) -> int:
        """Free everything idle now, and what is in use as soon as it is idle; returns the bytes freed now."""
        with self._lock:
            freed = self.evict_idle()
            for entry in self._entries.values():
                entry.release_when_idle = True
        return freed

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key)
        for array in entry.arrays.values():
            if not array.is_deleted():
                array.delete()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA (or the host's allocator) says that memory is exhausted."""
    if isinstance(error, OutOfDeviceMemory):
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _free_bytes() -> int | None:
    """Free bytes on the fullest local device, less the headroom; None where the backend keeps no count (CPU)."""
    free: list[int] = []
    for device in jax.local_devices():
        stats: dict[str, Any] = device.memory_stats() or {}
        if "bytes_limit" not in stats or "bytes_in_use" not in stats:
            return None
        free.append(int(stats["bytes_limit"] * (1 - HEADROOM)) - stats["bytes_in_use"])
    return min(free, default=None)


@functools.cache
def registry() -> Registry:
    """The process's one registry."""
    return Registry()
