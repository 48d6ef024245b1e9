"""Scripts that run in a process of their own; in ComfyUI's folder as its main module would."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.comfy.server import REPOSITORY


def printed(
    script: str,
    folder: Path,
    *arguments: str,
    given: str | None = None,
    seconds: float = 120,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What the last line that ``script`` prints is in JSON; it runs in ``folder``, ``given`` is its standard input."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=given,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
