"""Nodes that show values and work with JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from comfyui_tpu.comfy import media
from comfyui_tpu.comfy.stats import describe_sample, take_sample
from comfyui_tpu.comfy.summaries import show, to_jsonable
from comfyui_tpu.metadata import convert, diff
from comfyui_tpu.metadata.errors import MetadataError, shorten
from comfyui_tpu.metadata.extract import extract
from comfyui_tpu.metadata.jsontext import dump, load
from comfyui_tpu.metadata.reading import Metadata

CATEGORY = "TPU/Monitor/Debug"
JSON_CATEGORY = "TPU/Monitor/JSON"
JSON_FOLDERS = (media.INPUT, media.OUTPUT)

log = logging.getLogger(__name__)


def as_json(value: object) -> object:
    return load(value.as_dict() if isinstance(value, Metadata) else value)


class ShowAnyTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShowAnyTPU",
            display_name="Show Any (TPU)",
            category=CATEGORY,
            description="Shows any value as text on the node: texts as they are, tensors by type, shape and range, "
            "everything else as JSON.",
            inputs=[
                io.AnyType.Input("any_value", tooltip="What to show. A list is shown as a whole."),
                io.Boolean.Input("display", default=True, optional=True, tooltip="Show the text on the node."),
                io.Boolean.Input(
                    "console", default=False, optional=True, tooltip="Write the text to the server's log."
                ),
                io.String.Input(
                    "prefix", default="", optional=True, tooltip="Put before the text in the server's log."
                ),
            ],
            outputs=[io.String.Output("text", display_name="text", tooltip="The text that is shown.")],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, any_value: list, display=(True,), console=(False,), prefix=("",)) -> io.NodeOutput:
        text = show(any_value[0] if len(any_value) == 1 else any_value)
        if console[0]:
            log.info("%s%s", f"{shorten(prefix[0])}: " if prefix[0] else "", text)
        return io.NodeOutput(text, ui={"text": [text if display[0] else ""]})


class ShowAnyToJsonTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShowAnyToJsonTPU",
            display_name="Show Any to JSON (TPU)",
            category=JSON_CATEGORY,
            description="Turns any value into JSON and shows it: text that is JSON is laid out, tensors are described.",
            inputs=[io.AnyType.Input("any_value", tooltip="What to turn into JSON. A list is taken as a whole.")],
            outputs=[io.String.Output("json", display_name="json", tooltip="The value as JSON.")],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, any_value: list) -> io.NodeOutput:
        value = any_value[0] if len(any_value) == 1 else any_value
        try:
            text = dump(as_json(value))
        except MetadataError:
            text = dump(to_jsonable(value))
        return io.NodeOutput(text, ui={"text": [text]})


class JsonComparatorTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JsonComparatorTPU",
            display_name="JSON Comparator (TPU)",
            category=JSON_CATEGORY,
            description="Shows what differs between two JSON values: what was added, removed or changed, and where.",
            inputs=[
                io.AnyType.Input(
                    "json_old", tooltip="The one to start from: JSON text, or a value made of plain data."
                ),
                io.AnyType.Input("json_new", tooltip="The one to compare with it."),
            ],
            outputs=[
                io.String.Output(
                    "difference",
                    display_name="difference",
                    tooltip="A line for each difference: + added, - removed, ~ changed.",
                ),
                io.Boolean.Output("equal", display_name="equal", tooltip="Whether there is no difference."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, json_old: object, json_new: object) -> io.NodeOutput:
        changes = diff.compare(as_json(json_old), as_json(json_new))
        text = diff.describe(changes)
        return io.NodeOutput(text, not changes, ui={"text": [text]})


def converted(to: Callable[[object], object], value: object) -> object:
    """An output that cannot be had stops only the nodes that are connected to it, with the reason."""
    try:
        return to(value)
    except MetadataError as error:
        return ExecutionBlocker(f"JSON Extractor: {error}")


class JsonExtractorTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JsonExtractorTPU",
            display_name="JSON Extractor (TPU)",
            category=JSON_CATEGORY,
            description="Takes one value out of JSON by its path.",
            inputs=[
                io.AnyType.Input("json", tooltip="JSON text, or a value made of plain data."),
                io.String.Input(
                    "path",
                    default="",
                    tooltip='Where the value lies: 3.inputs.seed, nodes[0].type, nodes[id=7].pos[0], ["a.b"]. '
                    "Empty: the whole value.",
                ),
                io.String.Input(
                    "default",
                    default="",
                    optional=True,
                    tooltip='What to give where nothing lies at the path: JSON such as 5, true, [] or "", or any text. '
                    "Empty: that is an error.",
                ),
            ],
            outputs=[
                io.AnyType.Output("value", display_name="value", tooltip="The value as it is."),
                io.String.Output("string", display_name="string", tooltip="As text; lists and objects as JSON."),
                io.Int.Output("int", display_name="int", tooltip="As a whole number, cut towards zero."),
                io.Float.Output("float", display_name="float", tooltip="As a number."),
                io.Boolean.Output("boolean", display_name="boolean", tooltip="As true or false; numbers: 0 is false."),
            ],
        )

    @classmethod
    def execute(cls, json: object, path: str, default: str = "") -> io.NodeOutput:
        value = extract(as_json(json), path, default)
        kinds = (convert.to_text, convert.to_int, convert.to_float, convert.to_boolean)
        return io.NodeOutput(value, *(converted(to, value) for to in kinds))


class ReadJsonFileTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ReadJsonFileTPU",
            display_name="Read JSON File (TPU)",
            category=JSON_CATEGORY,
            description="Reads a JSON file from ComfyUI's input or output folder.",
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip="A file in the input folder, such as settings.json or sub/settings.json; "
                    "with [output] after it, one in the output folder.",
                )
            ],
            outputs=[
                io.String.Output("json", display_name="json", tooltip="The content as JSON text."),
                io.AnyType.Output("value", display_name="value", tooltip="The content as a value."),
            ],
        )

    @classmethod
    def validate_inputs(cls, path=None) -> bool | str:
        return media.check(path, JSON_FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, path) -> str:
        return media.fingerprint(path, JSON_FOLDERS)

    @classmethod
    def execute(cls, path: str) -> io.NodeOutput:
        value = media.read_json_file(path)
        return io.NodeOutput(dump(value), value)


class StatsSystemTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StatsSystemTPU",
            display_name="Stats System (TPU)",
            category=CATEGORY,
            description="Shows CPU, RAM, disks and TPU chips at the moment it runs. Put it between two nodes to look "
            "at the machine there.",
            inputs=[
                io.AnyType.Input(
                    "any_value",
                    optional=True,
                    tooltip="Handed on unchanged. The look is taken when it has arrived.",
                )
            ],
            outputs=[
                io.AnyType.Output("any_value_out", display_name="any_value", tooltip="The input, unchanged."),
                io.String.Output("stats", display_name="stats", tooltip="All figures as JSON; memory in bytes."),
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, any_value=None) -> float:
        return float("nan")  # equals nothing: every run looks anew

    @classmethod
    def execute(cls, any_value: object = None) -> io.NodeOutput:
        sample = take_sample()
        return io.NodeOutput(any_value, dump(sample), ui={"text": [describe_sample(sample)]})


NODES = [
    ShowAnyTPU,
    StatsSystemTPU,
    ShowAnyToJsonTPU,
    JsonComparatorTPU,
    JsonExtractorTPU,
    ReadJsonFileTPU,
]
