"""CONTRIBUTING's list for a new model family, checked for those that there are; and its map of the rooms."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from comfyui_tpu.bench import stages
from comfyui_tpu.plan import catalogue
from comfyui_tpu.plan.rehearsal import FAMILIES
from tests.checkpoints import WRITERS, write
from tests.docs.schemas import PACKS, REPOSITORY

EXAMPLES = {
    path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((REPOSITORY / "examples").glob("*.json"))
}
LANGUAGES = ("en", "zh")
each_family = pytest.mark.parametrize("pipeline", FAMILIES)


def imported(path: Path) -> set[str]:
    """Names that a file imports from modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def pack_of(pipeline: str) -> Path:
    """The pack whose nodes open the family's class."""
    found = [pack for pack in PACKS if any(FAMILIES[pipeline].__name__ in imported(path) for path in pack.glob("*.py"))]
    assert len(found) == 1, (
        f"expected one pack in custom_nodes/ that imports {FAMILIES[pipeline].__name__}; got {found}"
    )
    return found[0]


def node_ids(pack: Path) -> set[str]:
    return set(json.loads((pack / "locales/en/nodeDefs.json").read_text(encoding="utf-8")))


def models_of(workflow: dict, ids: set[str]) -> set[str]:
    """Every text among the widgets of the pack's nodes."""
    nodes = [node for node in workflow["nodes"] if node["type"] in ids]
    return {value for node in nodes for value in node.get("widgets_values") or [] if isinstance(value, str)}


def published(pipeline: str) -> set[str]:
    entries = catalogue.CATALOGUE.values()
    return {e.repository for e in entries if e.configs["model_index.json"]["_class_name"] == pipeline}


@pytest.fixture(scope="module")
def pipelines_of_tiny_checkpoints(tmp_path_factory) -> dict[str, str]:
    """Name of a tiny checkpoint → the pipeline that it is for."""
    base = tmp_path_factory.mktemp("families")
    indices = {name: write(name, base / name) / "model_index.json" for name in WRITERS}
    return {name: json.loads(path.read_text(encoding="utf-8"))["_class_name"] for name, path in indices.items()}


@each_family
def test_a_tiny_checkpoint_can_be_written(pipelines_of_tiny_checkpoints, pipeline):
    assert pipeline in pipelines_of_tiny_checkpoints.values()


@each_family
def test_a_parity_test_names_its_reference(pipeline):
    files = [path for path in (REPOSITORY / "tests/models").glob("*.py") if pipeline in imported(path)]
    assert [path for path in files if f"{pipeline}.from_pretrained" in path.read_text(encoding="utf-8")]


@each_family
def test_the_catalogue_has_a_published_model(pipeline):
    assert published(pipeline)


@each_family
def test_the_benchmark_knows_the_stages(pipeline):
    assert FAMILIES[pipeline] in stages._STAGES


@each_family
def test_the_pack_has_texts_and_help_pages_in_both_languages(pipeline):
    pack = pack_of(pipeline)
    ids = node_ids(pack)
    assert ids
    for language in LANGUAGES:
        texts = json.loads((pack / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(texts) == ids
        assert {path.parent.name for path in (pack / "web/docs").glob(f"*/{language}.md")} == ids
    assert "." not in pack.name


@each_family
def test_there_is_an_example_with_the_tiny_and_one_with_the_published_model(pipelines_of_tiny_checkpoints, pipeline):
    ids = node_ids(pack_of(pipeline))
    tiny = {name for name, found in pipelines_of_tiny_checkpoints.items() if found == pipeline}
    used = {path.stem: models_of(workflow, ids) for path, workflow in EXAMPLES.items()}
    assert [stem for stem, models in used.items() if stem.endswith("_demo") and models & tiny]
    assert [stem for stem, models in used.items() if not stem.endswith("_demo") and models & published(pipeline)]


@each_family
def test_a_contract_test_names_the_pack(pipeline):
    files = (REPOSITORY / "tests/comfy").glob("test_*contract.py")
    assert [path for path in files if f'"{pack_of(pipeline).name}"' in path.read_text(encoding="utf-8")]


@each_family
@pytest.mark.parametrize("readme", ["README.md", "README_EN.md"])
def test_the_readme_has_the_nodes_table(pipeline, readme):
    assert f"<!-- table: nodes {pack_of(pipeline).name} -->" in (REPOSITORY / readme).read_text(encoding="utf-8")


def test_the_map_names_every_room():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (REPOSITORY / "comfyui_tpu").glob("*/__init__.py")]
    assert len(rooms) > 5
    assert [room for room in rooms if f"`comfyui_tpu/{room}/`" not in text] == []
