"""Who may import whom (shared/design/architecture.md), read from the source."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"}
COMFYUI |= {"node_helpers", "nodes", "server"}


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*rooms: str) -> list[Path]:
    found = [path for room in rooms for path in sorted((REPOSITORY / "comfyui_tpu" / room).rglob("*.py"))]
    assert found
    return found


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", files("ops", "runtime", "models"), ids=name)
def test_only_the_comfy_room_imports_comfyui(path):
    assert not {i for i in imports(path) if i.split(".")[0] in COMFYUI}


@pytest.mark.parametrize("path", files("ops"), ids=name)
def test_ops_never_import_torch_or_the_rooms_above(path):
    assert not {i for i in imports(path) if i.split(".")[0] in {"torch", "torchax", "diffusers", "transformers"}}
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu") and not i.startswith("comfyui_tpu.ops")}


@pytest.mark.parametrize("path", files("runtime"), ids=name)
def test_the_runtime_knows_no_model(path):
    above = ("comfyui_tpu.models", "comfyui_tpu.comfy", "diffusers", "transformers")
    assert not {i for i in imports(path) if i.startswith(above)}


@pytest.mark.parametrize("path", files("models"), ids=name)
def test_models_import_only_downwards(path):
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu.comfy") and i[17:18] in {"", "."}}


def test_nothing_process_wide_is_switched_on():
    """The words of the acceptance command, and of the dangers the quality bar names."""
    for root in ("comfyui_tpu", "custom_nodes"):
        for path in (REPOSITORY / root).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for word in ("enable_globally", "set_default_dtype", "trust_remote_code", "import pickle", "shell=True"):
                assert word not in text, f"{word} in {name(path)}"
            calls = {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and hasattr(n.func, "id")}
            assert not calls & {"eval", "exec"}, name(path)
