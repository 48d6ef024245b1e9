"""What differs between two JSON values, by path.

Lists of objects that each have an ``id`` of their own, such as the nodes of a workflow, are compared by ``id``: a node
put in front does not make all others look changed. Other lists are compared item by item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from comfyui_tpu.metadata.errors import shorten
from comfyui_tpu.metadata.jsonpath import Match, Segment, format_path, simple
from comfyui_tpu.metadata.jsontext import dump

MAX_CHANGES = 1000
VALUE_CHARACTERS = 300

ADDED, REMOVED, CHANGED, REORDERED = "added", "removed", "changed", "reordered"
_SIGNS = {ADDED: "+", REMOVED: "-", CHANGED: "~", REORDERED: "~"}


@dataclass(frozen=True)
class Change:
    kind: str
    path: str
    old: object = None
    new: object = None

    def line(self) -> str:
        values = {
            ADDED: lambda: _short(self.new),
            REMOVED: lambda: _short(self.old),
            CHANGED: lambda: f"{_short(self.old)} → {_short(self.new)}",
            REORDERED: lambda: f"order {_short(self.old)} → {_short(self.new)}",
        }
        return f"{_SIGNS[self.kind]} {self.path}: {values[self.kind]()}"


def compare(old: object, new: object, limit: int = MAX_CHANGES) -> list[Change]:
    """The differences in the order of ``old``, at most ``limit``. Both values must come from ``jsontext``."""
    return list(islice(_differences([], old, new), limit))


def describe(changes: list[Change]) -> str:
    """A line for each change under a line that counts them."""
    if not changes:
        return "No differences."
    counts = [(kind, sum(change.kind == kind for change in changes)) for kind in _SIGNS]
    count = ", ".join(f"{number} {kind}" for kind, number in counts if number)
    cut = f" (only the first {MAX_CHANGES} are shown)" if len(changes) >= MAX_CHANGES else ""
    noun = "difference" if len(changes) == 1 else "differences"
    return "\n".join([f"{len(changes)} {noun}: {count}{cut}", "", *(change.line() for change in changes)])


def _differences(path: list[Segment], old: object, new: object) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        yield from _items(path, old, new)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _lists(path, old, new)
    elif isinstance(old, bool) != isinstance(new, bool) or old != new:
        yield Change(CHANGED, format_path(path), old, new)


def _items(path: list[Segment], old: dict, new: dict) -> Iterator[Change]:
    """``old`` and ``new``: values by their last path segment."""
    for segment, value in old.items():
        if segment in new:
            yield from _differences([*path, segment], value, new[segment])
        else:
            yield Change(REMOVED, format_path([*path, segment]), old=value)
    for segment, value in new.items():
        if segment not in old:
            yield Change(ADDED, format_path([*path, segment]), new=value)


def _lists(path: list[Segment], old: list, new: list) -> Iterator[Change]:
    old_by_id, new_by_id = _by_id(old), _by_id(new)
    if old_by_id is None or new_by_id is None:
        yield from _items(path, dict(enumerate(old)), dict(enumerate(new)))
        return
    yield from _items(path, old_by_id, new_by_id)
    orders = [[match.value for match in ids if match in others] for ids, others in _both(old_by_id, new_by_id)]
    if orders[0] != orders[1]:
        yield Change(REORDERED, format_path(path), *orders)


def _both(old: dict, new: dict) -> list[tuple[dict, dict]]:
    return [(old, new), (new, old)]


def _by_id(values: list) -> dict[Match, dict] | None:
    """The objects by ``id``, where every item is an object with an id of its own; else None."""
    if not values or not all(isinstance(each, dict) and simple(each.get("id")) for each in values):
        return None
    found = {Match("id", str(each["id"])): each for each in values}
    return found if len(found) == len(values) else None


def _short(value: object) -> str:
    return shorten(dump(value, indent=None), VALUE_CHARACTERS)
