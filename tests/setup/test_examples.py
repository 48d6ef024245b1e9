"""The examples a user opens: each is in its pack too, as it is, with a picture for ComfyUI's template browser."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from bootstrap import examples
from bootstrap.layout import REPO
from tests.checkpoints import WRITERS

each = pytest.mark.parametrize("name", examples.PACKS)


def workflow(name: str) -> dict:
    return json.loads(examples.source(name).read_text(encoding="utf-8"))


def model_ids(name: str) -> set[str]:
    """Every text in a widget that names a checkpoint: a tiny one, or a repository of Hugging Face."""
    nodes = [node for node in workflow(name)["nodes"] if not re.match(r"Save|MarkdownNote", node["type"])]
    texts = {value for node in nodes for value in node.get("widgets_values") or [] if isinstance(value, str)}
    return {text for text in texts if text in WRITERS or re.fullmatch(r"[\w.-]+/[\w.-]+", text)}


def test_the_table_names_every_example():
    assert {path.stem for path in (REPO / "examples").iterdir()} == set(examples.PACKS)


def test_every_pack_has_examples_and_one_of_them_needs_no_real_model():
    packs = {path.name for path in (REPO / "custom_nodes").glob("ComfyUI-*")}
    assert {examples.PACKS[name] for name in examples.DEMOS} == packs


@each
def test_the_copy_in_the_pack_is_the_example(name):
    copy = examples.copy_in_pack(name)
    assert not copy.is_symlink()
    assert copy.read_bytes() == examples.source(name).read_bytes(), "run: python -m bootstrap.examples"


def test_no_copy_and_no_picture_is_left_of_an_example_that_is_gone():
    found = set((REPO / "custom_nodes").glob(f"ComfyUI-*/{examples.FOLDER}/*"))
    expected = {path(name) for name in examples.PACKS for path in (examples.copy_in_pack, examples.thumbnail)}
    assert found == expected


@each
def test_its_picture_is_a_small_square(name):
    path = examples.thumbnail(name)
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 400
        assert len(picture.getcolors(2**20)) > 1000, "something is drawn"


@each
def test_demos_take_tiny_checkpoints_and_the_others_real_ones(name):
    tiny = {model in WRITERS for model in model_ids(name)}
    assert tiny == ({False} if name not in examples.DEMOS else set() if name == "monitor_metadata" else {True})


@each
def test_a_note_in_both_languages_says_what_to_install_and_to_make(name):
    (note,) = [node for node in workflow(name)["nodes"] if node["type"] == "MarkdownNote"]
    english, chinese = note["widgets_values"][0].split("\n---\n")
    assert re.search("[\u4e00-\u9fff]{4}", chinese)
    assert not re.search("[\u4e00-\u9fff]", english)
    families = {re.match(r"Wan21|Wan22I2V|Flux2|CogVideoX", node["type"]) for node in workflow(name)["nodes"]} - {None}
    if name not in examples.DEMOS:
        folders = {f"ComfyUI-{match[0].replace('I2V', '-I2V')}-TPU" for match in families}
        assert all(f"**{folder}**" in text for folder in folders for text in (english, chinese))
    for model in model_ids(name) & set(WRITERS):
        assert f"python -m tests.checkpoints \\\n  {model} ComfyUI/models/diffusers/{model}\n" in english


@each
def test_nodes_of_ours_bear_the_name_their_language_gives_them(name):
    assert {node["type"] for node in workflow(name)["nodes"] if "title" in node} == {"MarkdownNote"}


@each
def test_every_link_leads_where_it_says(name):
    found = workflow(name)
    nodes = {node["id"]: node for node in found["nodes"]}
    for link, origin, slot, target, position, kind in found["links"]:
        output, taken = nodes[origin]["outputs"][slot], nodes[target]["inputs"][position]
        assert link in output["links"]
        assert taken["link"] == link
        assert kind == output["type"]
    linked = {taken["link"] for node in nodes.values() for taken in node["inputs"]} - {None}
    assert linked == {link[0] for link in found["links"]}
