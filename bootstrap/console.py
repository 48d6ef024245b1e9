"""What the user sees: steps with their times, warnings, and commands whose output goes to a log until they fail."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

TAIL_LINES = 25
HEARTBEAT_SECONDS = 10.0


class SetupError(Exception):
    """A failure the user can act on: the message says what was expected, what came and what to do."""


class Console:
    """Prints progress to stdout. In a dry run steps are only named."""

    def __init__(self, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        self.started = time.monotonic()
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        self.say("  " + text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.say("  warning: " + text)

    def fresh(self, text: str) -> None:
        """Something that is already as it should be."""
        self.say("= " + text)

    @contextmanager
    def step(self, title: str):
        self.say("> " + title)
        began = time.monotonic()
        yield
        self.say(f"  done in {time.monotonic() - began:.1f} s")

    def would(self, text: str) -> None:
        self.say("would " + text)

    def ask(self, question: str, assume_yes: bool) -> bool:
        """True when the user agrees, or cannot be asked: scripts and CI must not wait for an answer for ever."""
        if assume_yes or not sys.stdin or not sys.stdin.isatty():
            return True
        return input(question + " [Y/n] ").strip().lower() in ("", "y", "yes")


def quoted(command: list) -> str:
    return " ".join(shlex.quote(str(part)) for part in command)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join("    " + line for line in text.splitlines()[-lines:])


def clean_environment(**changes: str) -> dict[str, str]:
    """The caller's environment without what would redirect an installation out of the virtual environment."""
    drop = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"}
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0", GIT_TERMINAL_PROMPT="0")
    environment.update(changes)
    return environment


def run_logged(
    console: Console,
    command: list,
    log: Path,
    cwd: Path | None = None,
    hint: str = "",
    progress: Callable[[], str] | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run `command` with its output in `log`; a failure shows the command, its exit status and the log's last lines.

    `progress` says how far it has got; while that is "", the last line of the log is shown now and then.
    `environment` adds variables.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = spoke = time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        out.write("$ " + quoted(command) + "\n")
        out.flush()
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=str(cwd) if cwd else None,
                env=clean_environment(**(environment or {})),
            )
        except OSError as error:
            raise SetupError(f"could not start: {quoted(command)}\n  {error}\n{hint}".rstrip()) from error
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - spoke >= HEARTBEAT_SECONDS:
                    spoke = time.monotonic()
                    console.note(f"... {spoke - began:.0f} s  {(progress and progress()) or _last_line(log)}")
        except BaseException:
            # Ctrl-C included: a half-dead pip must not go on writing into the environment.
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        raise SetupError(
            f"this command failed with exit status {process.returncode}:\n  {quoted(command)}\n"
            f"the last lines of its log ({log}):\n{tail(log)}\n{hint}".rstrip()
        )


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in tail(log, 40).splitlines()]
    # pip repeats configuration warnings for every package; they say nothing about progress.
    lines = [line for line in lines if line and not line.startswith("WARNING")]
    return lines[-1][:100] if lines else ""
