"""Rules for the monitor's scripts and words that need no browser to be checked."""

import json
import re

import pytest

from tests.comfy.server import REPOSITORY

PACK = REPOSITORY / "custom_nodes" / "ComfyUI-TPU-Monitor"
SCRIPTS = sorted((PACK / "web").glob("*.js"))
FRONTENDS_OWN = {"../../scripts/app.js", "../../scripts/api.js"}


def locale(language: str, name: str) -> dict:
    return json.loads((PACK / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_only_the_frontends_two_stable_modules_and_each_other(path):
    imported = set(re.findall(r'from "([^"]+)"', path.read_text(encoding="utf-8")))
    assert imported <= FRONTENDS_OWN | {f"./{other.name}" for other in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_a_server_sends_becomes_markup(path):
    text = path.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert word not in text


def test_only_the_entry_scripts_do_something_when_they_are_loaded():
    """ComfyUI imports every one of them."""
    acting = [path.name for path in SCRIPTS if "registerExtension(" in path.read_text(encoding="utf-8")]
    assert acting == ["monitor.js", "nodes.js"]  # the strip and the tab; the nodes' text boxes


def test_no_layout_is_animated():
    text = (PACK / "web" / "monitor.css").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(transition|animation)", text, re.MULTILINE)


def test_each_setting_has_a_name_and_a_tooltip_in_both_languages():
    ids = set(re.findall(r'"(TPUMonitor\.[\w.]+)"', (PACK / "web" / "settings.js").read_text(encoding="utf-8")))
    assert len(ids) == 10
    for language in ("en", "zh"):
        found = locale(language, "settings")
        assert set(found) == {id_.replace(".", "_") for id_ in ids}
        assert all(text["name"] and text["tooltip"] for text in found.values())
    assert set(locale("en", "main")["settingsCategories"]) == set(locale("zh", "main")["settingsCategories"])


def test_both_languages_have_the_same_texts_with_the_same_gaps():
    text = (PACK / "web" / "texts.js").read_text(encoding="utf-8")
    english, chinese = text[text.index("  en: {") : text.index("  zh: {")], text[text.index("  zh: {") :]
    pairs = [dict(re.findall(r'^    "?([\w.-]+)"?: "(.*)",$', part, re.MULTILINE)) for part in (english, chinese)]
    assert len(pairs[0]) > 30
    assert list(pairs[0]) == list(pairs[1])
    for key in pairs[0]:
        gaps = [sorted(re.findall(r"\{\d\}", each[key])) for each in pairs]
        assert gaps[0] == gaps[1], key


def test_the_texts_that_scripts_ask_for_exist():
    known = set(re.findall(r'^    "?([\w.-]+)"?: "', (PACK / "web" / "texts.js").read_text("utf-8"), re.MULTILINE))
    asked = {key for path in SCRIPTS for key in re.findall(r'\btext\("([\w.]+)"', path.read_text("utf-8"))}
    assert asked
    assert asked <= known
