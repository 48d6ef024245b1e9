"""Turns a workflow as the ComfyUI frontend saves it (nodes and links) into the prompt its server executes.

Does what the frontend's `graphToPrompt()` does, for the parts a workflow file of this repository may use: reroutes,
primitive nodes, muted and bypassed nodes, seeds with their "control after generate" value.
Subgraphs and group nodes are refused.
Standard library only: the demo and the tests share it.
"""

from __future__ import annotations

CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# Inputs with one of these options get an upload button behind the section's widgets.
UPLOADS = ("image_upload", "video_upload", "audio_upload")
# Nodes that exist in the frontend only.
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
MUTED, BYPASSED = 2, 4


class WorkflowError(ValueError):
    """The workflow cannot be turned into a prompt for this server."""


def to_api_prompt(workflow: dict, object_info: dict) -> dict:
    """The prompt for `POST /prompt`. `object_info` is what the server's `/object_info` answers."""
    graph = _Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        if not graph.executed(node):
            continue
        if node["type"] not in object_info:
            raise WorkflowError(
                f"node {node['id']} has the type {node['type']!r}, which this server does not know. "
                f"Is its node pack installed, and did it load (see the server's log for IMPORT FAILED)?"
            )
        info = object_info[node["type"]]
        inputs = _widget_inputs(node, info)
        inputs.update(_linked_inputs(node, graph))
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or info.get("display_name") or node["type"]},
        }
    return _without_dangling_links(prompt)


class _Graph:
    def __init__(self, workflow: dict) -> None:
        if not isinstance(workflow.get("nodes"), list):
            raise WorkflowError("expected a saved workflow with a list 'nodes'; is this an API prompt?")
        if (workflow.get("definitions") or {}).get("subgraphs"):
            raise WorkflowError("the workflow holds subgraphs, which this converter does not support: unpack them")
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = dict(_origin(link) for link in workflow.get("links") or [])

    def executed(self, node: dict) -> bool:
        return node.get("mode", 0) not in (MUTED, BYPASSED) and node["type"] not in (*NOTES, REROUTE, PRIMITIVE)

    def resolve(self, link_id: int | None, seen: frozenset = frozenset()) -> list | dict | None:
        """Where a link really comes from: [node id, slot], {"value": ...} of a primitive, or None for nowhere."""
        if link_id is None:
            return None
        if link_id not in self.links or link_id in seen:
            raise WorkflowError(f"link {link_id} is {'a loop' if link_id in seen else 'not in the workflow'}")
        seen = seen | {link_id}
        node_id, slot = self.links[link_id]
        node = self.nodes.get(node_id)
        if node is None:
            raise WorkflowError(f"link {link_id} comes from node {node_id}, which is not in the workflow")
        if node.get("mode", 0) == MUTED:
            return None
        if node["type"] == REROUTE:
            inputs = node.get("inputs") or [{}]
            return self.resolve(inputs[0].get("link"), seen)
        if node.get("mode", 0) == BYPASSED:
            return self.resolve(_bypass_link(node, slot), seen)
        if node["type"] == PRIMITIVE:
            values = node.get("widgets_values") or [None]
            return {"value": values[0]}
        return [str(node_id), slot]


def _origin(link: list | dict) -> tuple:
    """(link id, (origin node, origin slot)) of a link in either of the two formats the frontend has written."""
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def _bypass_link(node: dict, slot: int) -> int | None:
    """A bypassed node hands on the input of the output's type: at the same position if it fits, else the first one."""
    wanted = node["outputs"][slot]["type"]
    inputs = node.get("inputs") or []
    order = inputs[slot : slot + 1] + inputs
    fitting = [each for each in order if each.get("link") is not None and wanted in (each["type"], "*")]
    return fitting[0]["link"] if fitting else None


def _widget_inputs(node: dict, info: dict) -> dict:
    values = node.get("widgets_values")
    if isinstance(values, dict):
        names = {name for name, _, _ in _widgets(info) if name}
        return {name: _literal(value) for name, value in values.items() if name in names}
    left = list(values or [])
    inputs = {}
    for name, spec, required in _widgets(info):
        if name is None:
            left = left[1:]  # the upload button's own value
            continue
        kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
        if left:
            inputs[name] = _literal(left.pop(0))
            if left and _has_control(name, kind, options) and left[0] in CONTROL_VALUES:
                left.pop(0)
        elif "default" in options:
            # Saved before this input existed: the frontend shows, and sends, its default.
            inputs[name] = options["default"]
        elif required and _input_link(node, name) is None:
            raise WorkflowError(f"node {node['id']} ({node['type']}) has no value for its input {name!r}")
    return inputs


def _widgets(info: dict) -> list:
    """(name, spec, required) of every widget, in the order its value is saved. The name of an upload button is None."""
    found, uploads = [], []
    for section in ("required", "optional"):
        specs = info["input"].get(section) or {}
        order = (info.get("input_order") or {}).get(section) or list(specs)
        for name in order:
            spec = specs[name]
            options = spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(spec[0], list) or spec[0] in WIDGET_TYPES
            if is_widget and not options.get("forceInput"):
                found.append((name, spec, section == "required"))
        if any(len(spec) > 1 and any(spec[1].get(key) for key in UPLOADS) for spec in specs.values()):
            # The frontend sorts by input_order, where the server sends one, and its own button comes last.
            (uploads if info.get("input_order") else found).append((None, [], False))
    return found + uploads


def _has_control(name: str, kind: object, options: dict) -> bool:
    declared = options.get("control_after_generate")
    return bool(declared) if declared is not None else kind == "INT" and name in ("seed", "noise_seed")


def _linked_inputs(node: dict, graph: _Graph) -> dict:
    inputs = {}
    for each in node.get("inputs") or []:
        origin = graph.resolve(each.get("link"))
        if isinstance(origin, dict):
            inputs[each["name"]] = _literal(origin["value"])
        elif origin is not None:
            inputs[each["name"]] = origin
    return inputs


def _input_link(node: dict, name: str) -> int | None:
    return next((each.get("link") for each in node.get("inputs") or [] if each["name"] == name), None)


def _literal(value: object) -> object:
    # A bare list would be read as a link by the server.
    return {"__value__": value} if isinstance(value, list) else value


def _without_dangling_links(prompt: dict) -> dict:
    for node in prompt.values():
        node["inputs"] = {
            name: value
            for name, value in node["inputs"].items()
            if not (isinstance(value, list) and value[0] not in prompt)
        }
    return prompt
