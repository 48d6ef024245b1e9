"""What every pack's nodes owe their users: the table in nodes.md, texts in two languages, help pages, examples."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from bootstrap.workflow import to_api_prompt
from tests.comfy.server import REPOSITORY

Inputs = dict[str, tuple[str, dict]]


# What vue-i18n reads as syntax; as text: {'@'}. Unescaped, the text is not shown, nor its node in Nodes 2.0.
SYNTAX = "@{}|"


def as_shown(texts: dict) -> dict:
    """Translations as vue-i18n shows them. Fails for text that it cannot show."""
    shown = {}
    for key, value in texts.items():
        if isinstance(value, dict):
            shown[key] = as_shown(value)
            continue
        bare = re.sub(r"\{'[@{}|]'\}", "", value)
        assert not set(SYNTAX) & set(bare), f"{key}: write {{'@'}} for @ and so on: {value!r}"
        shown[key] = re.sub(r"\{'(.)'\}", r"\1", value)
    return shown


def table_names(page: str, heading: tuple[str, ...]) -> set[str]:
    """The names in code font in the first column of the table below a heading that starts so."""
    found, inside = set(), False
    for line in page.splitlines():
        if line.startswith("#"):
            inside = line.startswith(tuple(f"## {each}" for each in heading))
        elif inside and line.startswith("|"):
            found.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


@dataclass(frozen=True)
class Node:
    """A row of nodes.md: inputs and outputs in order; of an input's options only those that are named count."""

    display_name: str
    required: Inputs
    optional: Inputs
    outputs: list[tuple[str, str]]


def _check_chinese(texts: dict, inputs: dict, outputs: int) -> None:
    """A name and a tooltip for each input and output there is, and for no others."""
    # The widget that the frontend adds below a seed has a name only.
    control = {"control_after_generate"} & {key for spec in inputs.values() for key, given in spec[1].items() if given}
    assert set(texts["inputs"]) == set(inputs) | control
    assert set(texts["outputs"]) == {str(i) for i in range(outputs)}
    for name, each in (texts["inputs"] | texts["outputs"]).items():
        assert each["name"], name
        assert each.get("tooltip") or name in control, name


@dataclass(frozen=True)
class Contract:
    pack: str
    category: str
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return REPOSITORY / "custom_nodes" / self.pack

    def check_schema(self, object_info: dict, node_id: str) -> None:
        node, info = self.nodes[node_id], object_info[node_id]
        assert (info["display_name"], info["category"]) == (node.display_name, self.category)
        assert list(zip(info["output"], info["output_name"], strict=True)) == node.outputs
        for section, expected in (("required", node.required), ("optional", node.optional)):
            found = info["input"].get(section, {})
            assert list(found) == list(expected) == info["input_order"].get(section, [])
            for name, (kind, options) in expected.items():
                assert found[name][0] == kind
                assert {key: found[name][1].get(key) for key in options} == options, name

    def check_texts(self, server, object_info: dict, node_id: str) -> None:
        info = object_info[node_id]
        served = server.get("/i18n")
        english, chinese = (as_shown(served[language]["nodeDefs"][node_id]) for language in ("en", "zh"))
        assert english["display_name"] == info["display_name"]
        assert english["description"] == info["description"] != ""
        assert chinese["display_name"]
        assert chinese["description"]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        assert {name: spec[1]["tooltip"] for name, spec in inputs.items()} == {
            name: text["tooltip"] for name, text in english["inputs"].items()
        }
        tooltips = [english["outputs"][str(i)]["tooltip"] for i in range(len(info["output"]))]
        assert tooltips == info["output_tooltips"]
        assert all(tooltips)
        _check_chinese(chinese, inputs, len(info["output"]))

    def check_help_page(self, server, object_info: dict, node_id: str, language: str) -> None:
        """It lies where the frontend asks for it; it, or a node's page that it mentions, explains every input."""
        locale = json.loads((self.folder / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))

        def page(node: str) -> str:
            module = object_info[node]["python_module"].split(".")[1]
            return server.get_bytes(f"/extensions/{module}/docs/{node}/{language}.md").decode()

        text = page(node_id)
        assert text.startswith(f"# {locale[node_id]['display_name']}\n")
        mentioned = [page(node) for node in self.nodes if node != node_id and locale[node]["display_name"] in text]
        everything = "".join([text, *mentioned])
        inputs = object_info[node_id]["input"]
        names = {**inputs["required"], **inputs.get("optional", {})}
        missing = [name for name in names if f"`{name}`" not in everything]
        assert not missing
        outputs = set(object_info[node_id]["output_name"])
        for heading, known in ((("Inputs", "输入"), set(names)), (("Output", "输出"), outputs)):
            assert table_names(text, heading) <= known, f"{node_id}/{language}.md explains what the node does not have"


def example_prompts(object_info: dict, pattern: str) -> dict[str, dict]:
    """Example workflows by name, as API prompts in which every node has its inputs and no others."""
    prompts = {}
    for path in sorted((REPOSITORY / "examples").glob(pattern)):
        prompt = prompts[path.stem] = to_api_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)
        models = {node["inputs"]["model_id"] for node in prompt.values() if "model_id" in node["inputs"]}
        assert len(models) == 1
        for node in prompt.values():
            info = object_info[node["class_type"]]["input"]
            assert set(info["required"]) <= set(node["inputs"])
            assert set(node["inputs"]) <= {*info["required"], *info.get("optional", {})}
    return prompts
