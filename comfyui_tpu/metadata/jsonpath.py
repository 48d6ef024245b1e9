"""Paths into JSON, as the extractor reads and the comparator shows them.

``nodes[0].inputs["a.b"]``: keys after dots, list items in brackets (negative ones count from the end), keys with
special characters quoted in brackets, ``nodes[id=7]`` the first object in a list whose ``id`` is 7. A leading ``$`` is
allowed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from comfyui_tpu.metadata.errors import MetadataError, shorten
from comfyui_tpu.metadata.jsontext import type_name

_KEY = r"[^.\[\]]+"
_TOKEN = re.compile(
    rf"""(?P<first>(?<!.){_KEY}) | \.(?P<key>{_KEY}) | \[(?P<index>-?\d{{1,9}})\]
    | \[(?P<double>"(?:[^"\\]|\\.)*")\] | \['(?P<single>[^']*)'\] | \[(?P<name>[^=\[\]"']+)=(?P<value>[^\[\]]*)\]""",
    re.VERBOSE | re.DOTALL,
)
_SIMPLE = re.compile(r"[\w\-]{1,80}")


class PathMissing(MetadataError):
    """The path is well formed, but leads nowhere in this value."""


@dataclass(frozen=True)
class Match:
    """The first object in a list whose ``key`` reads as ``value``."""

    key: str
    value: str


Segment = str | int | Match


def parse_path(path: str) -> list[Segment]:
    """Raises MetadataError where the path is not well formed."""
    rest = path.strip()
    start = 1 if rest[:1] == "$" and rest[1:2] in ("", ".", "[") else 0
    segments, position = [], start
    while position < len(rest):
        # After "$" a key needs its dot; at the very start it has none.
        token = _TOKEN.match(rest, position)
        if token is None:
            raise MetadataError(
                f'expected a path such as nodes[0].inputs.seed or ["a.b"].c, got {shorten(path)!r}: '
                f"cannot read {shorten(rest[position:], 20)!r}"
            )
        segments.append(_segment(token, path))
        position = token.end()
    return segments


def _segment(token: re.Match, path: str) -> Segment:
    kind, text = token.lastgroup, token[token.lastgroup]
    if kind == "index":
        return int(text)
    if kind == "value":
        return Match(token["name"], text)
    if kind == "double":
        try:
            return json.loads(text)
        except ValueError as error:
            raise MetadataError(f"cannot read the key {shorten(text)} of the path {shorten(path)!r}: {error}") from None
    return text


def format_path(segments: list[Segment]) -> str:
    """The text that ``parse_path`` reads as ``segments``; ``$`` for the whole value."""
    text = ""
    for segment in segments:
        if isinstance(segment, Match):
            text += f"[{segment.key}={segment.value}]"
        elif isinstance(segment, int):
            text += f"[{segment}]"
        elif re.fullmatch(_KEY, segment) and segment == segment.strip() and not segment.startswith("$"):
            text += f".{segment}" if text else segment
        else:
            text += f"[{json.dumps(segment)}]"
    return text or "$"


def simple(value: object) -> bool:
    """Whether ``value`` may stand in ``[key=value]``."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and _SIMPLE.fullmatch(value) is not None
    )


def get(value: object, path: str) -> object:
    """What lies at ``path``. Raises PathMissing, which names what is there instead."""
    segments = parse_path(path)
    for i, segment in enumerate(segments):
        try:
            value = _step(value, segment)
        except LookupError:
            raise PathMissing(
                f"nothing at {format_path(segments[: i + 1])!r}: {format_path(segments[:i])!r} is {_describe(value)}"
            ) from None
    return value


def _step(value: object, segment: Segment) -> object:
    if isinstance(value, dict) and isinstance(segment, str | int):
        return value[str(segment)]
    if isinstance(value, list):
        if isinstance(segment, Match):
            return _first(value, segment)
        if isinstance(segment, int) or re.fullmatch(r"-?[0-9]{1,9}", segment):
            return value[int(segment)]
    raise LookupError


def _first(values: list, match: Match) -> dict:
    for each in values:
        if isinstance(each, dict) and simple(each.get(match.key)) and str(each[match.key]) == match.value:
            return each
    raise LookupError


def _describe(value: object) -> str:
    if isinstance(value, dict):
        names = ", ".join(shorten(key, 30) for key in list(value)[:10]) + (", …" if len(value) > 10 else "")
        return f"an object with the keys {names}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else f"a {type_name(value)}"
