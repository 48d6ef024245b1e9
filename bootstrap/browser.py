"""A Chromium for the browser tests: found, or installed where that needs no question (root on Debian)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .console import Console, SetupError, run_logged

NAMES = ("chromium", "chromium-browser", "google-chrome")
VARIABLE = "COMFYUI_TPU_CHROMIUM"


def find_browser() -> str | None:
    """Its path: what the environment variable names, else the first on PATH."""
    return os.environ.get(VARIABLE) or next((found for found in map(shutil.which, NAMES) if found), None)


def ensure_browser(console: Console, logs: Path) -> None:
    """Never a failure: without a browser its tests are skipped, or fail where .ci/run requires one."""
    found = find_browser()
    if found:
        console.fresh(f"browser {found}")
        return
    can_install = os.geteuid() == 0 and shutil.which("apt-get")
    if console.dry_run:
        console.would("install chromium with apt-get" if can_install else "skip the browser tests: no Chromium")
        return
    if can_install:
        try:
            with console.step("install chromium for the browser tests"):
                install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
                environment = {"DEBIAN_FRONTEND": "noninteractive"}
                run_logged(console, ["apt-get", "update"], logs / "apt-update.log", environment=environment)
                run_logged(console, install, logs / "apt-chromium.log", environment=environment)
        except SetupError as error:
            console.warn(f"chromium could not be installed.\n{error}")
    if not find_browser():
        console.warn(
            f"the browser tests will be skipped: no Chromium. Get one with sudo apt-get install chromium, "
            f"or name its path in {VARIABLE}"
        )
