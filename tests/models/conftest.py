import jax
import pytest
from diffusers import WanPipeline

from tests.checkpoints import write


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    return write("wan21-tiny", tmp_path_factory.mktemp("models") / "wan21-tiny")


@pytest.fixture(scope="session")
def wan_reference(wan_folder):
    pipeline = WanPipeline.from_pretrained(wan_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session", params=[1, 8], ids=["1-device", "8-devices"])
def devices(request):
    return tuple(jax.devices()[: request.param])
