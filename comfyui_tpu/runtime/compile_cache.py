"""XLA's persistent compile cache in a per-user folder, so that a second start does not compile again."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import zlib
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
    remove_damaged(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def remove_damaged(folder: Path) -> list[Path]:
    """Remove entries that a kill or a full disk left unfinished; returns them.

    JAX writes an entry under its final name and never writes one that is there: an unfinished one would cost its
    compilation at every start from then on. Only entries newer than the last look are read.
    """
    stamp = folder / ".checked"
    looked = stamp.stat().st_mtime if stamp.exists() else 0.0
    entries = [path for path in folder.glob("*-cache") if path.stat().st_mtime >= looked]
    damaged = [path for path in entries if not _is_whole(path)]
    for path in damaged:
        log.warning("removing the unfinished entry %s from the compile cache", path.name)
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        stamp.touch()
    return damaged


def _is_whole(path: Path) -> bool:
    """Whether a compressed entry ends where its format says (JAX uses Zstandard where it is installed, else zlib)."""
    content = path.read_bytes()
    try:
        if not content.startswith(b"\x28\xb5\x2f\xfd"):
            reader = zlib.decompressobj()
        else:
            import zstandard

            reader = zstandard.ZstdDecompressor().decompressobj()
        reader.decompress(content)
        return reader.eof
    except ImportError:
        return True
    except Exception:  # each library has its own errors for damaged data
        return False
