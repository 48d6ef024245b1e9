"""Reads libtpu's runtime metrics service (gRPC, loopback) with the protobufs of the ``tpu-info`` package."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comfyui_tpu.monitor.sample import Chip, Chips, Reason
from comfyui_tpu.monitor.tensorcore import TensorCores

PORTS_VARIABLE = "TPU_RUNTIME_METRICS_PORTS"
DEFAULT_PORT = 8431

HBM_TOTAL = "tpu.runtime.hbm.memory.total.bytes"
HBM_USAGE = "tpu.runtime.hbm.memory.usage.bytes"
DUTY_CYCLE = "tpu.runtime.tensorcore.dutycycle.percent"
METRICS = (HBM_TOTAL, HBM_USAGE, DUTY_CYCLE)

# The service answers within milliseconds; one that is busy must not hold up the rest of a sample.
DEADLINE_SECONDS = 0.4
# Figures older than this are no longer shown.
STALE_SECONDS = 10.0
# The service appears with the first model that runs; gRPC's own limit between attempts is two minutes.
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
)

NOT_REPORTED = Reason("not-reported", "The TPU runtime does not report it.")


class BadPorts(ValueError):
    """The environment variable does not hold ports."""


def ports(text: str | None = None) -> tuple[int, ...]:
    """The ports of the metrics services: ``text``, else ``TPU_RUNTIME_METRICS_PORTS`` ("8431,8432"), else 8431."""
    text = os.environ.get(PORTS_VARIABLE, "") if text is None else text
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and 0 < int(word) < 65536 for word in words):
        raise BadPorts(f"{PORTS_VARIABLE}: expected ports like 8431,8432, got {text!r}")
    return tuple(int(word) for word in words) or (DEFAULT_PORT,)


@dataclass(frozen=True)
class _Hardware:
    """What the PCI bus shows without anybody's help."""

    kind: str | None = None
    devices: int = 0
    hbm_total: int | None = None


