"""What tests of several families do with a checkpoint's files and parameters."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edited(folder: Path, target: Path, name: str, change: Callable[[dict], None]) -> Path:
    """``target``: a copy of the checkpoint with one JSON file changed."""
    shutil.copytree(folder, target)
    path = target / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return target


def every_parameter_matters(pipeline) -> None:
    """Assert it: a parameter of zeros, or a scale of ones, would hide a mistake in loading or sharding it."""
    for module in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        for name, parameter in module.named_parameters():
            assert parameter.abs().max() > 1e-3, name
            assert parameter.numel() == 1 or parameter.std() > 1e-3, name
