"""One real server for the whole session, with our packs and tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bootstrap.workflow import to_api_prompt
from tests.checkpoints import write
from tests.comfy.server import REPOSITORY, ComfyServer


@pytest.fixture(scope="session")
def server(comfyui_checkout, tmp_path_factory) -> ComfyServer:
    base = tmp_path_factory.mktemp("comfyui")
    packs = base / "custom_nodes"
    packs.mkdir()
    for pack in (REPOSITORY / "custom_nodes").glob("ComfyUI-*"):
        (packs / pack.name).symlink_to(pack)
    (packs / "probe").symlink_to(Path(__file__).parent / "probe")
    for name in ("wan21-tiny", "flux2-tiny"):
        write(name, base / "models" / "diffusers" / name)
    with ComfyServer(comfyui_checkout, base) as server:
        yield server


@pytest.fixture(scope="session")
def models_folder(server) -> Path:
    return server.base / "models" / "diffusers"


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.get("/object_info")


@pytest.fixture
def demo(object_info) -> dict:
    """The demo workflow as an API prompt: 2 text encoder, 3 sampler, 4 VAE decoder, 5 Create Video, 6 Save Video."""
    workflow = json.loads((REPOSITORY / "examples" / "wan21_t2v_demo.json").read_text(encoding="utf-8"))
    return to_api_prompt(workflow, object_info)
