"""Translations and help pages of all packs: for every node there is, for none that is gone, in both languages alike."""

import json

import pytest

from tests.comfy.contract import as_shown
from tests.comfy.server import REPOSITORY

pytestmark = pytest.mark.server

PACKS = sorted((REPOSITORY / "custom_nodes").glob("ComfyUI-*"), key=lambda pack: pack.name)
packs = pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
languages = pytest.mark.parametrize("language", ["en", "zh"])


def nodes_of(pack, object_info) -> set[str]:
    return {name for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{pack.name}"}


def texts(pack, language, file) -> dict:
    return json.loads((pack / "locales" / language / file).read_text(encoding="utf-8"))


def keys(tree: dict, path: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        found |= keys(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}"}
    return found


@packs
@languages
def test_every_node_has_its_texts_and_no_text_is_left_of_one_that_is_gone(pack, language, object_info):
    nodes = nodes_of(pack, object_info)
    assert nodes
    assert set(texts(pack, language, "nodeDefs.json")) == nodes


@packs
@languages
def test_every_node_has_its_help_page_and_no_page_is_left_of_one_that_is_gone(pack, language, object_info):
    pages = {page.parent.name for page in (pack / "web" / "docs").glob(f"*/{language}.md")}
    assert pages == nodes_of(pack, object_info)


@packs
def test_what_is_not_a_nodes_is_in_both_languages_too(pack):
    files = {path.name for path in pack.glob("locales/*/*.json")} - {"nodeDefs.json"}
    for file in files:
        english, chinese = (as_shown(texts(pack, language, file)) for language in ("en", "zh"))
        assert keys(english) == keys(chinese), file
