"""The locked set of packages: reading it, comparing an environment with it, installing it, resolving it anew."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from .console import Console, SetupError, run_logged
from .layout import TORCH_CPU_INDEX, Settings
from .pythons import Python, probe

STAMP = ".comfyui-tpu-installed.json"
TORCH = ("torch", "torchvision", "torchaudio")
PROJECT = "comfyui-tpu"

# The only environment markers a lock may carry, with their meaning here. Anything else is refused: no parser, no eval.
MARKERS = {
    "": lambda: True,
    'sys_platform == "linux"': lambda: sys.platform == "linux",
    'sys_platform == "linux" and platform_machine == "x86_64"': lambda: (
        sys.platform == "linux" and platform.machine() == "x86_64"
    ),
}
_LINE = re.compile(r"^([A-Za-z0-9][\w.-]*)==([\w.!+]+)(?:\s*;\s*(.+?))?$")


@dataclass(frozen=True)
class Pin:
    name: str
    version: str
    marker: str = ""

    @property
    def key(self) -> str:
        return canonical(self.name)

    @property
    def applies(self) -> bool:
        return MARKERS[self.marker]()

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> list[Pin]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SetupError(f"the lock file {path} cannot be read ({error}): restore it with git checkout") from error
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.match(line)
        if not match or (match.group(3) or "") not in MARKERS:
            raise SetupError(f"{path}, line {number}: expected 'name==version' with a known marker, got {line!r}")
        pins.append(Pin(match.group(1), match.group(2), match.group(3) or ""))
    return pins


def lock_files(repo: Path, version: tuple, test: bool, cuda: bool) -> list[Path]:
    folder = repo / "requirements"
    files = [folder / ("lock-py311.txt" if version[:2] < (3, 12) else "lock-py312.txt")]
    if test:
        files.append(folder / "lock-test.txt")
    if cuda:
        files.append(folder / "lock-torch-cuda.txt")
    return files


def installed_versions(venv: Path) -> dict[str, str]:
    """Names and versions in the environment, read from folder names: no process, a few milliseconds."""
    versions = {}
    for folder in venv.glob("lib/python3*/site-packages/*.dist-info"):
        name, _, version = folder.name[: -len(".dist-info")].rpartition("-")
        if name and not _half_installed(folder):
            versions[canonical(name)] = version
    return versions


def _half_installed(dist_info: Path) -> bool:
    # Installers write INSTALLER after all of a package's files: without it the installation was interrupted.
    return not (dist_info / "INSTALLER").is_file()


def forget_half_installed(venv: Path, pins: list[Pin]) -> None:
    """Remove the metadata of packages whose installation was interrupted: pip would take them for installed."""
    locked = {pin.key for pin in pins}
    for folder in venv.glob("lib/python3*/site-packages/*.dist-info"):
        if canonical(folder.name[: -len(".dist-info")].rpartition("-")[0]) in locked and _half_installed(folder):
            shutil.rmtree(str(folder))


def deviations(pins: list[Pin], installed: dict[str, str]) -> dict[str, str]:
    """What differs from the lock, by package. As for pip, 2.11.0+cpu satisfies 2.11.0."""
    found = {}
    for pin in pins:
        have = installed.get(pin.key)
        if pin.applies and (have is None or have.split("+")[0] != pin.version):
            found[pin.key] = f"{pin.name}: locked {pin.version}, installed {have or 'not at all'}"
    return found


def editable_of(venv: Path) -> Path | None:
    """The checkout that the environment's comfyui-tpu is an editable install of."""
    for file in venv.glob("lib/python3*/site-packages/comfyui_tpu-*.dist-info/direct_url.json"):
        try:
            url = json.loads(file.read_text(encoding="utf-8"))["url"]
        except (OSError, ValueError, KeyError):
            continue
        if url.startswith("file://"):
            return Path(urllib.request.url2pathname(url[len("file://") :]))
    return None


@dataclass(frozen=True)
class Wanted:
    """What the environment should hold. `comfyui_requirements` is set for a ComfyUI other than the pinned release."""

    python: Python
    test: bool
    cuda: bool
    comfyui_requirements: Path | None = None

    def files(self, repo: Path) -> list[Path]:
        return lock_files(repo, self.python.version, self.test, self.cuda)

    def pins(self, repo: Path) -> list[Pin]:
        pins = [pin for file in self.files(repo) for pin in read_lock(file)]
        if self.comfyui_requirements:
            # Frontend, templates and docs pair with one ComfyUI release: the user's own one names its own.
            pins = [pin for pin in pins if not pin.key.startswith("comfyui")]
        return pins

    def stamp(self, repo: Path) -> dict:
        digest = hashlib.sha256()
        for file in [*self.files(repo), repo / "pyproject.toml", *filter(None, [self.comfyui_requirements])]:
            digest.update(file.read_bytes() + b"\0")
        return {"python": self.python.text, "test": self.test, "cuda": self.cuda, "sha256": digest.hexdigest()}


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def has_cuda_torch(installed: dict[str, str]) -> bool:
    """PyPI's Linux builds of torch carry no local version and need NVIDIA's libraries even to be imported."""
    return sys.platform == "linux" and "torch" in installed and "+" not in installed["torch"]


