"""Reading the TPU runtime's metrics service: a real gRPC server answers with tpu-info's real protobufs."""

import sys
import time

import pytest

from comfyui_tpu.monitor import chips as module
from comfyui_tpu.monitor.chips import HBM_TOTAL, HBM_USAGE, RuntimeMetrics, _Hardware, ports
from comfyui_tpu.monitor.sample import Chip
from tests.monitor.metrics_server import DUTY_CYCLE, GIB, FakeChip, MetricsServer
from tests.monitor.waiting import read_until


@pytest.fixture
def reader():
    """Makes readers and closes them."""
    made = []

    def make(*servers: MetricsServer, sdk: str | None = None) -> RuntimeMetrics:
        made.append(RuntimeMetrics([server.port for server in servers], sdk))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("count", [1, 8, 256])
def test_every_chip_is_read(count, reader):
    fakes = [FakeChip(index * GIB // 16, 32 * GIB, index / 4) for index in range(count)]
    with MetricsServer(fakes) as server:
        found = reader(server).read()
    assert found.chips == tuple(Chip(i, i * GIB // 16, 32 * GIB, i / 4) for i in range(count))
    assert set(found.unavailable) == {"tensorcore_utilization"}


def test_values_follow_the_chips(reader):
    with MetricsServer([FakeChip(hbm_used=1, duty_cycle=10.0)]) as server:
        reader = reader(server)
        assert reader.read().chips[0].hbm_used == 1
        server.chips[0].hbm_used, server.chips[0].duty_cycle = 2**40, 99.5
        found = reader.read()
    assert (found.chips[0].hbm_used, found.chips[0].duty_cycle, found.age) == (2**40, 99.5, 0)


def test_a_dropped_connection_is_told_and_opened_again(reader):
    with MetricsServer([FakeChip(hbm_used=7)]) as server:
        reader = reader(server)
        assert reader.read().chips
        server.stop()
        gone = reader.read()
        assert not gone.chips
        assert gone.unavailable["chips"].code == "no-chip"
        server.start()
        assert read_until(reader, lambda found: found.chips).chips[0].hbm_used == 7


def test_a_late_answer_shows_the_last_figures_with_their_age(reader, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 60.0)
    with MetricsServer([FakeChip(hbm_used=7)]) as server:
        reader = reader(server)
        assert reader.read().chips[0].hbm_used == 7
        server.delay, patience = 60.0, module.DEADLINE_SECONDS
        monkeypatch.setattr(module, "DEADLINE_SECONDS", 0.4)
        start = time.monotonic()
        found = reader.read()
        assert time.monotonic() - start < 20, "it waited for the answer"
        assert found.chips[0].hbm_used == 7
        assert found.age >= 0.4
        assert found.unavailable["late"].code == "late"
        server.delay = 0.0
        monkeypatch.setattr(module, "DEADLINE_SECONDS", patience)
        assert read_until(reader, lambda found: found.age == 0).chips[0].hbm_used == 7


def test_figures_that_are_too_old_are_no_longer_shown(reader, monkeypatch):
    with MetricsServer([FakeChip()]) as server:
        reader = reader(server)
        assert reader.read().chips
        server.delay = 60.0
        monkeypatch.setattr(module, "DEADLINE_SECONDS", 0.4)
        monkeypatch.setattr(module, "STALE_SECONDS", 0.1)
        found = reader.read()
    assert not found.chips
    assert found.unavailable["chips"].code == "late"


def test_a_metric_the_runtime_does_not_know_is_missing_alone(reader):
    with MetricsServer([FakeChip(hbm_used=7)], without={DUTY_CYCLE}) as server:
        found = reader(server).read()
    assert found.chips == (Chip(0, 7, 32 * GIB),)
    assert "NOT_FOUND" in found.unavailable["duty_cycle"].text
    assert "hbm" not in found.unavailable


def test_hbm_can_be_missing_while_the_duty_cycle_is_known(reader):
    with MetricsServer([FakeChip(duty_cycle=5.0)] * 2, without={HBM_USAGE, HBM_TOTAL}) as server:
        found = reader(server).read()
    assert found.chips == (Chip(0, duty_cycle=5.0), Chip(1, duty_cycle=5.0))
    assert "hbm" in found.unavailable


def test_a_runtime_that_reports_nothing_is_no_failure(reader):
    with MetricsServer([]) as server:
        found = reader(server).read()
    assert found.chips == ()
    assert found.unavailable["chips"].code == "not-reported"


def test_two_devices_of_one_chip_share_its_duty_cycle(reader):
    fakes = [FakeChip(duty_cycle=10.0), FakeChip(duty_cycle=10.0), FakeChip(duty_cycle=90.0), FakeChip(duty_cycle=90.0)]
    with MetricsServer(fakes, devices_per_duty=2) as server:
        found = reader(server).read()
    assert [chip.duty_cycle for chip in found.chips] == [10.0, 10.0, 90.0, 90.0]


def test_several_processes_share_the_host(reader):
    with MetricsServer([FakeChip(1), FakeChip(2)]) as one, MetricsServer([FakeChip(3), FakeChip(4)]) as two:
        found = reader(one, two).read()
    assert [(chip.index, chip.hbm_used) for chip in found.chips] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_chips_without_a_runtime_are_counted_from_the_pci_bus(reader, monkeypatch):
    monkeypatch.setattr(module, "hardware", lambda: _Hardware("TPU v6e", 4, 32 * GIB))
    with MetricsServer([]) as server:
        server.stop()
        found = reader(server).read()
        server.start()
    assert found.kind == "TPU v6e"
    assert found.chips == tuple(Chip(index, hbm_total=32 * GIB) for index in range(4))
    assert found.unavailable["chips"].code == "not-running"


def test_without_tpu_info_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tpu_info", None)
    found = RuntimeMetrics().read()
    assert found.unavailable["chips"].code == "no-tpu-info"
    assert "pip install 'tpu-info" in found.unavailable["chips"].text


@pytest.mark.parametrize(("text", "expected"), [("", (8431,)), ("9000", (9000,)), ("8431, 8432,", (8431, 8432))])
def test_ports_of_the_environment(text, expected, monkeypatch):
    monkeypatch.setenv("TPU_RUNTIME_METRICS_PORTS", text)
    assert ports() == expected


@pytest.mark.parametrize("text", ["none", "0", "65536", "-1", "8431;8432"])
def test_bad_ports_are_named(text, monkeypatch):
    monkeypatch.setenv("TPU_RUNTIME_METRICS_PORTS", text)
    found = RuntimeMetrics().read()
    assert found.unavailable["chips"].code == "bad-ports"
    assert repr(text) in found.unavailable["chips"].text
