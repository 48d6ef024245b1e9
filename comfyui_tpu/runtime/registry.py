"""One owner for every array on the devices.

Components lease their weights for the time of a call. Between calls the registry may evict them, least recently used
first, when another component needs the room; the next lease loads them again. Users never unload by hand.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import jax

from comfyui_tpu.runtime import memory
from comfyui_tpu.runtime.errors import OutOfDeviceMemory

log = logging.getLogger(__name__)

Arrays = Mapping[str, jax.Array]
T = TypeVar("T")

# Share of a chip's memory that stays free when idle components may keep their place: what the compiler's figures leave
# out (fragmentation, the programs themselves). Where the rest is needed it is used: nothing is refused for its sake.
HEADROOM = 0.05

KNOBS = (
    "Lower the number of frames or the size (num_frames, height, width, batch_size), or use more or larger chips "
    "(num_devices 0 uses all; a larger TPU topology)."
)


@dataclass(frozen=True)
class Need:
    """What a call takes, known before anything is loaded.

    Attributes:
        devices: where it runs.
        weights: bytes of the component's weights on each device.
        workspace: bytes that its program takes on each device beside weights and inputs: temporaries and outputs.
    """

    devices: tuple[jax.Device, ...] = ()
    weights: int = 0
    workspace: int = 0

    def __str__(self) -> str:
        parts = {"of weights": self.weights, "to compute with": self.workspace}
        taken = " and ".join(f"{_size(nbytes)} {what}" for what, nbytes in parts.items() if nbytes)
        return f"{taken or 'an unknown amount'} on each of {_count(len(self.devices), 'chip')}"


NOTHING_KNOWN = Need()


@dataclass
class _Entry:
    label: str
    arrays: Arrays
    users: int = 0
    last_used: int = 0
    release_when_idle: bool = False
    bytes: int = field(init=False)
    bytes_on: Counter[jax.Device] = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_on = Counter()
        for array in self.arrays.values():
            each = memory.bytes_on_each_device(array)
            self.bytes_on.update(dict.fromkeys(array.sharding.addressable_devices, each))
        self.bytes = self.bytes_on.total()


def device_bytes(arrays: Arrays) -> int:
    """Bytes that ``arrays`` occupy on this process's devices, all copies of replicated data counted."""
    return _Entry("", arrays).bytes


