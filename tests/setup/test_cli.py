"""The command line: arguments, old Pythons, dry runs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bootstrap import cli, comfyui, examples, pythons
from bootstrap.console import Console, SetupError, clean_environment, run_logged
from tests.setup.conftest import make_comfyui, tree

REPO = Path(__file__).resolve().parents[2]
INSTALLER = [REPO / "setup.py", *sorted((REPO / "bootstrap").glob("*.py"))]


@pytest.mark.parametrize("file", INSTALLER, ids=lambda file: file.name)
def test_installer_parses_under_python_3_8(file):
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("file", INSTALLER, ids=lambda file: file.name)
def test_installer_imports_only_the_standard_library_and_itself(file):
    allowed = set(sys.stdlib_module_names) | {"bootstrap"}
    if file.name == "demo.py":
        allowed |= {"PIL", "av", "websocket"}  # run by the environment's Python
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_setup_py_itself_has_no_syntax_newer_than_python_2_7():
    """So that an old Python prints the sentence about versions, and not a SyntaxError."""
    module = ast.parse((REPO / "setup.py").read_text(encoding="utf-8"))
    for node in ast.walk(module):
        assert not isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr)), ast.dump(node)
        assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def test_too_old_python_is_told_what_is_needed(tmp_path):
    script = (REPO / "setup.py").read_text(encoding="utf-8").replace("sys.version_info < (3, 8)", "True")
    (tmp_path / "setup.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "setup.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.8 or newer" in done.stderr
    assert sys.executable in done.stderr


def test_defaults():
    settings = cli.parse([])
    assert settings.command == "install"
    assert settings.venv == REPO / ".venv"
    assert settings.comfyui == REPO / "ComfyUI"
    assert (settings.listen, settings.port, settings.example) == ("127.0.0.1", 8188, "wan21_t2v_demo")


def test_arguments_after_the_dashes_go_on_to_the_program():
    settings = cli.parse(["test", "--yes", "--", "tests/setup", "-k", "cli"])
    assert settings.extra == ["tests/setup", "-k", "cli"]
    assert settings.yes


def test_paths_become_absolute():
    assert cli.parse(["--venv", "here", "--comfyui", "~/there"]).venv == Path.cwd() / "here"
    assert cli.parse(["--comfyui", "~/there"]).comfyui == Path.home() / "there"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["run", "--port", "0"], "from 1 to 65535"),
        (["run", "--port", "many"], "invalid int value"),
        (["demo", "--example", "../../etc/passwd"], "without .json"),
        (["install", "--source", "/does/not/exist"], "auto, git, pypi or an existing path"),
        (["install", "--", "-x"], "are for test and run"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no_such_one", "wan21_t2v_1.3b"])
def test_unknown_example_lists_those_that_exist(name, capsys):
    assert cli.main(["demo", "--example", name]) == 1
    said = capsys.readouterr().err
    can_run, real = re.search(r"it can run: (.*)\.\nWith real models.*: (.*)\.", said).groups()
    assert can_run.split(", ") == sorted(examples.DEMOS)
    assert sorted(can_run.split(", ") + real.split(", ")) == sorted(p.stem for p in (REPO / "examples").glob("*.json"))


@pytest.mark.parametrize("command", ["install", "demo", "test", "run"])
def test_dry_run_on_a_bare_machine_changes_nothing(command, repo, monkeypatch, capsys):
    (repo / "examples").mkdir()
    (repo / "examples" / "wan21_t2v_demo.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(cli, "REPO", repo)
    monkeypatch.setattr(comfyui, "git_answers", lambda url, timeout=0: False)
    settings = cli.parse([command, "--dry-run"])
    before = tree(repo)
    assert cli.COMMANDS[command](Console(dry_run=True), cli.Settings(**{**settings.__dict__, "repo": repo})) == 0
    assert tree(repo) == before
    said = capsys.readouterr().out
    assert "would make the virtual environment" in said
    assert "would put ComfyUI 0.3.75" in said
    assert "would link" in said


def test_dry_run_of_the_real_program_leaves_no_trace(tmp_path):
    """As a user starts it: not even __pycache__ appears in the checkout."""
    checkout = tmp_path / "checkout"
    shutil.copytree(REPO / "bootstrap", checkout / "bootstrap", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "requirements", checkout / "requirements")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPO / name, checkout / name)
    before = tree(checkout)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, checkout / "setup.py", "--dry-run", "--source", "pypi"]
    # No git on this PATH, so that nothing asks the network about ComfyUI-Manager.
    environment["PATH"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(checkout) == before


def test_second_installation_at_the_same_time_is_refused(settings):
    with cli._only_one(settings):
        with pytest.raises(SetupError, match="another setup"):
            with cli._only_one(settings):
                pass
    with cli._only_one(settings):  # free again
        pass


def test_failing_command_shows_itself_its_status_and_the_end_of_its_log(console, tmp_path):
    script = "import sys\nfor i in range(100): print('line', i)\nsys.exit(3)"
    with pytest.raises(SetupError) as failure:
        run_logged(console, [sys.executable, "-c", script], tmp_path / "a" / "log.txt", hint="What to do: nothing.")
    text = str(failure.value)
    assert "exit status 3" in text
    assert sys.executable in text
    assert "line 99" in text
    assert "line 10\n" not in text
    assert text.endswith("What to do: nothing.")


def test_command_that_cannot_start_is_an_error_too(console, tmp_path):
    with pytest.raises(SetupError, match="could not start"):
        run_logged(console, [tmp_path / "missing"], tmp_path / "log.txt")


def test_environment_of_commands_cannot_redirect_pip(monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PIP_USER", "1")
    environment = clean_environment()
    assert "PIP_TARGET" not in environment
    assert "PYTHONPATH" not in environment
    assert environment["PIP_USER"] == "0"


def test_run_refuses_a_port_that_is_taken(settings, monkeypatch, capsys):
    make_comfyui(settings.comfyui)
    monkeypatch.setattr(cli, "install", lambda *_: None)
    monkeypatch.setattr(cli.doctor, "port_free", lambda host, port: False)
    monkeypatch.setattr(cli, "_become", lambda *_args, **_kwargs: pytest.fail("ComfyUI was started"))
    with pytest.raises(SetupError, match="8188 is taken"):
        cli._run(Console(), settings)


def test_run_starts_comfyui_on_the_loopback_interface_and_says_how_to_reach_it(settings, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "install", lambda *_: None)
    monkeypatch.setattr(cli.doctor, "port_free", lambda host, port: True)
    monkeypatch.setattr(cli, "_become", lambda command, *_args, **_kwargs: started.append(command) or 0)
    settings = cli.Settings(**{**settings.__dict__, "extra": ["--fast"]})
    assert cli._run(Console(), settings) == 0
    words = [str(word) for word in started[0]]
    assert words[0] == str(settings.venv / "bin" / "python")
    assert words[words.index("--listen") + 1] == "127.0.0.1"
    assert "--cpu" in words
    assert words[-1] == "--fast"
    said = capsys.readouterr().out
    assert "ssh -L 8188:127.0.0.1:8188" in said
    assert "warning" not in said


def test_run_warns_when_it_listens_to_the_world(settings, monkeypatch, capsys):
    monkeypatch.setattr(cli, "install", lambda *_: None)
    monkeypatch.setattr(cli.doctor, "port_free", lambda host, port: True)
    monkeypatch.setattr(cli, "_become", lambda *_args, **_kwargs: 0)
    cli._run(Console(), cli.Settings(**{**settings.__dict__, "listen": "0.0.0.0"}))
    assert "asks for no password" in capsys.readouterr().out


def test_shims_that_fail_are_passed_over(tmp_path, monkeypatch):
    shims, real = tmp_path / "shims", tmp_path / "real"
    for folder in (shims, real):
        folder.mkdir()
    for name in pythons.CANDIDATE_NAMES:
        (shims / name).write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n", encoding="utf-8")
        (shims / name).chmod(0o755)
    (real / "python3.11").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{shims}{os.pathsep}{real}")
    assert pythons.probe(str(shims / "python3.12")) is None
    found = pythons.installed_pythons()
    assert found
    assert not any(str(shims) in python.executable for python in found)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 3), (3, 13, 9)])
def test_suitable_pythons(version):
    assert pythons.Python("x", version, True).suitable


@pytest.mark.parametrize("version", [(3, 10, 12), (3, 14, 0)])
def test_pythons_the_locks_do_not_fit(version):
    assert not pythons.Python("x", version, True).suitable


def test_missing_ensurepip_names_the_debian_package(console, settings, monkeypatch):
    monkeypatch.setattr(pythons, "installed_pythons", lambda: [pythons.Python("/usr/bin/python3", (3, 12, 3), False)])
    monkeypatch.setattr(pythons, "on_path", lambda *_: [])
    monkeypatch.setattr(pythons, "_runs", lambda command: False)
    with pytest.raises(SetupError, match=r"sudo apt install python3\.12-venv"):
        pythons.find_python(console, settings)


def test_no_python_and_no_uv_says_what_to_install(console, settings, monkeypatch):
    monkeypatch.setattr(pythons, "installed_pythons", list)
    monkeypatch.setattr(pythons, "_runs", lambda command: False)
    with pytest.raises(SetupError, match=r"3\.11 to 3\.13") as failure:
        pythons.find_python(console, settings)
    assert "deadsnakes" in str(failure.value)
    assert "uv" in str(failure.value)


def test_folder_that_is_no_venv_is_left_alone(console, settings):
    settings.venv.mkdir()
    (settings.venv / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(SetupError, match="is not a virtual environment"):
        pythons.ensure_venv(console, settings)
    assert (settings.venv / "thesis.txt").read_text(encoding="utf-8") == "precious"


def test_unfinished_venv_is_built_again(console, settings, monkeypatch):
    settings.venv.mkdir()
    (settings.venv / "pyvenv.cfg").write_text("", encoding="utf-8")
    (settings.venv / pythons.UNFINISHED).touch()
    (settings.venv / "half").touch()
    base = pythons.Python(sys.executable, sys.version_info[:3], True)
    monkeypatch.setattr(pythons, "find_python", lambda *_: base)

    def build(console, command, log, hint=""):
        assert command[1:3] == ["-m", "venv"]
        assert not (settings.venv / "half").exists()
        (settings.venv / "bin").mkdir()
        (settings.venv / "bin" / "python").symlink_to(sys.executable)
        (settings.venv / "pyvenv.cfg").write_text("", encoding="utf-8")

    monkeypatch.setattr(pythons, "run_logged", build)
    assert pythons.ensure_venv(console, settings).suitable
    assert not (settings.venv / pythons.UNFINISHED).exists()
    monkeypatch.setattr(pythons, "run_logged", lambda *_args, **_kwargs: pytest.fail("built twice"))
    assert pythons.ensure_venv(console, settings).suitable


def test_venv_whose_python_is_gone_is_reported(console, settings):
    (settings.venv / "bin").mkdir(parents=True)
    (settings.venv / "pyvenv.cfg").write_text("", encoding="utf-8")
    (settings.venv / "bin" / "python").symlink_to("/gone/python3.11")
    with pytest.raises(SetupError, match="its Python does not run"):
        pythons.ensure_venv(console, settings)
