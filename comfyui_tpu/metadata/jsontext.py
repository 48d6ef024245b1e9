"""JSON text in and out. What ComfyUI and others write beyond the standard (NaN, Infinity) becomes null."""

from __future__ import annotations

import json
import math

from comfyui_tpu.metadata.errors import MetadataError, shorten

MAX_CHARACTERS = 64 * 2**20
MAX_DEPTH = 200

type_names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}


def parse(text: str) -> object:
    """The value that ``text`` holds, at most ``MAX_DEPTH`` levels deep. NaN and Infinity are None.

    Raises MetadataError.
    """
    if len(text) > MAX_CHARACTERS:
        raise MetadataError(f"expected at most {MAX_CHARACTERS} characters of JSON, got {len(text)}")
    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except RecursionError:
        raise MetadataError(f"expected JSON at most {MAX_DEPTH} levels deep; this is deeper") from None
    except ValueError as error:
        raise MetadataError(f"expected JSON, got {shorten(text)!r}: {error}") from None
    _check_depth(value)
    return value


def load(value: object) -> object:
    """JSON text, or an object made of dicts, lists, texts, numbers, booleans and None → the same as plain JSON."""
    if isinstance(value, str):
        return parse(value)
    try:
        return parse(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, MetadataError):
            raise
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise MetadataError(f"expected JSON text or a JSON object, got {kind}: {error}") from None


def dump(value: object, indent: int | None = 2) -> str:
    """``value`` as standard JSON that any UTF-8 writer accepts, with other alphabets kept readable."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # Lone surrogates, which JSON may hold as \\ud800, cannot be sent to a browser.
    return text.encode("utf-8", "replace").decode("utf-8")


def type_name(value: object) -> str:
    return "null" if value is None else type_names.get(type(value), type(value).__name__)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise MetadataError(f"expected JSON at most {MAX_DEPTH} levels deep; this is deeper")


def _children(value: object) -> list:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inner if isinstance(child, dict | list)]