def ensure_packages(
    console: Console, settings: Settings, python: Python, test: bool, comfyui_requirements: Path | None = None
) -> None:
    repo, venv = settings.repo, settings.venv
    stamp, installed = read_stamp(venv), installed_versions(venv)
    # Never take the test tools away again: `test` and `install` would undo each other for ever.
    test = test or bool(stamp.get("test"))
    wanted = Wanted(python, test, has_cuda_torch(installed), comfyui_requirements)
    differing = deviations(wanted.pins(repo), installed)
    ours = editable_of(venv)
    if stamp == wanted.stamp(repo) and not differing and ours == repo:
        console.fresh(f"{len(wanted.pins(repo))} locked packages")
        return
    if settings.dry_run:
        console.would(f"install {len(differing)} of {len(wanted.pins(repo))} locked packages into {venv}")
        return

    (venv / STAMP).unlink(missing_ok=True)
    pip = [str(settings.python), "-m", "pip"]
    forget_half_installed(venv, wanted.pins(repo))
    if any(name in differing for name in TORCH):
        cuda = not _install_cpu_torch(console, settings, pip, wanted)
        wanted = Wanted(python, test, cuda and sys.platform == "linux", comfyui_requirements)
        if wanted.cuda and not console.ask(
            "torch's CPU wheels cannot be reached; PyPI's build brings 4 GB of CUDA libraries, unused here. Go on?",
            settings.yes,
        ):
            raise SetupError(f"stopped as you asked. Make {TORCH_CPU_INDEX} reachable and run this again.")
    pins = wanted.pins(repo)
    differing = deviations(pins, installed_versions(venv))
    with console.step(f"install {len(differing)} of {len(pins)} locked packages"):
        _pip_install_pins(console, settings, pip, pins)
    if comfyui_requirements:
        with console.step(f"install what your ComfyUI asks for ({comfyui_requirements})"):
            _pip_install_under(console, pip, pins, comfyui_requirements, settings.logs / "comfyui-requirements.log")
    with console.step("install this repository (editable)"):
        build = [*pip, "install", "--no-deps", "--no-build-isolation", "--editable", repo]
        run_logged(console, build, settings.logs / "editable.log")
    with console.step("import what was installed"):
        # JAX_PLATFORMS=cpu: a check must not take the TPU away from a server that is running.
        check = [settings.python, "-c", "import torch, torchax, jax, av, comfyui_tpu"]
        run_logged(console, check, settings.logs / "imports.log", environment={"JAX_PLATFORMS": "cpu"})
    left = deviations(pins, installed_versions(venv))
    if left:
        listed = "\n  ".join(left.values())
        raise SetupError(f"pip reported success, but the environment still differs from the lock:\n  {listed}")
    # What came may be a CPU build after all: pip's own configuration can name an index that has them.
    wanted = replace(wanted, cuda=has_cuda_torch(installed_versions(venv)))
    # Last of all, and in one piece: whatever was interrupted before this line is done again next time.
    temporary = venv / (STAMP + ".tmp")
    temporary.write_text(json.dumps(wanted.stamp(repo)) + "\n", encoding="utf-8")
    temporary.replace(venv / STAMP)


def _install_cpu_torch(console: Console, settings: Settings, pip: list, wanted: Wanted) -> bool:
    """Install torch from its CPU index where that can be reached. PyPI's builds for macOS are CPU builds already."""
    if sys.platform != "linux" or not url_answers(TORCH_CPU_INDEX + "/torch/"):
        return False
    pins = [pin for pin in wanted.pins(settings.repo) if pin.key in TORCH]
    try:
        with console.step("install torch's CPU wheels from " + TORCH_CPU_INDEX):
            command = [*pip, "install", "--no-deps", "--only-binary", ":all:", "--index-url", TORCH_CPU_INDEX]
            run_logged(console, [*command, *map(str, pins)], settings.logs / "torch-cpu.log")
    except SetupError as error:
        console.warn(f"torch's CPU wheels could not be installed; taking PyPI's builds.\n{error}")
        return False
    return not has_cuda_torch(installed_versions(settings.venv))


def url_answers(url: str, timeout: float = 5.0) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
            return response.status < 400
    except (OSError, ValueError):
        return False


