"""One look at the machine: CPU, RAM, disks and TPU chips, as plain numbers. ``Sampler().sample()``."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

log = logging.getLogger(__name__)

# File systems that hold no files of a user's, or only a packed image of somebody else's.
PSEUDO_FILE_SYSTEMS = {"squashfs", "overlay", "tmpfs", "devtmpfs", "iso9660"}


@dataclass(frozen=True)
class Space:
    """Bytes of something of which there is a limited amount."""

    used: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.used / self.total if self.total else 0.0


@dataclass(frozen=True)
class Disk(Space):
    """A mounted file system, in bytes. ``path``: where it is mounted."""

    path: str = "/"


@dataclass(frozen=True)
class Chip:
    """One TPU device. Bytes and percents (0 to 100); None: not available, ``Sample.unavailable`` says why."""

    index: int
    hbm_used: int | None = None
    hbm_total: int | None = None
    duty_cycle: float | None = None
    tensorcore_utilization: float | None = None


@dataclass(frozen=True)
class Reason:
    """Why a value is missing: ``code`` for programs (and translations), ``text`` says what to do."""

    code: str
    text: str


@dataclass(frozen=True)
class Chips:
    """All local TPU devices. ``kind``: e.g. ``"TPU v6e"``; ``age``: seconds since the figures were read."""

    chips: tuple[Chip, ...] = ()
    kind: str | None = None
    age: float = 0.0
    unavailable: Mapping[str, Reason] = field(default_factory=dict)


@dataclass(frozen=True)
class InProcess:
    """What this very process knows of the devices. ``held``: component → bytes; ``chips``: only if it runs JAX."""

    held: Mapping[str, int] = field(default_factory=dict)
    chips: tuple[Chip, ...] = ()


class ChipReader(Protocol):
    def read(self) -> Chips: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Sample:
    """``time``: Unix seconds. ``cpu``: percent of all cores. ``held``: device memory by component, label → bytes.

    ``unavailable``: what is missing and why, keys ``chips``, ``hbm``, ``duty_cycle``, ``tensorcore_utilization``.
    """

    time: float
    cpu: float
    ram: Space
    disks: tuple[Disk, ...] = ()
    chips: tuple[Chip, ...] = ()
    chip_kind: str | None = None
    chips_age: float = 0.0
    held: Mapping[str, int] = field(default_factory=dict)
    unavailable: Mapping[str, Reason] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; bytes stay bytes, rates are percents with one decimal."""
        found = asdict(self)
        found["time"], found["chips_age"] = round(self.time, 3), round(self.chips_age, 1)
        found["cpu"] = round(self.cpu, 1)
        for chip in found["chips"]:
            for name in ("duty_cycle", "tensorcore_utilization"):
                chip[name] = None if chip[name] is None else round(chip[name], 1)
        return found


def disks() -> tuple[Disk, ...]:
    """The mounted file systems, each once; one that cannot be read is left out. In a container: what ``/`` lies on."""
    mounted = {}
    for each in sorted(psutil.disk_partitions(all=False), key=lambda each: len(each.mountpoint)):
        if each.fstype not in PSEUDO_FILE_SYSTEMS and Path(each.mountpoint).is_dir():
            mounted.setdefault(each.device, each.mountpoint)
    found = []
    for path in sorted(mounted.values()) or ["/"]:
        with contextlib.suppress(OSError):
            usage = psutil.disk_usage(path)
            found.append(Disk(usage.used, usage.used + usage.free, path))
    return tuple(found)


class CpuMeter:
    """Percent of all cores in use since the previous look.

    psutil.cpu_percent keeps its previous look per thread, and samples come from whichever worker thread is free.
    """

    def __init__(self) -> None:
        self._busy, self._all = self._seconds()
        self._percent = 0.0

    def percent(self) -> float:
        busy, all_ = self._seconds()
        if all_ - self._all >= 0.05:
            self._percent = min(100.0, max(0.0, 100 * (busy - self._busy) / (all_ - self._all)))
            self._busy, self._all = busy, all_
        return self._percent

    @staticmethod
    def _seconds() -> tuple[float, float]:
        """CPU seconds (busy, all) since the machine started."""
        times = psutil.cpu_times()._asdict()
        # Linux counts guests' time in user and nice already.
        total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        return total - times["idle"] - times.get("iowait", 0.0), total


class Sampler:
    """Takes samples. Safe to call from several threads; a call may last as long as the chip reader's deadline.

    Args:
        chips: reads the TPU; None: the runtime metrics service of this machine.
        in_process: what this process knows of the devices; must not start JAX to find out. Its HBM figures stand in
            where the metrics service has none.
    """

    def __init__(self, chips: ChipReader | None = None, in_process: Callable[[], InProcess] = InProcess) -> None:
        self._chips = chips
        self._in_process = in_process
        self._lock = threading.Lock()
        self._cpu = CpuMeter()

    def sample(self) -> Sample:
        with self._lock:
            here = self._ask_process()
            chips = _completed(self._read_chips(), here.chips)
            ram = psutil.virtual_memory()
            return Sample(
                time=time.time(),
                cpu=self._cpu.percent(),
                ram=Space(ram.total - ram.available, ram.total),
                disks=disks(),
                chips=chips.chips,
                chip_kind=chips.kind,
                chips_age=chips.age,
                held=dict(here.held),
                unavailable=chips.unavailable,
            )

    def close(self) -> None:
        """Ends connections. The next sample opens them again."""
        with self._lock:
            if self._chips is not None:
                self._chips.close()

    def _ask_process(self) -> InProcess:
        try:
            return self._in_process()
        except Exception:
            log.exception("asking this process for its device memory failed")
            return InProcess()

    def _read_chips(self) -> Chips:
        if self._chips is None:
            from comfyui_tpu.monitor.chips import RuntimeMetrics

            self._chips = RuntimeMetrics()
        try:
            return self._chips.read()
        except Exception as error:
            # A monitor that stops the show is worse than one that says it does not know.
            log.exception("reading the TPU's metrics failed")
            return Chips(unavailable={"chips": Reason("error", f"{type(error).__name__}: {error}")})


def _completed(found: Chips, here: tuple[Chip, ...]) -> Chips:
    """``found`` with the HBM figures of this process, if the metrics service told none."""
    if not here or any(chip.hbm_used is not None for chip in found.chips):
        return found
    missing = dict(found.unavailable)
    reason = missing.pop("chips", None)
    if reason is not None:
        missing |= dict.fromkeys(("duty_cycle", "tensorcore_utilization"), reason)
    missing.pop("hbm", None)
    return replace(found, chips=here, unavailable=missing)
