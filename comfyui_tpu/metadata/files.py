"""Files by name within one folder, and nothing outside of it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from comfyui_tpu.metadata.errors import MetadataError, shorten


def find_file(folder: Path, name: str, what: str = "the folder") -> Path:
    """The regular file ``name`` (may name subfolders) within ``folder``, with every symbolic link resolved.

    ``what``: the folder in words, for messages. Raises MetadataError for a missing file and any way out of the folder.
    """
    shown = shorten(name) if name.strip() else "nothing"
    if not name.strip() or "\0" in name:
        raise MetadataError(f"expected the name of a file in {what}, got {shown!r}")
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in _readings(name)):
        raise MetadataError(f"expected a file in {what}, got {shown!r}: neither absolute paths nor '..' are accepted")
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise MetadataError(f"{shown!r} is a link to a place outside of {what}, which is not followed")
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, bytes no path may hold
        if isinstance(error, MetadataError):
            raise
        raise MetadataError(f"{shown!r} cannot be looked up in {what}: {error}") from None
    if not found:
        raise MetadataError(f"there is no file {shown!r} in {what}")
    return path


def _readings(name: str) -> list[PurePosixPath | PureWindowsPath]:
    """``name`` as each system reads it: a backslash is no separator here, but it is where a workflow may run next."""
    return [PurePosixPath(name), PureWindowsPath(name)]