def _pip_install_pins(console: Console, settings: Settings, pip: list, pins: list[Pin]) -> None:
    # One file for one pip call: the lock is complete, so pip need not resolve anything (--no-deps),
    # and wheels only: no package gets to run its own build script here.
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-") as folder:
        file = Path(folder) / "locked.txt"
        file.write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
        missing = len(deviations(pins, installed_versions(settings.venv)))
        command = [*pip, "install", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "-r", file]

        def progress() -> str:
            left = len(deviations(pins, installed_versions(settings.venv)))
            return f"{len(pins) - left} of {len(pins)} in place" if left < missing else ""

        run_logged(console, command, settings.logs / "packages.log", progress=progress)


def _pip_install_under(console: Console, pip: list, pins: list[Pin], requirements: Path, log: Path) -> None:
    """Install `requirements` with their dependencies, the locked versions being binding."""
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-") as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
        run_logged(console, [*pip, "install", "-r", requirements, "-c", constraints], log)


def install_extra(console: Console, settings: Settings, requirements: Path, log_name: str) -> None:
    """Install an optional add-on's requirements without letting them move a locked package."""
    python = probe(str(settings.python))
    pins = Wanted(python, True, has_cuda_torch(installed_versions(settings.venv))).pins(settings.repo)
    pip = [str(settings.python), "-m", "pip"]
    _pip_install_under(console, pip, pins, requirements, settings.logs / log_name)


# --- `setup.py lock`: a developer's command ----------------------------------------------------------------------

_HEADER = "# Written by `python3 setup.py lock` from {source}. Do not edit.\n"
# NVIDIA's libraries come with PyPI's Linux builds of torch only: kept apart, so that CPU wheels need not have them.
_CUDA = re.compile(r"^(nvidia-|cuda-|triton$)")


def write_locks(console: Console, settings: Settings, pythons: list[Python]) -> None:
    """Resolve requirements.txt for Python 3.11 and 3.12 and write the lock files."""
    folder = settings.repo / "requirements"
    by_minor = {python.version[:2]: python for python in pythons}
    for minor in ((3, 11), (3, 12)):
        if minor not in by_minor:
            raise SetupError("writing the locks needs Python 3.11 and 3.12 on PATH; {}.{} was not found".format(*minor))
    tools, cuda = {}, {}
    for minor in ((3, 11), (3, 12)):
        name = "lock-py{}{}.txt".format(*minor)
        if settings.dry_run:
            console.would(f"resolve requirements.txt with {by_minor[minor].executable} and write {folder / name}")
            continue
        with console.step(f"resolve for Python {by_minor[minor].text}"):
            base = _resolve(console, settings, by_minor[minor], [settings.repo / "requirements.txt"])
            both = _resolve(
                console, settings, by_minor[minor], [settings.repo / "requirements.txt", folder / "test.txt"]
            )
        moved = {key for key in base if both[key] != base[key]}
        if moved:
            raise SetupError(f"the test tools change the versions of {sorted(moved)}: pin them in requirements.txt")
        _collect(tools, {key: pin for key, pin in both.items() if key not in base}, "the test tools")
        _collect(cuda, {key: pin for key, pin in base.items() if _CUDA.match(key)}, "torch's CUDA libraries")
        _write_lock(folder / name, [pin for key, pin in base.items() if not _CUDA.match(key)], "requirements.txt")
    if not settings.dry_run:
        _write_lock(folder / "lock-test.txt", list(tools.values()), "requirements/test.txt")
        _write_lock(folder / "lock-torch-cuda.txt", list(cuda.values()), "requirements.txt (what torch on PyPI adds)")


def _collect(into: dict[str, Pin], pins: dict[str, Pin], what: str) -> None:
    for key, pin in pins.items():
        if into.setdefault(key, pin) != pin:
            raise SetupError(f"{what} differ between Python 3.11 and 3.12: {into[key]} and {pin}; they share one lock")


def _resolve(console: Console, settings: Settings, python: Python, files: list[Path]) -> dict[str, Pin]:
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-") as folder:
        report = Path(folder) / "report.json"
        command = [python.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--report", report]
        for file in files:
            command += ["-r", file]
        run_logged(console, command, settings.logs / "resolve.log")
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = {}
    for item in items:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        key = canonical(name)
        marker = 'sys_platform == "linux" and platform_machine == "x86_64"' if key == "libtpu" else ""
        marker = 'sys_platform == "linux"' if _CUDA.match(key) else marker
        pins[key] = Pin(key, version.split("+")[0], marker)
    return pins


def _write_lock(path: Path, pins: list[Pin], source: str) -> None:
    lines = sorted(str(pin) for pin in pins)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_HEADER.format(source=source) + "".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
