"""One real server for all reliability tests, whose devices have room for only one model at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfyui_tpu.runtime.memory import BUDGET_VARIABLE
from tests.comfy.server import REPOSITORY, ComfyServer
from tests.reliability.models import BUDGET, write_checkpoints

TOKEN = "hf_ThisIsTheSecretOfTheReliabilityTests"  # noqa: S105


def prepare(base: Path) -> Path:
    """A ComfyUI base folder with our packs and the tests' own."""
    packs = base / "custom_nodes"
    packs.mkdir(parents=True)
    for pack in (REPOSITORY / "custom_nodes").glob("ComfyUI-*"):
        (packs / pack.name).symlink_to(pack)
    (packs / "reliability").symlink_to(Path(__file__).parent / "probe")
    return base


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reliability") / "diffusers"
    write_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def make_base(checkpoints, tmp_path_factory):
    """Makes base folders that share the checkpoints."""

    def make() -> Path:
        base = prepare(tmp_path_factory.mktemp("comfyui"))
        (base / "models").mkdir()
        (base / "models" / "diffusers").symlink_to(checkpoints)
        return base

    return make


@pytest.fixture(scope="session")
def server(comfyui_checkout, make_base) -> ComfyServer:
    environment = {BUDGET_VARIABLE: str(BUDGET), "HF_TOKEN": TOKEN}
    with ComfyServer(comfyui_checkout, make_base(), environment=environment) as server:
        yield server


@pytest.fixture
def state(server):
    """``state()``: what the server's process holds, counted independently of the library."""
    return lambda: server.get("/reliability/state")
