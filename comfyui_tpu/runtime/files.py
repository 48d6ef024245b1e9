"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) under a temporary name beside ``path``, then rename it; an older file stays until then."""
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
