"""Locks, the stamp, and the promise that a second installation changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bootstrap import packages
from bootstrap.console import SetupError
from bootstrap.layout import Settings
from bootstrap.packages import Pin, Wanted, deviations, installed_versions, read_lock
from bootstrap.pythons import Python
from tests.setup.conftest import put_package, tree

REPO = Path(__file__).resolve().parents[2]
LOCKS = ("lock-py311.txt", "lock-py312.txt", "lock-test.txt", "lock-torch-cuda.txt")


@pytest.mark.parametrize("name", LOCKS)
def test_locks_of_this_repository_are_complete_and_readable(name):
    pins = read_lock(REPO / "requirements" / name)
    assert pins
    assert len({pin.key for pin in pins}) == len(pins)


PAIRS = [("lock-py311.txt", "0.10.2", "0.0.42.1"), ("lock-py312.txt", "0.12.0.1", "0.0.50.1")]


@pytest.mark.parametrize(("name", "jax", "libtpu"), PAIRS)
def test_locked_versions_are_the_ones_that_work_together(name, jax, libtpu):
    pins = {pin.key: pin for pin in read_lock(REPO / "requirements" / name)}
    assert (pins["jax"].version, pins["libtpu"].version) == (jax, libtpu)
    assert pins["torch"].version == "2.11.0"
    assert pins["torchax"].version == "0.0.13"
    assert pins["comfyui-frontend-package"].version == "1.32.9"
    assert "x86_64" in pins["libtpu"].marker


def test_cpu_wheels_of_torch_need_nothing_of_the_cuda_lock():
    main = {pin.key for pin in read_lock(REPO / "requirements" / "lock-py311.txt")}
    assert not [name for name in main if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_every_requirement_of_this_repository_is_locked():
    text = (REPO / "requirements.txt").read_text(encoding="utf-8")
    names = {packages.canonical(name) for name in re.findall(r"^([A-Za-z][\w.-]*)", text, re.MULTILINE)}
    for lock in LOCKS[:2]:
        assert names <= {pin.key for pin in read_lock(REPO / "requirements" / lock)}


NO_PINS = ["six", "six>=1.0", "six==1.17 ; python_version < '4'", "-r other.txt", "six==1.0 --hash=x"]


@pytest.mark.parametrize("line", NO_PINS)
def test_lock_line_that_is_not_an_exact_pin_is_refused(tmp_path, line):
    (tmp_path / "lock.txt").write_text(f"# lock\n{line}\n", encoding="utf-8")
    with pytest.raises(SetupError, match="line 2"):
        read_lock(tmp_path / "lock.txt")


def test_marker_that_does_not_hold_here_is_no_deviation(monkeypatch):
    monkeypatch.setattr(packages.platform, "machine", lambda: "aarch64")
    marker = 'sys_platform == "linux" and platform_machine == "x86_64"'
    assert deviations([Pin("libtpu", "0.0.42.1", marker)], {}) == {}


def test_local_version_satisfies_the_public_one():
    pins = [Pin("torch", "2.11.0")]
    assert deviations(pins, {"torch": "2.11.0+cpu"}) == {}
    assert list(deviations(pins, {"torch": "2.11.1+cpu"})) == ["torch"]
    assert list(deviations(pins, {})) == ["torch"]


def test_half_installed_package_does_not_count_and_is_forgotten(tmp_path):
    whole = put_package(tmp_path, "six", "1.17.0")
    half = put_package(tmp_path, "scipy", "1.17.1", finished=False)
    strange = put_package(tmp_path, "not_ours", "1.0", finished=False)
    assert installed_versions(tmp_path) == {"six": "1.17.0"}
    packages.forget_half_installed(tmp_path, [Pin("six", "1.17.0"), Pin("scipy", "1.17.1")])
    assert whole.exists()
    assert not half.exists()
    assert strange.exists()


def test_names_in_folders_are_normalised(tmp_path):
    put_package(tmp_path, "Jinja2", "3.1.6")
    put_package(tmp_path, "comfyui_frontend_package", "1.32.9")
    assert installed_versions(tmp_path) == {"jinja2": "3.1.6", "comfyui-frontend-package": "1.32.9"}


class FakePip:
    """Stands in for every command the installation runs; `installs` is what pip leaves behind."""

    def __init__(self, settings: Settings, monkeypatch) -> None:
        self.settings, self.commands, self.fail_at = settings, [], ""
        self.installs = {"six": "1.17.0", "torch": "2.11.0+cpu", "pytest": "9.2.0", "triton": "3.6.0"}
        monkeypatch.setattr(packages, "run_logged", self)
        monkeypatch.setattr(packages, "url_answers", lambda *_: False)

    def __call__(self, console, command, log, cwd=None, hint="", progress=None, environment=None):
        words = [str(word) for word in command]
        self.commands.append(words)
        if self.fail_at and self.fail_at in words:
            raise SetupError("interrupted here")
        if "--editable" in words:
            self.put("comfyui_tpu", "0.1.0", self.settings.repo.as_uri())
        elif "-r" in words:
            for line in Path(words[words.index("-r") + 1]).read_text(encoding="utf-8").splitlines():
                name = line.split("==")[0]
                self.put(name, self.installs[name])

    def put(self, name: str, version: str, url: str | None = None) -> None:
        site = self.settings.venv / "lib" / "python3.11" / "site-packages"
        for old in site.glob(f"{name}-*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        put_package(self.settings.venv, name, version, url=url)


@pytest.fixture
def pip(settings, monkeypatch) -> FakePip:
    settings.venv.mkdir()
    return FakePip(settings, monkeypatch)


def test_second_installation_runs_no_command_and_changes_no_file(console, settings, python, pip):
    packages.ensure_packages(console, settings, python, test=False)
    assert pip.commands
    pip.commands.clear()
    before = tree(settings.repo)
    packages.ensure_packages(console, settings, python, test=False)
    assert pip.commands == []
    assert tree(settings.repo) == before


def test_locked_packages_are_installed_without_resolving_and_without_building(console, settings, python, pip):
    packages.ensure_packages(console, settings, python, test=False)
    words = pip.commands[0]
    assert words[0] == str(settings.venv / "bin" / "python")
    assert "--no-deps" in words
    assert words[words.index("--only-binary") + 1] == ":all:"
    assert "--break-system-packages" not in words


def test_interrupted_installation_is_repeated(console, settings, python, pip):
    pip.fail_at = "--editable"
    with pytest.raises(SetupError, match="interrupted here"):
        packages.ensure_packages(console, settings, python, test=False)
    assert packages.read_stamp(settings.venv) == {}
    pip.fail_at = ""
    packages.ensure_packages(console, settings, python, test=False)
    assert packages.read_stamp(settings.venv) == Wanted(python, False, False).stamp(settings.repo)


def test_changed_lock_is_installed_again(console, settings, python, pip):
    packages.ensure_packages(console, settings, python, test=False)
    pip.commands.clear()
    lock = settings.repo / "requirements" / "lock-py311.txt"
    lock.write_text(lock.read_text(encoding="utf-8").replace("1.17.0", "1.18.0"), encoding="utf-8")
    pip.installs["six"] = "1.18.0"
    packages.ensure_packages(console, settings, python, test=False)
    assert pip.commands
    assert installed_versions(settings.venv)["six"] == "1.18.0"


def test_package_changed_by_hand_is_put_back(console, settings, python, pip):
    packages.ensure_packages(console, settings, python, test=False)
    pip.put("six", "1.0.0")
    packages.ensure_packages(console, settings, python, test=False)
    assert installed_versions(settings.venv)["six"] == "1.17.0"


def test_pip_that_installs_something_else_is_an_error(console, settings, python, pip):
    pip.installs["six"] = "1.16.0"
    with pytest.raises(SetupError, match=r"six: locked 1\.17\.0, installed 1\.16\.0"):
        packages.ensure_packages(console, settings, python, test=False)
    assert packages.read_stamp(settings.venv) == {}


def test_install_after_test_keeps_the_test_tools(console, settings, python, pip):
    packages.ensure_packages(console, settings, python, test=True)
    pip.commands.clear()
    packages.ensure_packages(console, settings, python, test=False)
    assert pip.commands == []
    assert "pytest" in installed_versions(settings.venv)


def test_cuda_libraries_come_only_with_pypis_torch(console, settings, python, pip, monkeypatch):
    monkeypatch.setattr(packages.sys, "platform", "linux")
    pip.installs["torch"] = "2.11.0"
    packages.ensure_packages(console, settings, python, test=False)
    assert "triton" in installed_versions(settings.venv)
    pip.commands.clear()
    packages.ensure_packages(console, settings, python, test=False)
    assert pip.commands == []


def test_cpu_torch_is_taken_where_its_index_answers(console, settings, python, pip, monkeypatch):
    monkeypatch.setattr(packages.sys, "platform", "linux")
    monkeypatch.setattr(packages, "url_answers", lambda url, timeout=0: True)

    def run(console, command, log, **options):
        if "--index-url" in command:
            pip.commands.append(command)
            pip.put("torch", "2.11.0+cpu")
        else:
            FakePip.__call__(pip, console, command, log, **options)

    monkeypatch.setattr(packages, "run_logged", run)
    packages.ensure_packages(console, settings, python, test=False)
    assert "https://download.pytorch.org/whl/cpu" in pip.commands[0]
    assert "triton" not in installed_versions(settings.venv)
    assert packages.read_stamp(settings.venv)["cuda"] is False


def test_dry_run_counts_and_changes_nothing(settings, python, pip, capsys):
    from bootstrap.console import Console

    dry = Settings(**{**settings.__dict__, "dry_run": True})
    before = tree(settings.repo)
    packages.ensure_packages(Console(dry_run=True), dry, python, test=True)
    assert tree(settings.repo) == before
    assert pip.commands == []
    assert "would install 3 of 3 locked packages" in capsys.readouterr().out


def test_another_comfyui_release_brings_its_own_frontend(settings, python, tmp_path):
    lock = settings.repo / "requirements" / "lock-py311.txt"
    lock.write_text("comfyui-frontend-package==1.32.9\nsix==1.17.0\n", encoding="utf-8")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("comfyui-frontend-package==9.9.9\n", encoding="utf-8")
    assert [pin.key for pin in Wanted(python, False, False, requirements).pins(settings.repo)] == ["six"]
    assert len(Wanted(python, False, False).pins(settings.repo)) == 2


def test_python_decides_which_lock(repo):
    assert packages.lock_files(repo, (3, 11, 7), False, False)[0].name == "lock-py311.txt"
    for minor in (12, 13):
        assert packages.lock_files(repo, (3, minor, 0), False, False)[0].name == "lock-py312.txt"
    assert Python("x", (3, 11, 7), True).text == "3.11.7"
