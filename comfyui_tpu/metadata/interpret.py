"""Named texts found in a file → prompt, workflow and the rest."""

from __future__ import annotations

import html
import re

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.jsontext import parse

PROMPT, WORKFLOW = "prompt", "workflow"
XMP = ("xmp", "XML:com.adobe.xmp")
# Texts in which programs keep one object with both: comments of videos (Video Helper Suite) and EXIF's UserComment.
_CONTAINERS = ("comment", "usercomment", "description", "imagedescription", "extra_metadata")
_XMP = re.compile(
    r"""<(?:\w+:)?(?P<tag>prompt|workflow)\b[^<>]*>(?P<text>[^<>]*)</
    | \b(?:\w+:)?(?P<name>prompt|workflow)\s*=\s*(?:"(?P<double>[^"<>]*)"|'(?P<single>[^'<>]*)')""",
    re.VERBOSE | re.IGNORECASE,
)

Parts = tuple[dict | None, dict | None, dict]


def interpret(texts: dict[str, str]) -> Parts:
    """(prompt, workflow, everything else by name). JSON objects and lists are parsed, other texts stay as they are."""
    parts, extra = {PROMPT: None, WORKFLOW: None}, {}
    for name, text in texts.items():
        value = _value(text)
        key = name.lower()
        if key in parts and isinstance(value, dict):
            parts[key] = value
        elif name in XMP:
            extra["xmp"] = text
        else:
            extra[name] = value
    for name, value in extra.items():
        if name.lower() in _CONTAINERS and isinstance(value, dict):
            _take_nested(parts, value)
    _take_nested(parts, _from_xmp(extra.get("xmp", "")))
    return parts[PROMPT], parts[WORKFLOW], extra


def _value(text: str) -> object:
    """JSON objects and lists as such; what only looks like one stays text."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            return parse(text)
        except MetadataError:
            pass
    return text


def _take_nested(parts: dict, container: dict) -> None:
    for key, value in container.items():
        value = _value(value) if isinstance(value, str) else value
        if parts.get(key.lower(), 0) is None and isinstance(value, dict):
            parts[key.lower()] = value


def _from_xmp(text: str) -> dict[str, str]:
    """Elements or attributes named prompt and workflow, without an XML parser and its dangers."""
    found = {}
    for match in _XMP.finditer(text):
        content = next(match[group] for group in ("text", "double", "single") if match[group] is not None)
        found.setdefault((match["tag"] or match["name"]).lower(), html.unescape(content))
    return found
