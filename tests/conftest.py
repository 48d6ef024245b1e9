"""Every test process sees eight virtual CPU devices; this must be set before JAX starts. Where ComfyUI lies."""

import os
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its compiler alone is used, and it may be used by several processes
os.environ["HF_HUB_OFFLINE"] = "1"
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def comfyui_checkout() -> Path:
    checkout = Path(os.environ.get("COMFYUI_TPU_COMFYUI") or REPOSITORY / "ComfyUI")
    if not (checkout / "main.py").is_file():
        pytest.fail(f"No ComfyUI in {checkout}. Run `python3 setup.py test`, or set COMFYUI_TPU_COMFYUI.")
    return checkout
