"""Tiny checkpoints in the real Diffusers layout, written on the spot: the tests and the demo need no download.

Every family has one module with a ``write(dest, **options) -> Path`` function; :data:`WRITERS` names them. On the
command line, in the repository root: ``python -m tests.checkpoints wan21-tiny DEST_FOLDER``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

# Modules are named, not imported: asking for one family must not pay for importing the others.
WRITERS = {
    "cogvideox-tiny": "tests.checkpoints.cogvideox_5b",
    "cogvideox15-tiny": "tests.checkpoints.cogvideox",
    "flux2-tiny": "tests.checkpoints.flux2",
    "wan21-tiny": "tests.checkpoints.wan21",
    "wan22-i2v-tiny": "tests.checkpoints.wan22",
}


def write(name: str, dest: Path, **options) -> Path:
    """Write the checkpoint ``name`` (a key of :data:`WRITERS`) to the folder ``dest`` and return that folder.

    A complete folder of the same recipe is left alone. ``options`` go to the family's own ``write``. Raises
    ``ValueError`` for an unknown name, ``FileExistsError`` if ``dest`` holds something this package did not write.
    """
    if name not in WRITERS:
        raise ValueError(f"expected one of {', '.join(sorted(WRITERS))}; got {name!r}")
    return importlib.import_module(WRITERS[name]).write(Path(dest), **options)
