"""Who may import whom (shared/design/architecture.md), read from the source."""

import ast
import subprocess
import sys
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


@pytest.mark.parametrize("path", files("ops", "runtime", "models", "monitor"), ids=name)
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


@pytest.mark.parametrize("path", files("monitor"), ids=name)
def test_the_monitor_imports_neither_jax_nor_torch_nor_another_room(path):
    """It must not take the TPU, nor wait for whoever has it."""
    allowed = set(sys.stdlib_module_names) | {"comfyui_tpu", "grpc", "psutil", "tpu_info"}
    assert {i.split(".")[0] for i in imports(path)} <= allowed
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu") and not i.startswith("comfyui_tpu.monitor")}


def test_a_sample_needs_neither_jax_nor_torch():
    """In a process of its own, with everything that is imported late."""
    code = (
        "import sys; from comfyui_tpu.monitor.sample import Sampler; Sampler().sample();"
        "assert 'grpc' in sys.modules; print(sorted({'jax', 'jaxlib', 'libtpu', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("path", files("ops", "runtime", "models"), ids=name)
def test_the_planner_is_above_what_it_plans(path):
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu.plan")}


@pytest.mark.parametrize("path", files("ops", "runtime", "models", "plan"), ids=name)
def test_the_benchmarks_are_above_what_they_measure(path):
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu.bench")}


# `bench run` times whole pipelines.
OF_PIPELINES = {"cli.py", "measure.py", "run.py", "stages.py"}


@pytest.mark.parametrize("path", [path for path in files("bench") if path.name not in OF_PIPELINES], ids=name)
def test_the_kernels_benchmarks_know_operators_and_hardware_and_no_model(path):
    allowed = (
        "bench",
        "ops",
        "plan.bundles",
        "plan.costs",
        "plan.hardware",
        "plan.hlo",
        "runtime.errors",
        "runtime.files",
    )
    ours = {i.removeprefix("comfyui_tpu.") for i in imports(path) if i.startswith("comfyui_tpu.")}
    assert {i for i in ours if not i.startswith(allowed)} <= {"plan"}


@pytest.mark.parametrize("path", files("plan"), ids=name)
def test_the_planner_imports_only_downwards(path):
    assert not {i for i in imports(path) if i.startswith("comfyui_tpu.comfy") and i[17:18] in {"", "."}}


@pytest.mark.parametrize("path", files("metadata"), ids=name)
def test_metadata_is_read_without_torch_jax_or_the_other_rooms(path):
    allowed = {*sys.stdlib_module_names, "PIL", "av"}
    found = {i for i in imports(path) if not i.startswith("comfyui_tpu.metadata")}
    assert {i.split(".")[0] for i in found} <= allowed


def test_nothing_process_wide_is_switched_on():
    """The words of the acceptance command, and of the dangers the quality bar names."""
    for root in ("comfyui_tpu", "custom_nodes"):
        for path in (REPOSITORY / root).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for word in ("enable_globally", "set_default_dtype", "trust_remote_code", "import pickle", "shell=True"):
                assert word not in text, f"{word} in {name(path)}"
            calls = {n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and hasattr(n.func, "id")}
            assert not calls & {"eval", "exec"}, name(path)
