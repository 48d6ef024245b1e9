"""PNG files with texts, which appear under their name only when they are complete."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfyui_tpu.metadata.errors import MetadataError, shorten
from comfyui_tpu.metadata.jsontext import parse, type_name

# Where what PNG allows no name of its own for is kept: names of text chunks are at most 79 Latin-1 characters.
OTHER = "extra_metadata"


def extra_texts(text: str) -> dict[str, object]:
    """The JSON object that a user typed → values by the name of their text chunk. Empty: nothing."""
    value = parse(text) if text.strip() else {}
    if not isinstance(value, dict):
        raise MetadataError(
            f'expected a JSON object such as {{"Author": "…"}} as extra metadata, got a {type_name(value)}'
        )
    named = {key: each for key, each in value.items() if _is_keyword(key)}
    others = {key: each for key, each in value.items() if key not in named}
    return {**named, **({OTHER: {**others, **_object(named.get(OTHER))}} if others else {})}


def _object(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _is_keyword(key: str) -> bool:
    """Whether PNG takes it as the name of a text."""
    try:
        data = key.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return 1 <= len(data) <= 79 and key == key.strip() and key.isprintable() and "  " not in key


def check_reserved(extra: dict, reserved: set[str]) -> None:
    taken = sorted(reserved & {key.lower() for key in extra})
    if taken:
        raise MetadataError(
            f"the extra metadata holds {shorten(', '.join(taken))!r}, which the workflow is saved under: "
            "use another name, or switch with_workflow off"
        )


def save_png(path: Path, image: Image.Image, texts: dict[str, str], compress_level: int = 4) -> None:
    """Write ``image`` with ``texts`` under a temporary name beside ``path``, then rename it."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            image.save(stream, "PNG", pnginfo=info, compress_level=compress_level)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
