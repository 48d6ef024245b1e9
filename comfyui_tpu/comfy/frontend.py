"""Files of this library for the browser, served once for all packs."""

from __future__ import annotations

from pathlib import Path


def register_frontend() -> None:
    """Have ComfyUI serve and load ``comfyui_tpu/comfy/web``. Safe to call again, by every pack."""
    import nodes

    nodes.EXTENSION_WEB_DIRS["comfyui-tpu"] = str(Path(__file__).parent / "web")
