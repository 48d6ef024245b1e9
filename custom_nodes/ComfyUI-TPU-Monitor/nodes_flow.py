"""Nodes that lead values through a workflow: lists, switches, pipes, primitives."""

from __future__ import annotations

import sys
from typing import ClassVar

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

LIST, SWITCH = "TPU/Monitor/List", "TPU/Monitor/Switch"
PIPE, PRIMITIVE = "TPU/Monitor/Pipe", "TPU/Monitor/Primitive"
LIST_SLOTS, PIPE_SLOTS = 8, 6
LARGEST = sys.float_info.max

Pipe = io.Custom("PIPE_TPU")


def connected(values: dict, name: str, count: int) -> list:
    """The values of ``name_1`` to ``name_count`` that are there, in order."""
    found = [values[f"{name}_{i}"] for i in range(1, count + 1) if values.get(f"{name}_{i}") is not None]
    if not found:
        raise ValueError(f"connect at least one of {name}_1 to {name}_{count}: an empty list would run nothing")
    return found


class ListAnyTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slots = range(1, LIST_SLOTS + 1)
        return io.Schema(
            node_id="ListAnyTPU",
            display_name="List of Any (TPU)",
            category=LIST,
            description="Puts up to eight values of any type into a list.",
            inputs=[
                io.AnyType.Input(f"any_{i}", optional=True, tooltip=f"Item {i}. Unconnected ones are left out.")
                for i in slots
            ],
            outputs=[
                io.AnyType.Output("any_list", display_name="any_list", tooltip="The list as one value."),
                io.AnyType.Output(
                    "items",
                    display_name="items",
                    is_output_list=True,
                    tooltip="The items one by one: what is connected here runs once for each.",
                ),
            ],
        )

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        found = connected(values, "any", LIST_SLOTS)
        return io.NodeOutput(found, found)


class ListStringTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slots = range(1, LIST_SLOTS + 1)
        return io.Schema(
            node_id="ListStringTPU",
            display_name="List of Strings (TPU)",
            category=LIST,
            description="Joins up to eight texts, and gives them as a list.",
            inputs=[
                *(
                    io.String.Input(
                        f"string_{i}", default="", optional=True, tooltip=f"Text {i}. Empty ones are left out."
                    )
                    for i in slots
                ),
                io.String.Input("delimiter", default=" ", optional=True, tooltip="Put between the joined texts."),
            ],
            outputs=[
                io.String.Output("concatenated", display_name="concatenated", tooltip="All texts joined."),
                io.String.Output(
                    "strings",
                    display_name="strings",
                    is_output_list=True,
                    tooltip="The texts one by one: what is connected here runs once for each.",
                ),
            ],
        )

    @classmethod
    def execute(cls, delimiter: str = " ", **values) -> io.NodeOutput:
        texts = connected({name: text or None for name, text in values.items()}, "string", LIST_SLOTS)
        return io.NodeOutput(delimiter.join(texts), texts)


class _Switch(io.ComfyNode):
    """A switch for one type. Lazy: only the chosen branch runs."""

    NAME: str
    TYPE: type[io.ComfyTypeIO]
    WIDGET: ClassVar[dict] = {}

    @classmethod
    def define_schema(cls) -> io.Schema:
        def branch(name: str, when: str) -> io.Input:
            tooltip = f"Handed on if boolean is {when}. Otherwise what leads here does not run."
            return cls.TYPE.Input(name, optional=True, lazy=True, tooltip=tooltip, **cls.WIDGET)

        return io.Schema(
            node_id=f"Switch{cls.NAME}TPU",
            display_name=f"Switch {cls.NAME} (TPU)",
            category=SWITCH,
            description="Hands on one of two inputs. Only the chosen branch of the workflow runs.",
            inputs=[
                io.Boolean.Input("boolean", default=True, tooltip="Which input to hand on."),
                branch("on_true", "true"),
                branch("on_false", "false"),
            ],
            outputs=[cls.TYPE.Output("value", display_name="value", tooltip="The chosen input.")],
        )

    @classmethod
    def check_lazy_status(cls, boolean: bool, **branches) -> list[str]:
        chosen = cls.chosen(boolean)
        # A connected branch that has not run yet is None; one that is not connected is not there.
        return [chosen] if chosen in branches and branches[chosen] is None else []

    @classmethod
    def execute(cls, boolean: bool, **branches) -> io.NodeOutput:
        chosen = cls.chosen(boolean)
        if chosen not in branches:
            raise ValueError(f"{chosen} is chosen, but nothing is connected to it")
        return io.NodeOutput(branches[chosen])

    @staticmethod
    def chosen(boolean: bool) -> str:
        if not isinstance(boolean, bool | int | float):  # asked for before execute, which checks all inputs
            raise ValueError(f"boolean must be true or false, but a {type(boolean).__name__} came")
        return "on_true" if boolean else "on_false"


class SwitchAnyTPU(_Switch):
    NAME, TYPE = "Any", io.AnyType


class SwitchLatentTPU(_Switch):
    NAME, TYPE = "Latent", io.Latent


class SwitchConditioningTPU(_Switch):
    NAME, TYPE = "Conditioning", io.Conditioning


class SwitchImageTPU(_Switch):
    NAME, TYPE = "Image", io.Image


class SwitchMaskTPU(_Switch):
    NAME, TYPE = "Mask", io.Mask


class SwitchStringTPU(_Switch):
    NAME, TYPE = "String", io.String
    WIDGET: ClassVar[dict] = {"default": "", "multiline": True}


