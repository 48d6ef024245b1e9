"""ComfyUI's frontends that the monitor is tried in: the one its release pins, and the newest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from bootstrap.comfyui import unpack_folder
from tests.comfy.server import REPOSITORY

PINNED = "1.32.9"
NEWEST = "1.58.1"
NEWEST_SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"
VERSIONS = (PINNED, NEWEST)

CACHE = REPOSITORY / ".cache" / "frontends"


def arguments(version: str) -> list[str]:
    """What ComfyUI has to be started with to serve this frontend. May download it (once)."""
    if version == PINNED:
        found = importlib.metadata.version("comfyui-frontend-package")
        assert found == PINNED, f"expected comfyui-frontend-package {PINNED} in this environment, got {found}"
        return []
    return ["--front-end-root", str(_newest())]


def _newest() -> Path:
    folder = CACHE / NEWEST
    if not (folder / "index.html").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
            subprocess.run([*command, f"comfyui-frontend-package=={NEWEST}"], check=True, timeout=300)
            (wheel,) = Path(download).glob("*.whl")
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            assert digest == NEWEST_SHA256, f"{wheel.name}: expected SHA-256 {NEWEST_SHA256}, got {digest}"
            unpack_folder(wheel, "comfyui_frontend_package/static/", folder)
    return folder
