"""All of the monitor's nodes in one workflow that is loaded, turned into a prompt and run by a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page

from tests.browser.conftest import Errors, eventually

SHOW, JSON_TEXT = "ShowAnyTPU", '{"a": {"seed": 7}}'
# name: (type, widget values, links {input: (name, output slot)})
NODES = {
    "load": ("LoadImageWithMetadataTPU", {"image": "browser.png"}, {}),
    "save": (
        "SaveImageWithMetadataTPU",
        {"filename_prefix": "browser", "metadata_extra": '{"Author": "李"}'},
        {"image": ("load", 0)},
    ),
    "preview": ("PreviewFromImageTPU", {}, {"metadata_raw": ("load", 3)}),
    "extract": ("MetadataExtractorTPU", {}, {"metadata_raw": ("save", 0)}),
    "show extra": (SHOW, {}, {"any_value": ("extract", 3)}),
    "compare": (
        "MetadataComparatorTPU",
        {"what": "extra"},
        {"metadata_raw_old": ("load", 3), "metadata_raw_new": ("save", 0)},
    ),
    "size": ("ImageResolutionTPU", {}, {"image": ("image", 0)}),
    "text": ("PrimitiveStringMultilineTPU", {"value": JSON_TEXT}, {}),
    "file": ("ReadJsonFileTPU", {"path": "browser.json"}, {}),
    "differ": ("JsonComparatorTPU", {}, {"json_old": ("text", 0), "json_new": ("file", 1)}),
    "seed": ("JsonExtractorTPU", {"path": "a.seed"}, {"json": ("text", 0)}),
    "layout": ("ShowAnyToJsonTPU", {}, {"any_value": ("text", 0)}),
    "integer": ("PrimitiveIntegerTPU", {"value": 3}, {}),
    "float": ("PrimitiveFloatTPU", {"value": 0.25}, {}),
    "flag": ("PrimitiveBooleanTPU", {"value": True}, {}),
    "word": ("PrimitiveStringTPU", {"value": "word"}, {}),
    "list": ("ListAnyTPU", {}, {"any_1": ("integer", 0), "any_2": ("float", 0), "any_3": ("seed", 2)}),
    "show list": (SHOW, {}, {"any_value": ("list", 0)}),
    "strings": ("ListStringTPU", {"string_1": "x", "delimiter": "+"}, {"string_2": ("word", 0)}),
    "pipe": ("PipeToAnyTPU", {}, {"any_1": ("strings", 0), "any_2": ("load", 0)}),
    "edit": ("PipeEditAnyTPU", {}, {"pipe": ("pipe", 0), "any_3": ("flag", 0)}),
    "unpipe": ("PipeFromAnyTPU", {}, {"pipe": ("edit", 0)}),
    "any": ("SwitchAnyTPU", {}, {"on_true": ("unpipe", 1), "boolean": ("flag", 0)}),
    "show any": (SHOW, {}, {"any_value": ("any", 0)}),
    "string": ("SwitchStringTPU", {"boolean": False, "on_false": "no"}, {}),
    "show string": (SHOW, {}, {"any_value": ("string", 0)}),
    "image": ("SwitchImageTPU", {"boolean": False}, {"on_false": ("unpipe", 2)}),
    "mask": ("SwitchMaskTPU", {}, {"on_true": ("load", 1)}),
    "show mask": (SHOW, {}, {"any_value": ("mask", 0)}),
    "empty": ("EmptyLatentImage", {"width": 64, "height": 64}, {}),
    "latent": ("SwitchLatentTPU", {}, {"on_true": ("empty", 0)}),
    "stats": ("StatsSystemTPU", {}, {"any_value": ("latent", 0)}),
    "show latent": (SHOW, {}, {"any_value": ("stats", 0)}),
    # Nothing here makes conditioning without a model: this one is loaded, but leads nowhere and does not run.
    "conditioning": ("SwitchConditioningTPU", {}, {}),
}
TEXTS = {
    "show extra": '"Author": "李"',
    "preview": "Resolution: 24 × 16",
    "compare": '+ Author: "李"',
    "size": "24 × 16",
    "differ": "~ a.seed: 7 → 8",
    "layout": '    "seed": 7',
    "show list": "[\n  3,\n  0.25,\n  7\n]",
    "show any": "x+word",
    "show string": "no",
    "show mask": '"tensor": "torch.float32"',
    "stats": "RAM ",
    "show latent": '"shape": [\n      1,\n      4,\n      8,\n      8\n    ]',
}

BUILD = """(specs) => {
  app.graph.clear();
  const made = {};
  Object.entries(specs).forEach(([name, [type, values]], i) => {
    const node = (made[name] = LiteGraph.createNode(type));
    node.title = name;
    node.pos = [(i % 7) * 420, Math.floor(i / 7) * 480];
    app.graph.add(node);
    for (const [key, value] of Object.entries(values)) node.widgets.find((widget) => widget.name === key).value = value;
  });
  for (const [name, [, , links]] of Object.entries(specs))
    for (const [input, [origin, slot]] of Object.entries(links))
      if (!made[origin].connect(slot, made[name], made[name].findInputSlot(input)))
        throw new Error(`${origin} → ${name}.${input}`);
  return JSON.stringify(app.graph.serialize());
}"""
SAVE = "JSON.stringify(app.graph.serialize())"
SHOWN = """() => Object.fromEntries(
  app.graph._nodes.map((node) => [node.title, node.widgets?.find((widget) => widget.name === "shown_text")?.value])
)"""


# Texts in boxes that are drawn somewhere on the page.
VISIBLE = """() => [...document.querySelectorAll("textarea")]
  .filter((box) => box.readOnly && box.checkVisibility() && box.clientHeight > 40)
  .map((box) => box.value)"""


@pytest.fixture(scope="module")
def errors() -> Errors:
    return Errors()


@pytest.fixture(scope="module")
def page(open_page, errors) -> Iterator[Page]:
    """A page of its own: the frontend asks the registry for each node type, which the console complains about."""
    page = open_page(errors)
    yield page
    page.context.close()


@pytest.fixture
def workflow(page: Page, site) -> dict:
    """What the browser saves of a graph with every node, built as a user does: by dropping nodes and drawing links."""
    folder = site.server.base / "input"
    folder.mkdir(exist_ok=True)
    texts = PngInfo()
    texts.add_text("Title", "old")
    Image.new("RGB", (24, 16), (200, 80, 40)).save(folder / "browser.png", pnginfo=texts)
    (folder / "browser.json").write_text(json.dumps({"a": {"seed": 8}}))
    page.evaluate("app.refreshComboInNodes()")
    return json.loads(page.evaluate(BUILD, NODES))


def run(page: Page) -> dict[str, str]:
    """Runs the workflow until each node shows its text; the texts by title."""
    page.evaluate("app.queuePrompt(0)")
    all_shown = f"(names) => {{ const shown = ({SHOWN})(); return names.every((name) => shown[name]); }}"
    page.wait_for_function(all_shown, arg=list(TEXTS), timeout=60_000)
    return page.evaluate(SHOWN)


def test_every_node_runs_in_a_workflow_and_shows_its_text(page: Page, site, shot, errors, workflow):
    assert values(workflow)["load"] == ["browser.png", 1, "image"]  # as bootstrap/workflow.py reads it
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    titles = {str(node["id"]): node["title"] for node in workflow["nodes"]}
    prompt = page.evaluate("app.graphToPrompt().then((found) => found.output)")
    sent = {titles[node_id]: node for node_id, node in prompt.items()}
    assert {name: node["class_type"] for name, node in sent.items()} == {name: spec[0] for name, spec in NODES.items()}
    for name, (_, _, links) in NODES.items():
        for key, (origin, slot) in links.items():
            found, index = sent[name]["inputs"][key]
            assert (titles[found], index) == (origin, slot)
    shown = run(page)
    assert [name for name, text in TEXTS.items() if text not in shown[name]] == []
    wanted, visible = {shown["show list"], shown["layout"], shown["show string"]}, set()

    def all_seen() -> bool:
        for name, offset in (("nodes", "[90, 160]"), ("nodes-below", "[90, -900]")):
            look_at(page, offset)
            page.wait_for_timeout(1000)
            shot(page, name)
            visible.update(page.evaluate(VISIBLE))
        return wanted <= visible

    eventually(page, all_seen, "the texts are drawn")
    # What is shown is not saved with the workflow, and shifts no widget's value.
    saved = json.loads(page.evaluate(SAVE))
    assert values(saved) == values(workflow)
    assert [text for text in errors.texts if "ComfyUI-TPU" in text or text.startswith("uncaught")] == []


def look_at(page: Page, offset: str) -> None:
    page.evaluate(f"app.canvas.ds.scale = 0.7; app.canvas.ds.offset = {offset}; app.canvas.setDirty(true, true)")


def test_nodes_2_0_show_the_texts_too(page: Page, site, shot, workflow):
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        shown = run(page)
        look_at(page, "[90, 160]")
        page.wait_for_function(f"(text) => ({VISIBLE})().includes(text)", arg=shown["layout"])
        shot(page, "nodes-2.0")
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def values(workflow: dict) -> dict:
    return {node["title"]: node.get("widgets_values") or [] for node in workflow["nodes"]}
