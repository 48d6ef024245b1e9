"""kill -9 in the middle of a load, then a restart: the next run is clean."""

import pytest
import websocket

from comfyui_tpu.runtime.memory import BUDGET_VARIABLE
from tests.comfy.server import ComfyServer
from tests.reliability.models import BUDGET, flux2

pytestmark = pytest.mark.server


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_a_kill_during_a_load_leaves_nothing_that_disturbs_the_next_start(comfyui_checkout, make_base, tmp_path):
    base, cache = make_base(), tmp_path / "cache"
    environment = {BUDGET_VARIABLE: str(BUDGET), "COMFYUI_TPU_CACHE": str(cache)}
    with ComfyServer(comfyui_checkout, base, environment=environment) as server:
        server.post("/reliability/slow", {"seconds": 1.0})
        page = websocket.create_connection(f"{server.url.replace('http', 'ws')}/ws?clientId=killed")
        server.post("/prompt", {"prompt": flux2(seed=1), "client_id": "killed"})
        while not (isinstance(message := page.recv(), bytes) and b"loading text_encoder" in message):
            pass
        server.kill()
    before = files(base)
    with ComfyServer(comfyui_checkout, base, environment=environment) as server:
        done = server.run(flux2(seed=1))
        assert done.succeeded, done.why
        for word in ("IMPORT FAILED", "Traceback", "Error reading persistent compilation cache"):
            assert word not in server.log()
    assert not [path for path in files(base) - before if path.suffix in (".tmp", ".incomplete", ".part")]
