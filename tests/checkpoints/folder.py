"""Write a folder once: whole or not at all, and not again while the recipe is the same."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MARKER = ".recipe.json"


def write_once(dest: Path, recipe: dict, fill: Callable[[Path], None]) -> Path:
    """Have ``fill`` write into a new folder that then becomes ``dest``; do nothing if ``dest`` has this ``recipe``.

    ``recipe`` is JSON data that decides the content. A folder of another recipe is replaced; a folder that holds
    anything else raises ``FileExistsError`` and is not touched. Several processes may do this at the same time.
    """
    recipe = json.loads(json.dumps(recipe))
    dest = Path(dest).absolute()
    if _recipe_of(dest) == recipe:
        return dest
    _refuse_foreign(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Beside dest, so that the rename stays on one file system and is atomic.
    staging = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        fill(staging)
        (staging / MARKER).write_text(json.dumps(recipe, indent=2) + "\n")
        _let_others_read(staging)
        _replace(staging, dest, recipe)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return dest


def _let_others_read(folder: Path) -> None:
    """``mkdtemp`` and ``safetensors`` make what only its owner can read; a downloaded checkpoint is not like that."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _recipe_of(folder: Path) -> dict | None:
    """The recipe a folder was written with, or None if it was not written by :func:`write_once`."""
    try:
        return json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _refuse_foreign(dest: Path) -> None:
    if not dest.exists() or _recipe_of(dest) is not None:
        return
    if not dest.is_dir() or any(dest.iterdir()):
        raise FileExistsError(
            f"expected a new or empty folder, or one written by tests.checkpoints; got {dest}, which holds something "
            "else. Name another folder, or remove that one yourself."
        )


def _replace(staging: Path, dest: Path, recipe: dict) -> None:
    """Move ``staging`` to ``dest``. If another process put the same recipe there meanwhile, theirs stays."""
    try:
        os.rename(staging, dest)  # also succeeds over an empty folder
    except OSError:
        if _recipe_of(dest) == recipe:
            return
        _refuse_foreign(dest)
        outdated = Path(tempfile.mkdtemp(prefix=f".{dest.name}-old-", dir=dest.parent))
        os.rename(dest, outdated)
        os.rename(staging, dest)
        shutil.rmtree(outdated, ignore_errors=True)
