"""What a sample holds, and that nothing a chip reader does can spoil it."""

import json
import time

import psutil
import pytest

from comfyui_tpu.monitor.prometheus import to_text
from comfyui_tpu.monitor.sample import Chip, Chips, CpuMeter, Disk, InProcess, Reason, Sample, Sampler, Space

NOT_RUNNING = Reason("not-running", "No TPU runtime answers.")


class Reader:
    def __init__(self, found: Chips | Exception):
        self.found = found
        self.closed = 0

    def read(self) -> Chips:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def close(self) -> None:
        self.closed += 1


def test_machine_figures_are_plausible():
    sample = Sampler(Reader(Chips())).sample()
    assert 0 <= sample.cpu <= 100
    assert sample.ram.total == psutil.virtual_memory().total
    assert 0 < sample.ram.percent < 100
    assert sample.disks
    assert all(0 < disk.used < disk.total for disk in sample.disks)
    assert abs(sample.time - time.time()) < 5


def test_cpu_is_a_mean_since_the_previous_look_from_whichever_thread(monkeypatch):
    times = iter([(10.0, 100.0), (60.0, 200.0), (60.0, 200.01), (60.0, 300.0)])
    monkeypatch.setattr(CpuMeter, "_seconds", staticmethod(lambda: next(times)))
    meter = CpuMeter()
    assert meter.percent() == 50
    assert meter.percent() == 50  # too soon for a new figure
    assert meter.percent() == 0


def test_a_busy_core_shows():
    meter = CpuMeter()
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        pass
    assert meter.percent() >= 50 / psutil.cpu_count()


def test_chips_and_reasons_are_passed_on():
    chips = Chips((Chip(0, 1, 2, 3.0),), "TPU v6e", 1.5, {"tensorcore_utilization": NOT_RUNNING})
    sample = Sampler(Reader(chips), lambda: InProcess({"transformer": 5})).sample()
    assert (sample.chips, sample.chip_kind, sample.chips_age) == (chips.chips, "TPU v6e", 1.5)
    assert (dict(sample.held), sample.unavailable) == ({"transformer": 5}, chips.unavailable)


def test_a_reader_that_fails_leaves_the_rest():
    sample = Sampler(Reader(RuntimeError("broken"))).sample()
    assert sample.ram.total > 0
    assert sample.unavailable["chips"] == Reason("error", "RuntimeError: broken")


def test_a_process_that_cannot_be_asked_leaves_the_rest():
    def fail():
        raise RuntimeError("the device is gone")

    sample = Sampler(Reader(Chips((Chip(0, 1, 2),))), fail).sample()
    assert (sample.chips, dict(sample.held)) == ((Chip(0, 1, 2),), {})


def test_hbm_of_this_process_stands_in_for_a_silent_service():
    found = Chips((Chip(0, hbm_total=9),), "TPU v6e", unavailable={"chips": NOT_RUNNING})
    sample = Sampler(Reader(found), lambda: InProcess({}, (Chip(0, 3, 8),))).sample()
    assert sample.chips == (Chip(0, 3, 8),)
    assert sample.unavailable == {"duty_cycle": NOT_RUNNING, "tensorcore_utilization": NOT_RUNNING}


def test_figures_of_the_service_come_first():
    found = Chips((Chip(0, 1, 2), Chip(1, 1, 2)))
    assert Sampler(Reader(found), lambda: InProcess({}, (Chip(0, 3, 8),))).sample().chips == found.chips


def test_closing_ends_the_readers_connections():
    reader = Reader(Chips())
    sampler = Sampler(reader)
    sampler.close()
    assert reader.closed == 1
    assert sampler.sample().chips == ()


SAMPLE = Sample(
    time=1.23456,
    cpu=12.345,
    ram=Space(1, 4),
    disks=(Disk(3, 4, "/"),),
    chips=(Chip(0, 10, 40, 33.333), Chip(1)),
    held={'say "hi"\n': 7},
    unavailable={"hbm": NOT_RUNNING},
)


def test_json_is_plain_and_rounded():
    found = json.loads(json.dumps(SAMPLE.to_json()))
    assert found["cpu"] == 12.3
    assert found["chips"][0] == {
        "index": 0,
        "hbm_used": 10,
        "hbm_total": 40,
        "duty_cycle": 33.3,
        "tensorcore_utilization": None,
    }
    assert found["disks"] == [{"used": 3, "total": 4, "path": "/"}]
    assert found["unavailable"] == {"hbm": {"code": "not-running", "text": "No TPU runtime answers."}}


@pytest.mark.parametrize(("space", "percent"), [(Space(1, 4), 25), (Space(0, 0), 0)])
def test_percent(space, percent):
    assert space.percent == percent


def test_prometheus_text():
    text = to_text(SAMPLE)
    assert "# TYPE comfyui_tpu_cpu_percent gauge\ncomfyui_tpu_cpu_percent 12.345\n" in text
    assert 'comfyui_tpu_hbm_used_bytes{chip="0"} 10\n' in text
    assert 'comfyui_tpu_disk_total_bytes{path="/"} 4\n' in text
    # What is not available is left out, down to the heading.
    assert 'chip="1"' not in text
    assert "tensorcore" not in text
    assert 'comfyui_tpu_held_bytes{component="say \\"hi\\"\\n"} 7\n' in text


def test_prometheus_text_is_what_prometheus_own_parser_reads():
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(to_text(SAMPLE))}
    (held,) = families["comfyui_tpu_held_bytes"].samples
    assert (held.labels, held.value) == ({"component": 'say "hi"\n'}, 7)
    assert families["comfyui_tpu_duty_cycle_percent"].samples[0].value == 33.333
