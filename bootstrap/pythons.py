"""Finds (or fetches) a Python the environment can be built with, and builds the virtual environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from .console import Console, SetupError, clean_environment, run_logged
from .layout import PYTHON_MAX, PYTHON_MIN, UV_PYTHON, UV_VERSION, Settings, user_cache

# 3.12 and 3.11 are the versions the locked sets were resolved and tried with; 3.13 shares 3.12's.
CANDIDATE_NAMES = ("python3.12", "python3.11", "python3.13")
# Present in a venv that is still being built; such a folder may be thrown away.
UNFINISHED = ".comfyui-tpu-unfinished"

_PROBE = (
    "import sys, json, importlib.util as u; print(json.dumps({"
    "'version': list(sys.version_info[:3]), 'executable': sys.executable,"
    "'venv': all(u.find_spec(m) for m in ('venv', 'ensurepip')), 'wide': sys.maxsize > 2**32}))"
)


@dataclass(frozen=True)
class Python:
    executable: str
    version: tuple[int, int, int]
    can_make_venv: bool

    @property
    def text(self) -> str:
        return "{}.{}.{}".format(*self.version)

    @property
    def suitable(self) -> bool:
        return PYTHON_MIN <= self.version[:2] <= PYTHON_MAX


def probe(executable: str) -> Python | None:
    """What `executable` is, found by running it: version managers leave shims on PATH that exist but fail."""
    try:
        done = subprocess.run(
            [executable, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=True,
            env=clean_environment(),
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if not found["wide"]:
        return None  # no wheels of jax or torch exist for a 32-bit Python
    return Python(found["executable"] or executable, tuple(found["version"]), found["venv"])


def on_path(names: tuple[str, ...], path: str | None = None) -> list[str]:
    """Every file of these names in every folder of PATH: the first hit may be a shim that fails."""
    folders = (os.environ.get("PATH", "") if path is None else path).split(os.pathsep)
    found = [os.path.join(folder, name) for name in names for folder in folders if folder]
    return [file for file in found if os.path.isfile(file) and os.access(file, os.X_OK)]


def installed_pythons() -> list[Python]:
    """Pythons of a suitable version on this machine: the one that runs this program first."""
    uv_folder = user_cache() / "python"
    fetched = sorted(str(p) for p in uv_folder.glob(f"cpython-{UV_PYTHON}*/bin/python{UV_PYTHON}"))
    seen: dict[str, Python] = {}
    for executable in [sys.executable, *on_path(CANDIDATE_NAMES), *fetched]:
        python = probe(executable)
        if python and python.suitable:
            seen.setdefault(os.path.realpath(python.executable), python)
    return list(seen.values())


def find_python(console: Console, settings: Settings) -> Python | None:
    """A Python that can build the environment; None in a dry run that would have to fetch one."""
    pythons = installed_pythons()
    for python in pythons:
        if python.can_make_venv:
            return python
    lacking = pythons[0] if pythons else None
    reason = (
        f"Python {lacking.text} ({lacking.executable}) lacks the modules venv and ensurepip"
        if lacking
        else f"no Python from {_dotted(PYTHON_MIN)} to {_dotted(PYTHON_MAX)} was found that runs"
    )
    if settings.dry_run:
        console.would(f"fetch Python {UV_PYTHON} with uv into {user_cache() / 'python'}: {reason}")
        return None
    console.note(f"{reason}; fetching Python {UV_PYTHON} with uv")
    try:
        return _python_from_uv(console, settings)
    except SetupError as error:
        help_text = how_to_get_python(lacking)
        raise SetupError(f"{reason}, and fetching one with uv failed:\n{error}\n\n{help_text}") from error


def how_to_get_python(lacking: Python | None) -> str:
    if lacking:
        name = "python{}.{}".format(*lacking.version)
        return (
            f"What to do: install the missing part, for example on Debian or Ubuntu\n"
            f"  sudo apt install {name}-venv        (or: sudo apt install python3-venv)\n"
            f"and run this command again."
        )
    return (
        f"What to do: install Python {UV_PYTHON} in one of these ways and run this command again\n"
        f"  Ubuntu 24.04, Debian 12:  sudo apt install python3 python3-venv\n"
        f"  Ubuntu 22.04:             sudo add-apt-repository ppa:deadsnakes/ppa && "
        f"sudo apt install python{UV_PYTHON} python{UV_PYTHON}-venv\n"
        f"  anywhere:                 install uv (https://docs.astral.sh/uv/), then run this command again"
    )


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _python_from_uv(console: Console, settings: Settings) -> Python:
    folder = user_cache() / "python"
    uv = _find_uv(console, settings)
    # UV_PYTHON_INSTALL_BIN=0: leave nothing in ~/.local/bin.
    environment = {"UV_PYTHON_INSTALL_DIR": str(folder), "UV_PYTHON_INSTALL_BIN": "0"}
    command = [uv, "python", "install", UV_PYTHON]
    run_logged(console, command, settings.logs / "uv-python.log", environment=environment)
    for executable in sorted(folder.glob(f"cpython-{UV_PYTHON}*/bin/python{UV_PYTHON}")):
        python = probe(str(executable))
        if python and python.can_make_venv:
            return python
    raise SetupError(f"uv reported success, but no Python {UV_PYTHON} that runs lies under {folder}")


def _find_uv(console: Console, settings: Settings) -> str:
    for executable in on_path(("uv",)):
        if _runs([executable, "--version"]):
            return executable
    folder = user_cache() / f"uv-{UV_VERSION}"
    uv = folder / "bin" / "uv"
    if uv.exists() and _runs([str(uv), "--version"]):
        return str(uv)
    # Not a venv: Debian's Python may lack ensurepip. --target writes into the given folder only and is
    # therefore also allowed where the system's Python is marked as externally managed.
    for executable in [sys.executable, *on_path(("python3",))]:
        if _runs([executable, "-m", "pip", "--version"]):
            shutil.rmtree(str(folder), ignore_errors=True)
            install = [executable, "-m", "pip", "install", "--only-binary", ":all:", "--target", folder]
            run_logged(console, [*install, f"uv=={UV_VERSION}"], settings.logs / "uv-install.log")
            return str(uv)
    raise SetupError("uv is not on PATH, and there is no pip to install it with")


def _runs(command: list[str]) -> bool:
    try:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(command, timeout=60, env=clean_environment(), **quiet).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def ensure_venv(console: Console, settings: Settings) -> Python | None:
    """The virtual environment's Python, building the environment where there is none. None in a dry run without one."""
    venv, unfinished = settings.venv, settings.venv / UNFINISHED
    if (venv / "pyvenv.cfg").is_file() and not unfinished.exists():
        python = probe(str(settings.python))
        if python is None:
            raise SetupError(
                f"the virtual environment {venv} exists but its Python does not run (the Python it was built from may "
                f"be gone).\nWhat to do: remove that folder, or name another one with --venv, and run this again."
            )
        if not python.suitable:
            raise SetupError(
                f"the virtual environment {venv} has Python {python.text}; {_dotted(PYTHON_MIN)} to "
                f"{_dotted(PYTHON_MAX)} is needed.\n"
                f"What to do: remove that folder, or name another one with --venv, and run this again."
            )
        console.fresh(f"virtual environment {venv} (Python {python.text})")
        return python
    if venv.exists() and not unfinished.exists() and any(venv.iterdir()):
        raise SetupError(
            f"{venv} exists and is not a virtual environment (it has no pyvenv.cfg); nothing was changed in it.\n"
            f"What to do: name another folder with --venv."
        )
    base = find_python(console, settings)
    if settings.dry_run:
        if base:
            console.would(f"make the virtual environment {venv} with Python {base.text} ({base.executable})")
        return None
    with console.step(f"make the virtual environment {venv} with Python {base.text} ({base.executable})"):
        shutil.rmtree(str(venv), ignore_errors=True)
        venv.mkdir(parents=True)
        unfinished.touch()
        command = [base.executable, "-m", "venv", venv]
        run_logged(console, command, settings.logs / "venv.log", hint=how_to_get_python(base))
        unfinished.unlink()
    python = probe(str(settings.python))
    if python is None:
        raise SetupError(f"the new virtual environment's Python does not run: {settings.python}")
    return python
