"""Values that come through links are what their inputs say, whatever node they come from.

ComfyUI compares the types of sockets, not of values: a node with outputs of any type may hand a list to an INT.
"""

from __future__ import annotations

import functools
import numbers
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from comfyui_tpu.runtime.errors import InvalidInput


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())


def _is_image(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor) and value.ndim == 4


# Type of the input → (what it must be, for people; the check).
_KINDS = {
    "STRING": ("a text", lambda value: isinstance(value, str)),
    "INT": ("a whole number", _is_whole),
    "FLOAT": ("a number", lambda value: isinstance(value, numbers.Real)),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, numbers.Real)),
    "IMAGE": ("pictures [batch, height, width, channels]", _is_image),
    "PIPE_TPU": ("a pipe", lambda value: isinstance(value, Mapping)),
}


def checked(nodes: Iterable[type[io.ComfyNode]]) -> list[type[io.ComfyNode]]:
    """The same nodes; ``execute`` refuses values of another kind than their schema says."""
    return [_checked(node) for node in nodes]


def _checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    execute = node.__dict__.get("execute") or next(c.__dict__["execute"] for c in node.mro() if "execute" in c.__dict__)
    original = execute.__func__

    @functools.wraps(original)
    def check_and_execute(cls, *args, **kwargs):
        check_kinds(cls.SCHEMA or cls.define_schema(), kwargs)
        return original(cls, *args, **kwargs)

    node.execute = classmethod(check_and_execute)
    return node


def check_kinds(schema: io.Schema, values: Mapping[str, Any]) -> None:
    """Raise InvalidInput naming the first of ``values`` that is not what ``schema`` says; None is no value."""
    if schema.is_input_list:
        return  # lists of anything, which these nodes look at themselves
    for each in schema.inputs:
        what, fits = _KINDS.get(each.get_io_type(), ("", None))
        value = values.get(each.id)
        if fits is not None and value is not None and not fits(value):
            raise InvalidInput(f"{each.id} must be {what}, but {_shown(value)} came. Connect another output to it.")


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"a {kind} {list(shape)}" if shape is not None else f"a {kind} ({str(value)[:60]!r})"
