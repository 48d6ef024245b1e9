"""TensorCore utilisation comes from a process of its own, which may be missing, slow or dead."""

import functools
import subprocess
import sys
import time

import psutil
import pytest

from comfyui_tpu.monitor import tensorcore
from comfyui_tpu.monitor.chips import RuntimeMetrics
from comfyui_tpu.monitor.tensorcore import SDK, TensorCores
from tests.monitor import waiting
from tests.monitor.metrics_server import FakeChip, MetricsServer

FAKE = "tests.monitor.fake_sdk"
read_until = functools.partial(waiting.read_until, seconds=100.0)  # a helper process starts first


@pytest.fixture
def cores():
    made = []

    def make(sdk: str) -> TensorCores:
        made.append(TensorCores(sdk))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A folder for modules that the helper process can import, besides this repository."""
    repository = str(tensorcore.__file__).rsplit("/", 3)[0]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{repository}")
    return tmp_path


def test_utilization_reaches_the_chips(path, monkeypatch):
    with MetricsServer([FakeChip(tensorcore=12.5), FakeChip(tensorcore=75.0)]) as server:
        monkeypatch.setenv("TPU_RUNTIME_METRICS_PORTS", str(server.port))
        reader = RuntimeMetrics(sdk=FAKE)
        try:
            assert reader.read().unavailable["tensorcore_utilization"].code == "starting"
            found = read_until(reader, lambda found: not found.unavailable)
            assert [chip.tensorcore_utilization for chip in found.chips] == [12.5, 75.0]
            # One that the SDK leaves out: it must not be told anybody else's figure.
            server.chips.append(FakeChip(tensorcore=None))
            missing = reader.read().unavailable
            assert "2 values for 3 devices" in missing["tensorcore_utilization"].text
        finally:
            reader.close()


def test_asking_never_waits_for_the_answer(path, cores):
    (path / "slow_sdk.py").write_text("import time; time.sleep(60)\n")
    cores = cores("slow_sdk")
    start = time.monotonic()
    assert cores.read()[1].code == "starting"
    assert cores.read()[1].code == "starting"
    assert time.monotonic() - start < 20, "it waited for an answer that takes a minute"


def test_old_figures_are_not_shown_while_the_sdk_is_late(path, cores, monkeypatch):
    (path / "stalling_sdk.py").write_text(
        "import time\nanswers = iter([['25.0']])\nclass Metric:\n    def data(self):\n"
        "        return next(answers, None) or time.sleep(60)\n"
        "class tpumonitoring:\n    get_metric = staticmethod(lambda name: Metric())\n"
    )
    cores = cores("stalling_sdk")
    assert read_until(cores, lambda found: found[0]) == ([25.0], None)
    monkeypatch.setattr(tensorcore, "LATE_SECONDS", 0.2)
    assert read_until(cores, lambda found: not found[0])[1].code == "late"


def test_a_silent_sdk_is_given_up(path, cores, monkeypatch):
    monkeypatch.setattr(tensorcore, "SILENT_SECONDS", 0.2)
    (path / "slow_sdk.py").write_text("import time; time.sleep(60)\n")
    cores = cores("slow_sdk")
    cores.read()
    process = cores._process
    read_until(cores, lambda found: found[1].code == "sdk")
    assert process.poll() is not None
    assert cores.read()[1].text == "libtpu's SDK does not answer."
    assert cores._process is None


def test_a_helper_that_dies_is_not_started_again_at_once(path, cores):
    (path / "dying_sdk.py").write_text("import os; os._exit(7)\n")
    cores = cores("dying_sdk")
    read_until(cores, lambda found: found[1].code == "sdk")
    cores.read()
    assert cores._process is None


def test_what_the_sdk_complains_about_is_passed_on(path, cores):
    _, reason = read_until(cores("no_such_sdk"), lambda found: found[1].code == "sdk")
    assert "No module named 'no_such_sdk'" in reason.text


def test_the_real_sdk_is_not_started_where_there_is_no_chip(monkeypatch):
    monkeypatch.setattr(TensorCores, "_start", lambda self: pytest.fail("started"))
    with MetricsServer([FakeChip()]) as server:
        reader = RuntimeMetrics([server.port], SDK)
        assert reader.read().unavailable["tensorcore_utilization"].code == "no-chip"
        reader.close()


def test_the_helper_ends_with_the_process_that_started_it(path, tmp_path):
    (path / "quick_sdk.py").write_text("class tpumonitoring:\n    get_metric = None\n")
    code = (
        "from comfyui_tpu.monitor.tensorcore import TensorCores; import os; cores = TensorCores('quick_sdk');"
        "cores.read(); print(cores._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    deadline = time.monotonic() + 60
    while _alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
