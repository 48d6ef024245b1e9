"""A stand-in for ``libtpu.sdk``: tells the TensorCore utilisation that the fake metrics server holds."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
from tpu_info.proto import tpu_metric_service_pb2 as messages
from tpu_info.proto.tpu_metric_service_pb2_grpc import RuntimeMetricServiceStub

from comfyui_tpu.monitor.chips import ports
from tests.monitor.metrics_server import TENSORCORE


def _get_metric(name: str) -> SimpleNamespace:
    assert name == "tensorcore_util"
    with grpc.secure_channel(f"localhost:{ports()[0]}", grpc.local_channel_credentials()) as channel:
        request = messages.MetricRequest(metric_name=TENSORCORE)
        found = RuntimeMetricServiceStub(channel).GetRuntimeMetric(request, timeout=5).metric.metrics
    by_device = sorted((metric.attribute.value.int_attr, metric.gauge.as_double) for metric in found)
    # libtpu's SDK gives strings.
    return SimpleNamespace(data=lambda: [f"{value:.2f}" for _, value in by_device])


tpumonitoring = SimpleNamespace(get_metric=_get_metric)
