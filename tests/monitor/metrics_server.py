"""A stand-in for libtpu's runtime metrics service: a real gRPC server that speaks tpu-info's real protobufs.

Used by the tests, and by ``python3 setup.py demo --monitor`` on machines without a TPU:
``python -m tests.monitor.metrics_server --port 8431 --chips 8`` lives until its standard input ends.
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field

import grpc
from tpu_info.proto import tpu_metric_service_pb2 as messages
from tpu_info.proto import tpu_metric_service_pb2_grpc as services

HBM_TOTAL = "tpu.runtime.hbm.memory.total.bytes"
HBM_USAGE = "tpu.runtime.hbm.memory.usage.bytes"
DUTY_CYCLE = "tpu.runtime.tensorcore.dutycycle.percent"
# Not libtpu's: its service does not tell the utilisation. tests/monitor/fake_sdk.py asks here for it.
TENSORCORE = "test.tensorcore.utilization.percent"

GIB = 2**30


@dataclass
class FakeChip:
    hbm_used: int = 0
    hbm_total: int = 32 * GIB
    duty_cycle: float = 0.0
    tensorcore: float | None = 0.0  # None: the SDK does not tell this chip's


@dataclass
class MetricsServer(services.RuntimeMetricServiceServicer):
    """``with MetricsServer([FakeChip(), ...]) as server``: answers on ``server.port`` with what ``chips`` hold then.

    ``delay``: seconds before each answer. ``without``: metrics it does not know. ``devices_per_duty``: how many
    devices share a chip, for which the duty cycle is told once (2 on v2, v3 and TPU7x).
    """

    chips: list[FakeChip]
    port: int = 0
    delay: float = 0.0
    without: set[str] = field(default_factory=set)
    devices_per_duty: int = 1
    calls: int = 0

    def __enter__(self) -> MetricsServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        self._stopping = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        services.add_RuntimeMetricServiceServicer_to_server(self, self._server)
        wanted = f"localhost:{self.port}"
        self.port = self._server.add_secure_port(wanted, grpc.local_server_credentials())
        if not self.port:
            raise OSError(f"no server can be started on {wanted}: is the port taken?")
        self._server.start()

    def stop(self) -> None:
        """Drops every connection at once. ``start()`` opens the same port again."""
        self._stopping.set()
        self._server.stop(None).wait()

    def GetRuntimeMetric(self, request, context):  # the protocol's name
        self.calls += 1
        if self.delay:
            self._stopping.wait(self.delay)
        if request.metric_name in self.without:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no metric {request.metric_name}")
        return messages.MetricResponse(metric=self._metric(request.metric_name))

    def _metric(self, name: str) -> messages.TPUMetric:
        if name == HBM_TOTAL:
            gauges = [messages.Gauge(as_int=chip.hbm_total) for chip in self.chips]
        elif name == HBM_USAGE:
            gauges = [messages.Gauge(as_int=chip.hbm_used) for chip in self.chips]
        elif name == DUTY_CYCLE:
            gauges = [messages.Gauge(as_double=chip.duty_cycle) for chip in self.chips[:: self.devices_per_duty]]
        elif name == TENSORCORE:
            told = [chip.tensorcore for chip in self.chips if chip.tensorcore is not None]
            gauges = [messages.Gauge(as_double=value) for value in told]
        else:
            raise ValueError(f"unknown metric {name}")
        found = [
            messages.Metric(
                attribute=messages.Attribute(key="device-id", value=messages.AttrValue(int_attr=index)), gauge=gauge
            )
            for index, gauge in enumerate(gauges)
        ]
        # libtpu promises no order.
        return messages.TPUMetric(name=name, metrics=reversed(found))


def play(chips: list[FakeChip], second: float) -> None:
    """Figures as of a model that loads, then denoises in steps; each chip a little different. Repeats every 40 s."""
    phase = second % 40
    loaded = min(1.0, phase / 12)
    for index, chip in enumerate(chips):
        wobble = math.sin(second * 1.3 + index)
        working = phase > 12
        chip.hbm_used = int(chip.hbm_total * (0.06 + 0.62 * loaded + (0.04 * (1 + wobble) if working else 0)))
        chip.duty_cycle = 82 + 12 * wobble if working else 6 + 4 * wobble
        chip.tensorcore = max(0.0, 47 + 9 * math.sin(second * 0.9 + 0.5 * index)) if working else 0.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.monitor.metrics_server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chips", type=int, default=8)
    options = parser.parse_args(arguments)
    chips = [FakeChip() for _ in range(options.chips)]
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    with MetricsServer(chips, port=options.port) as server:
        print(f"metrics server on port {server.port} with {len(chips)} chips", flush=True)
        start = time.monotonic()
        while not ended.wait(0.2):
            play(chips, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
