"""ComfyUI-Flux2-TPU: FLUX.2 images on Cloud TPUs. Nodes only; the work is done by the package comfyui_tpu."""

import importlib.util

if importlib.util.find_spec("comfyui_tpu") is None:
    raise ImportError(
        "ComfyUI-Flux2-TPU needs the package comfyui-tpu in ComfyUI's Python environment. "
        "Run `python3 setup.py install` in a clone of its repository, or, with that environment's pip, "
        "`pip install '/path/to/the/clone[tpu,monitor]'`."
    )

from .nodes import comfy_entrypoint

# Help pages: docs/<node id>/<language>.md. ComfyUI serves them; it would also import every .js below this folder.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
