"""ComfyUI's "Unload models" and ``POST /free`` also release device memory. The only monkey patch of this library.

Core has no event for it, so ``comfy.model_management.unload_all_models`` is wrapped, once per process.
"""

from __future__ import annotations

import functools
import logging
import sys

log = logging.getLogger(__name__)

_MARK = "_releases_tpu_memory"


def install_unload_hook() -> None:
    """Wrap core's ``unload_all_models``. Safe to call again: by every pack, and after a module was reloaded."""
    import comfy.model_management as model_management

    original = model_management.unload_all_models
    if _is_wrapped(original):
        return

    @functools.wraps(original)
    def unload_all_models(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        finally:
            release_device_memory()

    setattr(unload_all_models, _MARK, True)
    model_management.unload_all_models = unload_all_models


def release_device_memory() -> int:
    """Release everything the registry holds; the number of bytes freed."""
    # Importing the registry here would initialise JAX and take the TPU just to learn that nothing is loaded.
    registry_module = sys.modules.get("comfyui_tpu.runtime.registry")
    if registry_module is None:
        return 0
    freed = registry_module.registry().release_all()
    log.info("Released %.1f MiB of device memory", freed / 2**20)
    return freed


def _is_wrapped(function: object) -> bool:
    """Whether the hook is in this function or in one that it wraps (another pack may have wrapped after us)."""
    while function is not None:
        if getattr(function, _MARK, False):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