def slot_inputs(tooltip: str) -> list[io.Input]:
    return [io.AnyType.Input(f"any_{i}", optional=True, tooltip=tooltip.format(i)) for i in range(1, PIPE_SLOTS + 1)]


def pipe_output() -> io.Output:
    return Pipe.Output("pipe_out", display_name="pipe", tooltip="The pipe, for Pipe Edit Any and Pipe from Any.")


def filled(pipe: dict, values: dict) -> dict:
    """A new pipe: ``pipe`` with the slots of ``values`` that are connected. Pipes are shared and never changed."""
    return {**pipe, **{name: value for name, value in values.items() if value is not None}}


class PipeToAnyTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PipeToAnyTPU",
            display_name="Pipe to Any (TPU)",
            category=PIPE,
            description="Bundles up to six values of any type into one link.",
            inputs=slot_inputs("Slot {} of the pipe."),
            outputs=[pipe_output()],
        )

    @classmethod
    def execute(cls, **values) -> io.NodeOutput:
        return io.NodeOutput(filled({}, values))


class PipeEditAnyTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PipeEditAnyTPU",
            display_name="Pipe Edit Any (TPU)",
            category=PIPE,
            description="Replaces or adds values in a pipe. Other nodes that use the pipe are not affected.",
            inputs=[
                Pipe.Input("pipe", tooltip="From Pipe to Any."),
                *slot_inputs("New value of slot {}. Unconnected: the slot stays as it is."),
            ],
            outputs=[pipe_output()],
        )

    @classmethod
    def execute(cls, pipe: dict, **values) -> io.NodeOutput:
        return io.NodeOutput(filled(pipe, values))


class PipeFromAnyTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        slots = range(1, PIPE_SLOTS + 1)
        return io.Schema(
            node_id="PipeFromAnyTPU",
            display_name="Pipe from Any (TPU)",
            category=PIPE,
            description="Takes a pipe apart again.",
            inputs=[Pipe.Input("pipe", tooltip="From Pipe to Any or Pipe Edit Any.")],
            outputs=[
                pipe_output(),
                *(
                    io.AnyType.Output(f"any_{i}", display_name=f"any_{i}", tooltip=f"Slot {i} of the pipe.")
                    for i in slots
                ),
            ],
        )

    @classmethod
    def execute(cls, pipe: dict) -> io.NodeOutput:
        names = [f"any_{i}" for i in range(1, PIPE_SLOTS + 1)]
        # Only a node that uses an empty slot is stopped.
        values = [pipe.get(name, ExecutionBlocker(f"Pipe from Any: {name} of the pipe is empty")) for name in names]
        return io.NodeOutput(pipe, *values)


class _Primitive(io.ComfyNode):
    NAME: str
    LABEL: str
    TYPE: type[io.ComfyTypeIO]
    DESCRIPTION_TEXT: str
    WIDGET: ClassVar[dict] = {}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=f"Primitive{cls.NAME}TPU",
            display_name=f"Primitive {cls.LABEL} (TPU)",
            category=PRIMITIVE,
            description=cls.DESCRIPTION_TEXT,
            inputs=[cls.TYPE.Input("value", tooltip="The value.", **cls.WIDGET)],
            outputs=[cls.TYPE.Output("value_out", display_name="value", tooltip="The value, for any number of nodes.")],
        )

    @classmethod
    def execute(cls, value: object) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveBooleanTPU(_Primitive):
    NAME, LABEL, TYPE = "Boolean", "Boolean", io.Boolean
    WIDGET: ClassVar[dict] = {"default": False}
    DESCRIPTION_TEXT = "A switch to set once and use in several nodes."


class PrimitiveStringTPU(_Primitive):
    NAME, LABEL, TYPE = "String", "String", io.String
    WIDGET: ClassVar[dict] = {"default": ""}
    DESCRIPTION_TEXT = "A line of text to set once and use in several nodes."


class PrimitiveStringMultilineTPU(_Primitive):
    NAME, LABEL, TYPE = "StringMultiline", "String (Multiline)", io.String
    WIDGET: ClassVar[dict] = {"default": "", "multiline": True}
    DESCRIPTION_TEXT = "A text of several lines to set once and use in several nodes."


class PrimitiveIntegerTPU(_Primitive):
    NAME, LABEL, TYPE = "Integer", "Integer", io.Int
    WIDGET: ClassVar[dict] = {"default": 0, "min": -sys.maxsize, "max": sys.maxsize, "control_after_generate": False}
    DESCRIPTION_TEXT = "A whole number to set once and use in several nodes."


class PrimitiveFloatTPU(_Primitive):
    NAME, LABEL, TYPE = "Float", "Float", io.Float
    WIDGET: ClassVar[dict] = {
        "default": 0.0,
        "min": -sys.float_info.max,
        "max": sys.float_info.max,
        "step": 0.01,
        "round": False,
    }
    DESCRIPTION_TEXT = "A number to set once and use in several nodes."


NODES = [
    ListAnyTPU,
    ListStringTPU,
    SwitchAnyTPU,
    SwitchLatentTPU,
    SwitchConditioningTPU,
    SwitchImageTPU,
    SwitchMaskTPU,
    SwitchStringTPU,
    PipeToAnyTPU,
    PipeEditAnyTPU,
    PipeFromAnyTPU,
    PrimitiveBooleanTPU,
    PrimitiveStringTPU,
    PrimitiveStringMultilineTPU,
    PrimitiveIntegerTPU,
    PrimitiveFloatTPU,
]
