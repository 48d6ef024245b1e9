"""A JSON value as the type that a socket carries. What cannot be converted is an error, never a silent 0."""

from __future__ import annotations

import math

from comfyui_tpu.metadata.errors import MetadataError, shorten
from comfyui_tpu.metadata.jsontext import dump, type_name

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def to_text(value: object) -> str:
    """Texts as they are, everything else as JSON."""
    return value if isinstance(value, str) else dump(value)


def to_float(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _unfit(value, "a number")
    return number


def to_int(value: object) -> int:
    """Whole numbers exactly, others cut towards zero, like ``int``."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    return int(to_float(value))


def to_boolean(value: object) -> bool:
    if isinstance(value, bool | int | float):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in _TRUE | _FALSE:
        raise _unfit(value, "a boolean (true, false, yes, no, on, off or a number)")
    return word in _TRUE


def _unfit(value: object, wanted: str) -> MetadataError:
    return MetadataError(f"expected {wanted}, got {type_name(value)} {shorten(to_text(value))!r}")
