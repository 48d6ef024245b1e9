"""``model_id`` → a checkpoint folder in Diffusers layout: from ComfyUI's own folders, or from the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, ModelNotFound

ACCEPTED = (
    'Accepted are the name of a folder in ComfyUI/models/diffusers (for example "wan21-tiny") or a Hugging Face '
    'repo id (for example "Wan-AI/Wan2.1-T2V-14B-Diffusers"), optionally followed by @revision.'
)

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


def check_model_id(model_id: str) -> None:
    """Raise if ``model_id`` can never work, or names no local folder where it could only mean one. Uses no network."""
    find_local(model_id, diffusers_folders())


def find_checkpoint(model_id: str) -> Path:
    """The checkpoint's folder; downloads it from the Hub if it is not on this machine. Cancel works in between."""
    local = find_local(model_id, diffusers_folders())
    if local is not None:
        return local
    from comfyui_tpu.comfy.hub import download_checkpoint

    repo_id, _, revision = model_id.strip().partition("@")
    return download_checkpoint(repo_id, revision or None)


def diffusers_folders() -> list[Path]:
    """All folders in which ComfyUI looks for Diffusers checkpoints (extra_model_paths.yaml may add some)."""
    import folder_paths

    return [Path(folder) for folder in folder_paths.get_folder_paths("diffusers")]


def find_local(model_id: str, folders: Sequence[Path]) -> Path | None:
    """The local checkpoint ``model_id`` names. ``None``: it is a repo id, to be looked up on the Hub.

    A local folder wins over a repo of the same name, so an ``org/name`` subfolder works offline.
    """
    name = _checked_syntax(model_id)
    for folder in folders:
        candidate = folder / name
        if candidate.is_dir():
            return _checked_checkpoint(candidate)
    if _is_repo_id(name):
        return None
    found = ", ".join(_available(folders)) or "none"
    looked_in = ", ".join(map(str, folders))
    raise ModelNotFound(f"No model folder '{name}' in {looked_in}. Folders there: {found}. {ACCEPTED}")


def _checked_syntax(model_id: str) -> str:
    """``model_id`` without surrounding blanks, or an error: it must not be able to leave the model folders."""
    if not isinstance(model_id, str) or not model_id.strip():
        raise InvalidInput(f"model_id must be a name, but {model_id!r} came. {ACCEPTED}")
    name = model_id.strip()
    parts = name.split("/")
    # Windows drives and NTFS streams ("C:x") are refused everywhere: a workflow travels between systems.
    forbidden = len(name) > 255 or not name.isprintable() or "\\" in name or ":" in name or name.startswith("~")
    if forbidden or any(part in ("", ".", "..") for part in parts) or (len(parts) > 1 and not _is_repo_id(name)):
        raise InvalidInput(f"model_id {model_id!r} is not accepted. {ACCEPTED}")
    return name


def _is_repo_id(name: str) -> bool:
    repo_id, at, revision = name.partition("@")
    is_revision = _REVISION.fullmatch(revision) is not None and ".." not in revision
    return _REPO_ID.fullmatch(repo_id) is not None and (is_revision or not at)


def _checked_checkpoint(candidate: Path) -> Path:
    # A link may lead anywhere: whoever owns the model folder put it there, to keep models on a larger disk. What must
    # not leave the folders is the name, which comes with somebody else's workflow.
    if not (candidate / "model_index.json").is_file():
        raise CheckpointError(
            f"{candidate} has no model_index.json, so it is no checkpoint in Diffusers layout "
            "(model_index.json beside transformer/, text_encoder/, tokenizer/, vae/, scheduler/). "
            "Copy or download the whole repository into it, or remove the folder."
        )
    return candidate


def _available(folders: Sequence[Path]) -> list[str]:
    """Names under which checkpoints in ``folders`` can be used: ``name`` or ``org/name``."""
    found = set()
    for folder in folders:
        for pattern in ("*/model_index.json", "*/*/model_index.json"):
            found.update(path.parent.relative_to(folder).as_posix() for path in folder.glob(pattern))
    return sorted(found)
