"""ComfyUI-TPU-Monitor: shows what the chips do, and nodes for metadata and debugging; comfyui_tpu does the work."""

import importlib.util

if importlib.util.find_spec("comfyui_tpu") is None:
    raise ImportError(
        "ComfyUI-TPU-Monitor needs the package comfyui-tpu in ComfyUI's Python environment. "
        "Run `python3 setup.py install` in a clone of its repository, or, with that environment's pip, "
        "`pip install '/path/to/the/clone[tpu,monitor]'`."
    )

from comfyui_tpu.comfy.monitor_server import start_monitor

from .nodes import comfy_entrypoint

# Here, because ComfyUI takes routes only until all packs are loaded.
start_monitor()

# The monitor's scripts, of which ComfyUI imports every .js, and help pages: docs/<node id>/<language>.md.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
