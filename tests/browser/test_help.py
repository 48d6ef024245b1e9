"""Help pages and translations of every node as the frontend shows them, in English and Chinese."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Page

from bootstrap.examples import PACKS
from tests.browser.conftest import Site, load, set_settings
from tests.browser.examples import STORE
from tests.comfy.contract import as_shown
from tests.comfy.server import REPOSITORY

HEADING = ".node-help-content h1"
# A node of this type alone on the canvas, selected.
SELECT = """(type) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    node.pos = [500, 200];
    app.graph.add(node);
    Object.assign(app.canvas.ds, { scale: 1, offset: [0, 100] });
    app.canvas.selectNode ? app.canvas.selectNode(node) : app.canvas.select(node);
    app.canvas.setDirty(true, true);
}"""
# The newest frontend's info panel follows the selection; the pinned one's help stays until another is asked for.
HELP_OF_SELECTED = f"(type) => ({STORE})('nodeHelp')?.openHelp?.(({STORE})('nodeDef').nodeDefsByName[type])"
NAMES = """(types) => Object.fromEntries(types.map((type) => {
    const node = LiteGraph.createNode(type);
    const shown = (each) => [each.name, each.label ?? each.localized_name ?? each.name];
    const slots = Object.fromEntries([...(node.inputs ?? []), ...(node.widgets ?? [])].map(shown));
    // An output that is named like its type has core's translation of the type.
    const outputs = (node.outputs ?? []).map((each, i) => [i, each]).filter(([, each]) => each.name !== each.type);
    const labels = Object.fromEntries(outputs.map(([i, each]) => [i, shown(each)[1]]));
    return [type, { title: node.title, inputs: slots, outputs: labels }];
}))"""


def texts(language: str) -> dict:
    """What the packs' files say of each node."""
    found = {}
    for pack in sorted(set(PACKS.values())):
        path = REPOSITORY / "custom_nodes" / pack / "locales" / language / "nodeDefs.json"
        found |= as_shown(json.loads(path.read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module", params=["en", "zh"])
def language(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(language: str, site: Site, open_page) -> Page:
    page = open_page()
    set_settings(page, **{"Comfy.Locale": language})
    load(page, site)
    yield page
    set_settings(page, **{"Comfy.Locale": "en"})
    page.context.close()


def test_every_help_page_opens_beside_its_node(page, language, shot):
    for number, (node_id, text) in enumerate(texts(language).items()):
        page.evaluate(SELECT, node_id)
        if number == 0:
            page.get_by_test_id("info-button").click()
        else:
            page.evaluate(HELP_OF_SELECTED, node_id)
        shown = f"(title) => document.querySelector('{HEADING}')?.textContent.trim() === title"
        page.wait_for_function(shown, arg=text["display_name"])
        if node_id == "Wan22I2VTPUSampler":
            page.wait_for_timeout(500)
            shot(page, f"help-{language}")


def test_every_name_on_a_node_is_in_the_users_language(page, language):
    expected = texts(language)
    shown = page.evaluate(NAMES, list(expected))
    for node_id, text in expected.items():
        assert shown[node_id]["title"] == text["display_name"]
        named = {name: each["name"] for name, each in text["inputs"].items() if "name" in each}
        assert {name: shown[node_id]["inputs"][name] for name in named} == named, node_id
        for index, name in shown[node_id]["outputs"].items():
            assert name == text["outputs"][index].get("name", name), node_id
