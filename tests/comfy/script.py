"""Scripts that run in a process of their own, as ComfyUI's main module would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.comfy.server import REPOSITORY


def printed(script: str, comfyui: Path, *arguments: str, given: str | None = None, seconds: float = 120) -> Any:
    """What the last line that ``script`` prints is in JSON; ``given`` is its standard input."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=given,
        cwd=comfyui,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