class Registry:
    """Owns device arrays by key. Safe to call from several threads; loading is serialised."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.RLock()
        self._loading = threading.RLock()
        self._clock = itertools.count(1)
        self._releases = 0

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def bytes_in_use(self) -> int:
        """Bytes of all owned arrays, summed over devices."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def holdings(self) -> dict[str, int]:
        """Label → bytes of everything held, most recently used first; what shares a label is added up."""
        with self._lock:
            found: Counter[str] = Counter()
            for entry in sorted(self._entries.values(), key=lambda entry: -entry.last_used):
                found[entry.label] += entry.bytes
            return dict(found)

    def devices(self) -> set[jax.Device]:
        """This process's devices that hold something. Never initialises JAX: who holds nothing has none."""
        with self._lock:
            return {device for entry in self._entries.values() for device in entry.bytes_on}

    def describe(self) -> str:
        """One line for people: what is held, and how full the fullest chip is where that is known."""
        held, known = self.holdings(), [known for device in self.devices() if (known := memory.device_memory(device))]
        if not held:
            return "no model in memory"
        text = f"{_count(len(held), 'component')} in memory ({_size(sum(held.values()))})"
        if not known:
            return text
        fullest = min(known, key=lambda each: each.free)
        return f"{text}, {_size(fullest.used)} of {_size(fullest.limit)} a chip"

    # --- leases -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(
        self, key: Hashable, label: str, load: Callable[[], Arrays], need: Need = NOTHING_KNOWN
    ) -> Iterator[Arrays]:
        """The arrays under ``key``, loaded by ``load()`` if absent, not evicted while the ``with`` block runs.

        Args:
            key: identifies checkpoint, component, plan and devices.
            label: for people, e.g. ``"transformer of wan21-tiny"``.
            load: makes the arrays; must leave nothing behind when it raises.
            need: what the call takes; idle components leave, least recently used first, until that is free.

        Raises:
            OutOfDeviceMemory: by these figures there cannot be room (nothing was loaded), or loading found none.
        """
        entry = self._acquire(key, label, load, need)
        try:
            yield entry.arrays
        finally:
            self._return(key, entry)

    def _acquire(self, key: Hashable, label: str, load: Callable[[], Arrays], need: Need) -> _Entry:
        with self._loading:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None:
                    self._use(entry)
            if entry is None:
                return self._load(key, label, load, need)
            try:
                self._make_room(label, need, need.workspace)
            except BaseException:
                self._return(key, entry)
                raise
            return entry

    def _load(self, key: Hashable, label: str, load: Callable[[], Arrays], need: Need) -> _Entry:
        self._make_room(label, need, need.weights + need.workspace)
        releases = self._releases
        arrays = self.run_with_room(load, what=f"loading the {label}", need=need)
        with self._lock:
            entry = self._entries[key] = _Entry(label, arrays)
            # Whoever asked for everything to be released while this was being loaded meant it too.
            entry.release_when_idle = releases != self._releases
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

    # --- room ---------------------------------------------------------------------------------------------------------

    def _make_room(self, label: str, need: Need, nbytes: int) -> None:
        """Evict idle components, least recently used first, until ``nbytes`` more fit on each device (where they tell).

        Raises:
            OutOfDeviceMemory: there cannot be room. Nothing was evicted for it.
        """
        self._refuse_impossible(label, need, nbytes)
        while nbytes and (short := _short(need.devices, nbytes, headroom=HEADROOM)):
            if not self._evict_oldest(short):
                return

    def _refuse_impossible(self, label: str, need: Need, nbytes: int) -> None:
        if not nbytes or not _short(need.devices, nbytes, self._idle_bytes()):
            return
        gc.collect()  # arrays in unreachable cycles, such as a failed prompt's traceback, still count as taken
        if _short(need.devices, nbytes, self._idle_bytes()):
            raise self._out_of_memory(f"The {label} does not fit into the devices' memory (HBM)", need)

    def _idle_bytes(self) -> Counter[jax.Device]:
        with self._lock:
            return sum((entry.bytes_on for entry in self._entries.values() if entry.users == 0), Counter())

    def _evict_oldest(self, devices: set[jax.Device]) -> bool:
        """Evict what lies on one of ``devices`` and was not used for the longest time; whether there was such."""
        with self._lock:
            idle = [
                (entry.last_used, key)
                for key, entry in self._entries.items()
                if entry.users == 0 and not devices.isdisjoint(entry.bytes_on)
            ]
            if not idle:
                return False
            key = min(idle, key=lambda pair: pair[0])[1]
            log.info("evicting the %s to make room", self._entries[key].label)
            self._drop(key)
            return True

    def run_with_room(self, work: Callable[[], T], what: str, repeatable: bool = True, need: Need = NOTHING_KNOWN) -> T:
        """``work()``; when the devices run out of memory, evict everything idle and try once more.

        Args:
            what: for people, e.g. ``"running the transformer of wan21-tiny"``.
            repeatable: whether ``work`` can be called again. If not, room is made and the devices' error passes, so
                that the caller can repeat the whole of which ``work`` is a part.

        Raises:
            OutOfDeviceMemory: there was no room in the end.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            freed = self.evict_idle()
            log.warning("out of device memory while %s; evicted %s: %s", what, _size(freed), _first_line(error))
            if not repeatable:
                raise
        # Outside of the except block, so that the first attempt's arrays are no longer held by its traceback.
        gc.collect()
        try:
            return work()
        except Exception as error:
            if is_out_of_memory(error):
                started = f"The devices ran out of memory (HBM) while {what}, with every idle model evicted"
                raise self._out_of_memory(started, need, error) from error
            raise

    @contextlib.contextmanager
    def explained(self, what: str, need: Need) -> Iterator[None]:
        """Turn running out of memory into an OutOfDeviceMemory where eviction cannot help: in the compiler."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(f"The devices' memory (HBM) is too small for {what}", need, error) from error

    def _out_of_memory(self, started: str, need: Need, error: Exception | None = None) -> OutOfDeviceMemory:
        held = ", ".join(f"{label} {_size(size)}" for label, size in self.holdings().items()) or "nothing"
        sentences = [started + (f" ({_first_line(error)})." if error else ".")]
        if need.devices:
            sentences.append(f"It takes {need}{_taken(need.devices)}.")
        return OutOfDeviceMemory(" ".join([*sentences, f"Held now: {held}.", KNOBS]))

    # --- release ------------------------------------------------------------------------------------------------------

    def evict_idle(self) -> int:
        """Free everything that nobody uses right now; returns the bytes freed."""
        with self._lock:
            idle = [key for key, entry in self._entries.items() if entry.users == 0]
            freed = sum(self._entries[key].bytes for key in idle)
            for key in idle:
                self._drop(key)
        return freed

    def release_all(self) -> int:
        """Free everything idle now, and what is in use or loading as soon as it is idle; the bytes freed now."""
        with self._lock:
            self._releases += 1
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
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _short(
    devices: tuple[jax.Device, ...],
    nbytes: int,
    evictable: Mapping[jax.Device, int] | None = None,
    headroom: float = 0.0,
) -> set[jax.Device]:
    """Those of this process's ``devices`` on which ``nbytes`` are not free, even without ``evictable`` bytes of them.

    ``headroom``: share of the capacity that does not count as free. Devices that keep no count are never short.
    """
    evictable = evictable or {}
    short = set()
    for device in devices:
        known = memory.device_memory(device) if device.process_index == jax.process_index() else None
        if known and known.free - headroom * known.limit + evictable.get(device, 0) < nbytes:
            short.add(device)
    return short


def _taken(devices: tuple[jax.Device, ...]) -> str:
    """What the fullest of ``devices`` has, for an error: ``"; a chip has 31.2 GiB, of which 1.5 GiB are taken"``."""
    known = [found for device in devices if (found := memory.device_memory(device))]
    if not known:
        return ""
    fullest = min(known, key=lambda each: each.free)
    return f"; a chip has {_size(fullest.limit)}, of which {_size(fullest.used)} are taken"


def _size(nbytes: int) -> str:
    """``"12.34 GiB"``; small amounts in MiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _first_line(error: BaseException, limit: int = 300) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit]


@functools.cache
def registry() -> Registry:
    """The process's one registry."""
    return Registry()
