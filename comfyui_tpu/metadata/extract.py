"""A value out of JSON, or a default where there is none."""

from __future__ import annotations

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.jsonpath import PathMissing, get
from comfyui_tpu.metadata.jsontext import parse


def extract(value: object, path: str, default: str = "") -> object:
    """What lies at ``path``, or ``default``: JSON, or text as it is. Raises MetadataError where both are missing."""
    try:
        return get(value, path)
    except PathMissing as error:
        if not default:
            raise MetadataError(f"{error}. Set default to go on without it.") from None
    try:
        return parse(default)
    except MetadataError:
        return default