def hardware() -> _Hardware:
    """TPU chips on this machine's PCI bus. Reads /sys only: it opens no device."""
    from tpu_info import device

    try:
        chip, count = device.get_local_chips()
    except (OSError, AssertionError):
        return _Hardware()
    if chip is None:
        return _Hardware()
    cores = chip.value.devices_per_chip
    return _Hardware(f"TPU {chip.value.name}", count * cores, chip.value.hbm_gib * 2**30 // cores)


@dataclass
class _Service:
    """A connection to one metrics service."""

    port: int
    channel: Any = field(init=False, default=None)

    def request(self) -> dict[str, Any]:
        """Metric name → future of the answer; all are under way when this returns."""
        import grpc
        from tpu_info.proto import tpu_metric_service_pb2 as messages
        from tpu_info.proto.tpu_metric_service_pb2_grpc import RuntimeMetricServiceStub

        if self.channel is None:
            credentials = grpc.local_channel_credentials()
            self.channel = grpc.secure_channel(f"localhost:{self.port}", credentials, options=CHANNEL_OPTIONS)
            self._call = RuntimeMetricServiceStub(self.channel).GetRuntimeMetric
        return {
            name: self._call.future(messages.MetricRequest(metric_name=name), timeout=DEADLINE_SECONDS)
            for name in METRICS
        }

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class RuntimeMetrics:
    """HBM and duty cycle of every device whose runtime answers. Never starts a runtime, never opens a device."""

    def __init__(self, on_ports: Iterable[int] | None = None, sdk: str | None = None) -> None:
        self._tensorcores = TensorCores(sdk)
        self._ports = None if on_ports is None else tuple(on_ports)
        self._services: list[_Service] | None = None
        self._hardware: _Hardware | None = None
        self._last: Chips | None = None
        self._last_time = float("-inf")

    def read(self) -> Chips:
        try:
            self._connect()
        except ImportError as error:
            text = f"The package tpu-info is missing ({error}). Install it: pip install 'tpu-info>=0.14,<0.15'"
            return Chips(unavailable={"chips": Reason("no-tpu-info", text)})
        except BadPorts as error:
            return Chips(unavailable={"chips": Reason("bad-ports", str(error))})
        found, reasons = self._read_services()
        now = time.monotonic()
        if found and not any(reason.code == "late" for reason in reasons):
            self._last, self._last_time = self._complete(found, reasons), now
            return self._last
        return self._without_answer(reasons[0] if reasons else NOT_REPORTED, now - self._last_time)

    def close(self) -> None:
        self._tensorcores.close()
        for service in self._services or ():
            service.close()
        self._services, self._last = None, None

    def _connect(self) -> None:
        if self._services is None:
            self._hardware = self._hardware or hardware()
            self._services = [_Service(port) for port in (self._ports or ports())]

    def _read_services(self) -> tuple[list[Chip], list[Reason]]:
        import grpc

        chips, reasons = [], []
        for service, futures in [(service, service.request()) for service in self._services]:
            answers = {}
            for name, future in futures.items():
                try:
                    answers[name] = future.result().metric.metrics
                except grpc.RpcError as error:
                    reasons.append(_why(error, service.port))
            chips += _devices(answers)
        return chips, reasons

    def _complete(self, found: list[Chip], reasons: list[Reason]) -> Chips:
        # Renumbered, because each of several services counts its own devices from 0.
        chips = tuple(replace(chip, index=index) for index, chip in enumerate(found))
        missing = _missing(chips, reasons)
        percents, reason = self._utilization(len(chips))
        if reason is None:
            chips = tuple(replace(chip, tensorcore_utilization=p) for chip, p in zip(chips, percents, strict=True))
        else:
            missing["tensorcore_utilization"] = reason
        return Chips(chips, self._hardware.kind, unavailable=missing)

    def _utilization(self, count: int) -> tuple[Sequence[float], Reason | None]:
        """TensorCore utilisation of ``count`` devices, or why there is none."""
        if not self._hardware.devices and not self._tensorcores.replaced:
            return (), Reason("no-chip", "No TPU chip is on this machine's PCI bus for libtpu's SDK to ask.")
        percents, reason = self._tensorcores.read()
        if reason is None and len(percents) != count:
            reason = Reason("sdk", f"libtpu's SDK told {len(percents)} values for {count} devices.")
        return percents, reason

    def _without_answer(self, reason: Reason, age: float) -> Chips:
        """What is left to show: figures that are a little old, or only what the PCI bus shows."""
        if reason.code == "late" and self._last is not None and age < STALE_SECONDS:
            return replace(self._last, age=age, unavailable={**self._last.unavailable, "late": reason})
        self._last = None
        known = self._hardware
        chips = tuple(Chip(index, hbm_total=known.hbm_total) for index in range(known.devices))
        if not chips and reason.code == "not-running":
            reason = Reason("no-chip", f"This machine has no TPU chip. ({reason.text})")
        return Chips(chips, known.kind, unavailable={"chips": reason})


def _devices(answers: Mapping[str, Iterable[Any]]) -> list[Chip]:
    """One service's answers → its devices in order of their ids."""
    total, used = (_by_device(answers.get(name, ())) for name in (HBM_TOTAL, HBM_USAGE))
    duty = _by_device(answers.get(DUTY_CYCLE, ()))
    ids = sorted({*total, *used} or duty)
    # The duty cycle is the chip's; memory is counted for each of its one or two devices.
    if duty and len(duty) < len(ids) and len(ids) % len(duty) == 0:
        each = len(ids) // len(duty)
        duty = dict(zip(ids, (value for value in duty.values() for _ in range(each)), strict=True))
    return [Chip(id_, used.get(id_), total.get(id_), duty.get(id_)) for id_ in ids]


def _by_device(metrics: Iterable[Any]) -> dict[int, float | int]:
    """Device id → value, in order of the ids."""
    found = {}
    for metric in metrics:
        gauge = metric.gauge
        found[metric.attribute.value.int_attr] = (
            gauge.as_double if gauge.WhichOneof("value") == "as_double" else gauge.as_int
        )
    return dict(sorted(found.items()))


def _missing(chips: tuple[Chip, ...], reasons: list[Reason]) -> dict[str, Reason]:
    missing = {}
    if any(chip.hbm_used is None for chip in chips):
        missing["hbm"] = reasons[0] if reasons else NOT_REPORTED
    if any(chip.duty_cycle is None for chip in chips):
        missing["duty_cycle"] = reasons[0] if reasons else NOT_REPORTED
    return missing


def _why(error: Any, port: int) -> Reason:
    import grpc

    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Reason("late", f"The TPU runtime on port {port} did not answer within {DEADLINE_SECONDS} s.")
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return Reason(
            "not-running", f"No TPU runtime answers on port {port}: it starts when the first model runs on the TPU."
        )
    return Reason("refused", f"The TPU runtime on port {port} answered {error.code().name}: {error.details()}")
