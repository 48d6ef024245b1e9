"""`setup.py demo --monitor`, and the browser that `setup.py test` looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootstrap import browser, cli, monitor_demo, server
from bootstrap.console import Console, SetupError
from comfyui_tpu.monitor.chips import RuntimeMetrics


def test_played_chips_answer_until_the_demo_ends(console):
    with monitor_demo.played_chips(console) as environment:
        reader = RuntimeMetrics([int(environment["TPU_RUNTIME_METRICS_PORTS"])])
        deadline = time.monotonic() + 10
        while len(reader.read().chips) != monitor_demo.CHIPS:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not reader.read().chips
    reader.close()


def test_the_demos_server_gets_its_port_and_environment(tmp_path):
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("import os, sys\nprint(sys.argv, os.environ['PLAYED'])\n")
    log = tmp_path / "log.txt"
    with server.Server(Path(sys.executable), comfyui, tmp_path / "base", log, 12345, {"PLAYED": "chips"}) as running:
        running.process.wait(30)
    assert "'--port', '12345'" in log.read_text()
    assert "chips" in log.read_text()


def test_monitor_belongs_to_demo(capsys):
    assert cli.parse(["demo", "--monitor"]).monitor
    with pytest.raises(SystemExit):
        cli.parse(["run", "--monitor"])
    assert "--monitor is for demo, got run" in capsys.readouterr().err


def test_dry_run_names_what_it_would_start(monkeypatch, capsys):
    monkeypatch.setattr(cli, "install", lambda console, settings: None)
    assert cli.main(["demo", "--monitor", "--dry-run", "--port", "9999"]) == 0
    assert "-m bootstrap.monitor_demo" in capsys.readouterr().out


@pytest.fixture
def no_browser(monkeypatch, tmp_path):
    """A PATH with nothing on it but what a test puts there."""
    monkeypatch.delenv("COMFYUI_TPU_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put_program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def test_a_browser_that_is_there_is_only_named(no_browser, capsys):
    put_program(no_browser, "chromium")
    browser.ensure_browser(Console(), no_browser)
    assert capsys.readouterr().out == f"= browser {no_browser}/chromium\n"


def test_root_on_debian_installs_it(no_browser, monkeypatch):
    put_program(no_browser, "apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    commands = []

    def run(console, command, log, **options):
        commands.append(command)
        if "install" in command:
            put_program(no_browser, "chromium")

    monkeypatch.setattr(browser, "run_logged", run)
    console = Console()
    browser.ensure_browser(console, no_browser)
    assert [command[1] for command in commands] == ["update", "install"]
    assert console.warnings == []


@pytest.mark.parametrize("user", [0, 1000])
def test_without_one_it_is_said_how_to_get_it(no_browser, monkeypatch, user):
    put_program(no_browser, "apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: user)

    def fail(*_, **__):
        raise SetupError("no network")

    monkeypatch.setattr(browser, "run_logged", fail)
    console = Console()
    browser.ensure_browser(console, no_browser)
    assert "sudo apt-get install chromium" in console.warnings[-1]
    assert ("no network" in console.warnings[0]) == (user == 0)


def test_ci_requires_the_browser():
    text = (cli.REPO / ".ci" / "run").read_text()
    assert "export COMFYUI_TPU_REQUIRE_BROWSER=1" in text
    assert subprocess.run(["bash", "-n", str(cli.REPO / ".ci" / "run")]).returncode == 0
