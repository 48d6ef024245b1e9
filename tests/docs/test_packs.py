"""Each pack is ready for the ComfyUI registry, and works alone beside the installed library."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKS = sorted((REPOSITORY / "custom_nodes").glob("ComfyUI-*"))
LIBRARY = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
each_pack = pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)

# What ComfyUI has loaded before it comes to custom nodes, once; then a process of its own for each pack.
LOAD = """
import asyncio, json, os, sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
before = set(nodes.NODE_CLASS_MAPPINGS)
for folder in sys.stdin.read().split("\\n"):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        loaded = asyncio.run(nodes.load_custom_node(folder))
        import comfyui_tpu
        print(json.dumps([loaded, comfyui_tpu.__file__, sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, folder
"""


def manifest(pack: Path) -> dict:
    return tomllib.loads((pack / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(pack: Path) -> list[str]:
    lines = (pack / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@each_pack
def test_the_manifest_is_as_the_registry_documents_it(pack):
    """docs.comfy.org/registry/specifications: names, versions, the two forms of a licence."""
    found = manifest(pack)
    project, comfy = found["project"], found["tool"]["comfy"]
    name = project["name"]
    assert len(name) < 100
    assert re.fullmatch(r"[a-z]+(-?[a-z0-9]+)*", name)
    assert "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"}
    assert project["description"]
    assert project["requires-python"] == LIBRARY["requires-python"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} == set(comfy)
    assert "Repository" in project["urls"]


@each_pack
def test_the_licence_travels_with_the_pack(pack):
    assert (pack / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


@each_pack
def test_the_requirements_name_this_library_and_extras_that_it_has(pack):
    (line,) = requirements(pack)
    assert manifest(pack)["project"]["dependencies"] == [line]
    extra = re.fullmatch(r"comfyui-tpu\[(\w+)\]>=0\.1,<0\.2", line).group(1)
    assert extra in LIBRARY["optional-dependencies"]
    assert LIBRARY["name"] == "comfyui-tpu"
    assert LIBRARY["version"].startswith("0.1.")


def test_no_two_packs_share_a_name():
    names = [manifest(pack)["project"]["name"] for pack in PACKS]
    assert len(set(names)) == len(PACKS) == 5


@each_pack
def test_a_pack_holds_no_link_and_knows_no_other_pack(pack):
    assert not [path for path in pack.rglob("*") if path.is_symlink()]
    others = {other.name for other in PACKS} - {pack.name}
    for path in pack.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [other for other in others if other in text]
        assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level > 1]


# --- installed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The library, built as `pip install` of a clone builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory) -> Path:
    """A folder with the installed library alone: not this checkout."""
    folder = tmp_path_factory.mktemp("library")
    pip("install", "--no-deps", "--no-index", "--quiet", "--target", folder, wheel)
    return folder


def test_pip_reads_every_packs_requirements_and_finds_the_library(wheel, tmp_path):
    files = [part for pack in PACKS for part in ("-r", pack / "requirements.txt")]
    place = ["--no-deps", "--no-index", "--find-links", wheel.parent, "--target", tmp_path]
    assert "Would install comfyui-tpu-0.1.0" in pip("install", "--dry-run", *place, *files)


@pytest.fixture(scope="module")
def alone(comfyui_checkout, library, tmp_path_factory) -> dict[str, list]:
    """Pack → [loaded, where the library came from, node ids]; its folder is named as `comfy node install` names it."""
    base = tmp_path_factory.mktemp("alone")
    folders = [base / pack.name / manifest(pack)["project"]["name"] for pack in PACKS]
    for pack, folder in zip(PACKS, folders, strict=True):
        shutil.copytree(pack, folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input="\n".join(map(str, folders)),
        cwd=comfyui_checkout,
        env={**os.environ, "PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[true", "[false"))]
    return dict(zip([pack.name for pack in PACKS], answers, strict=True))


@pytest.mark.server
@each_pack
def test_a_pack_alone_loads_with_the_installed_library(alone, library, pack):
    loaded, found, node_ids = alone[pack.name]
    assert loaded is True
    assert Path(found).is_relative_to(library)
    assert set(node_ids) == set(json.loads((pack / "locales/en/nodeDefs.json").read_text(encoding="utf-8")))
