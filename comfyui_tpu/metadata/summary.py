"""Any Python object as plain JSON that a person can read: bounded in depth, width and length, safe with cycles."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from pathlib import PurePath

from comfyui_tpu.metadata.jsontext import dump

MAX_DEPTH = 40
MAX_OBJECT_DEPTH = 2  # objects within objects: a model's insides are a world of their own
MAX_ITEMS = 1000
MAX_VALUES = 50_000
MAX_FIELDS = 30
MAX_TEXT = 1_000_000

Summarize = Callable[[object], dict | None]


def show(value: object, summarize: Summarize = lambda value: None) -> str:
    """``value`` as text: texts as they are, else the JSON of its ``summary``. At most ``MAX_TEXT`` characters."""
    text = value if isinstance(value, str) else dump(summary(value, summarize))
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n… {len(text) - MAX_TEXT} more characters"


def summary(value: object, summarize: Summarize = lambda value: None) -> object:
    """``summarize``: what to say of objects it knows, such as tensors; None for all others."""
    return _Walk(summarize).visit(value, 0, 0)


class _Walk:
    def __init__(self, summarize: Summarize):
        self.summarize, self.left, self.path = summarize, MAX_VALUES, set()

    def visit(self, value: object, depth: int, objects: int) -> object:
        self.left -= 1
        if value is None or isinstance(value, bool | int | float | str | bytes | enum.Enum | PurePath | type):
            return _scalar(value)
        if id(value) in self.path:
            return f"<cycle: {_kind(value)}>"
        if depth >= MAX_DEPTH or self.left <= 0:
            return f"<{_kind(value)}, not shown: too {'deep' if depth >= MAX_DEPTH else 'much'}>"
        self.path.add(id(value))
        try:
            return self._compound(value, depth + 1, objects)
        finally:
            self.path.discard(id(value))

    def _compound(self, value: object, depth: int, objects: int) -> object:
        known = self.summarize(value)
        if known is not None:
            return known
        if isinstance(value, Mapping):
            return self._items(value.items(), len(value), depth, objects)
        if isinstance(value, list | tuple | set | frozenset):
            shown = [self.visit(each, depth, objects) for _, each in zip(range(self._room()), value, strict=False)]
            return shown + [f"… {len(value) - len(shown)} more"] * (len(shown) < len(value))
        name = {"object": _kind(value)}
        if objects >= MAX_OBJECT_DEPTH or callable(value):
            return {**name, "name": str(value.__qualname__)} if hasattr(value, "__qualname__") else name
        fields = _fields(value)
        return name | self._items(list(fields.items())[:MAX_FIELDS], len(fields), depth, objects + 1)

    def _items(self, items, count: int, depth: int, objects: int) -> dict:
        shown = {}
        for _, (key, each) in zip(range(self._room()), items, strict=False):
            shown[_key(key)] = self.visit(each, depth, objects)
        return shown | ({"…": f"{count - len(shown)} more"} if len(shown) < count else {})

    def _room(self) -> int:
        return max(0, min(MAX_ITEMS, self.left))


def _scalar(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, type):
        return f"<class {value.__module__}.{value.__qualname__}>"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"<integer of {value.bit_length()} bits>"  # Python refuses to write it out
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]}… {len(value) - MAX_TEXT} more characters"
    if isinstance(value, PurePath):
        return str(value)
    return value


def _key(key: object) -> str:
    return str(key) if isinstance(key, str | int | float | bool | None) else f"<{_kind(key)}>"


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _fields(value: object) -> dict:
    """Public attributes that are stored, not computed: nothing of the object's own code runs."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    try:
        stored = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return {name: each for name, each in stored.items() if isinstance(name, str) and not name.startswith("_")}
