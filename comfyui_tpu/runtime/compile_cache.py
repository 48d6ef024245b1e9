"""XLA's persistent compile cache in a per-user folder, so that a second start does not compile again."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import jax

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$COMFYUI_TPU_CACHE``, else ``$XDG_CACHE_HOME/comfyui-tpu`` or ``~/.cache/comfyui-tpu``; then ``/xla``."""
    own = os.environ.get("COMFYUI_TPU_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comfyui-tpu"
    return base.expanduser() / "xla"


@functools.cache
def enable() -> Path | None:
    """Point JAX at the cache folder, once. A folder the user chose for JAX is left alone.

    This is JAX's own setting for the process, and the only one this library touches: it changes where executables are
    kept, never what is computed. Returns the folder in use, None when none can be written.
    """
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    folder = default_folder()
    try:
        # Private to the user: a cache that others can write to would let them run code as this user.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        log.warning(
            "no compile cache: cannot create %s (%s). Set COMFYUI_TPU_CACHE to a writable folder.", folder, error
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
