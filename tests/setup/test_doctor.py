"""The doctor tells the truth, changes nothing and keeps secrets."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from bootstrap import doctor
from bootstrap.doctor import OK, WARN, WRONG, Finding, has_tpu, tpu_chips
from bootstrap.packages import STAMP, Wanted
from bootstrap.pythons import Python, probe
from tests.setup.conftest import make_comfyui, put_package, tree

HIDDEN = "hf_thisIsASecretThatMustNotBeShown"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "git_answers", lambda url, timeout=0: False)
    monkeypatch.setattr(doctor, "url_answers", lambda url, timeout=0: False)
    here = [Python(sys.executable, sys.version_info[:3], True)]
    monkeypatch.setattr(doctor, "installed_pythons", lambda: here)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def installed(settings) -> Python:
    """A complete installation, as far as the doctor looks."""
    (settings.venv / "bin").mkdir(parents=True)
    (settings.venv / "pyvenv.cfg").write_text("", encoding="utf-8")
    (settings.venv / "bin" / "python").symlink_to(sys.executable)
    python = probe(str(settings.python))
    put_package(settings.venv, "six", "1.17.0")
    put_package(settings.venv, "torch", "2.11.0+cpu")
    put_package(settings.venv, "comfyui_tpu", "0.1.0", url=settings.repo.as_uri())
    stamp = Wanted(python, False, False).stamp(settings.repo)
    (settings.venv / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    make_comfyui(settings.comfyui)
    (settings.comfyui / "custom_nodes").mkdir()
    pack = settings.repo / "custom_nodes" / "ComfyUI-Wan21-TPU"
    (settings.comfyui / "custom_nodes" / pack.name).symlink_to(pack)
    return python


def states(settings) -> dict[str, str]:
    return {finding.what: finding.state for finding in doctor.examine(settings)}


def test_bare_machine_is_wrong_and_nothing_is_changed(settings, capsys):
    before = tree(settings.repo)
    assert doctor.run(settings) == 1
    assert tree(settings.repo) == before
    said = capsys.readouterr().out
    assert "-> python3 setup.py install" in said
    found = states(settings)
    assert (found["environment"], found["ComfyUI"]) == (WRONG, WRONG)


def test_complete_installation_is_right_although_there_are_warnings(settings, installed):
    assert doctor.run(settings) == 0
    found = states(settings)
    assert found["packages"] == OK
    assert found["ComfyUI"] == OK
    assert found["node pack"] == OK
    assert found["Hugging Face token"] == WARN
    assert found["git"] == WARN


def test_package_that_differs_from_the_lock_is_wrong(settings, installed, capsys):
    (settings.venv / "lib/python3.11/site-packages/six-1.17.0.dist-info").rename(
        settings.venv / "lib/python3.11/site-packages/six-1.16.0.dist-info"
    )
    assert doctor.run(settings) == 1
    assert "six: locked 1.17.0, installed 1.16.0" in capsys.readouterr().out


def test_unfinished_installation_is_wrong(settings, installed):
    (settings.venv / STAMP).unlink()
    assert states(settings)["packages"] == WRONG


def test_environment_of_another_checkout_is_wrong(settings, installed, tmp_path):
    direct = settings.venv / "lib/python3.11/site-packages/comfyui_tpu-0.1.0.dist-info/direct_url.json"
    direct.write_text(json.dumps({"url": (tmp_path / "elsewhere").as_uri()}), encoding="utf-8")
    assert states(settings)["packages"] == WRONG


def test_pack_that_is_not_linked_is_wrong(settings, installed):
    (settings.comfyui / "custom_nodes" / "ComfyUI-Wan21-TPU").unlink()
    assert states(settings)["node pack"] == WRONG


def test_other_comfyui_release_is_a_warning(settings, installed):
    (settings.comfyui / "comfyui_version.py").write_text('__version__ = "9.9.9"\n', encoding="utf-8")
    assert states(settings)["ComfyUI"] == WARN


def test_full_disk_is_wrong_before_an_installation(settings, monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert states(settings)["disk"] == WRONG


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_token_in_the_environment_is_seen_and_never_shown(settings, monkeypatch, capsys, name):
    monkeypatch.setenv(name, HIDDEN)
    doctor.run(settings)
    said = capsys.readouterr().out
    assert f"present (environment variable {name})" in said
    assert HIDDEN not in said
    assert HIDDEN[:8] not in said


def test_token_in_a_file_is_seen_and_never_shown(settings, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(HIDDEN, encoding="utf-8")
    doctor.run(settings)
    said = capsys.readouterr().out
    assert "present (file" in said
    assert HIDDEN not in said


def test_taken_port_is_a_warning(settings):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        busy = doctor.Settings(**{**settings.__dict__, "port": listener.getsockname()[1]})
        assert states(busy)["port"] == WARN
    assert states(busy)["port"] == OK


def put_pci(root: Path, slot: str, vendor: str, device: str) -> None:
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n", encoding="ascii")
    (folder / "device").write_text(device + "\n", encoding="ascii")


def test_tpu_chips_are_counted_on_the_pci_bus(tmp_path):
    put_pci(tmp_path, "0000:00:04.0", "0x1ae0", "0x006f")
    put_pci(tmp_path, "0000:00:05.0", "0x1ae0", "0x006f")
    put_pci(tmp_path, "0000:00:06.0", "0x1ae0", "0x0042")  # Google's network card
    put_pci(tmp_path, "0000:00:07.0", "0x10de", "0x006f")
    assert tpu_chips(tmp_path) == (2, "v6e")
    assert not has_tpu(tmp_path)  # no device file: libtpu cannot reach them
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/0").touch()
    assert has_tpu(tmp_path)


def test_vfio_of_other_hardware_is_no_tpu(tmp_path):
    put_pci(tmp_path, "0000:00:07.0", "0x10de", "0x2330")
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/12").touch()
    assert not has_tpu(tmp_path)


def test_other_makers_accelerators_are_no_tpu(tmp_path):
    (tmp_path / "dev/accel").mkdir(parents=True)
    (tmp_path / "dev/accel/accel0").touch()
    assert not has_tpu(tmp_path)


def test_accel_files_are_a_tpu(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    assert has_tpu(tmp_path)


def test_table_puts_the_remedy_under_the_finding():
    lines = doctor.table([Finding(OK, "a", "fine"), Finding(WRONG, "long name", "broken", "mend it")]).splitlines()
    assert lines[0].startswith("ok ")
    assert lines[1].startswith("WRONG")
    assert lines[2].strip() == "-> mend it"
