"""Optional: are the weights the ones their publisher uploaded? ``COMFYUI_TPU_VERIFY=1`` hashes them before first use.

Headers and sizes are always checked (:mod:`~comfyui_tpu.runtime.checkpoint`); a flipped bit in the data is only found
by a hash of it, which takes about a second a gigabyte. What the hash should be is known from the Hugging Face cache
(files are named by it), from what ``hf download --local-dir`` keeps beside them, or from a file ``SHA256SUMS``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

from comfyui_tpu.runtime.errors import CheckpointError
from comfyui_tpu.runtime.reporting import current_reporter

log = logging.getLogger(__name__)

VERIFY_VARIABLE = "COMFYUI_TPU_VERIFY"
SUMS = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 16 << 20


def verify_if_asked(folder: Path) -> None:
    """With ``COMFYUI_TPU_VERIFY=1``: hash the weight files of a component folder. Cancel works within a file.

    Raises:
        CheckpointError: a file's SHA-256 is not what it should be.
    """
    if os.environ.get(VERIFY_VARIABLE, "") in ("", "0"):
        return
    files = sorted(folder.glob("*.safetensors"))
    for number, file in enumerate(files, start=1):
        expected = expected_sha256(file)
        if expected is None:
            log.warning("%s cannot be verified: nothing says what its SHA-256 should be", file)
            continue
        found = _sha256(file, f"verifying {folder.name} {number}/{len(files)} (MiB)")
        if found != expected:
            raise CheckpointError(
                f"{file} is damaged: expected SHA-256 {expected}; got {found}. Delete that file and download the "
                "checkpoint again."
            )


def expected_sha256(file: Path) -> str | None:
    """What the SHA-256 of a weight file should be, if anything on this disk says so."""
    return _of_blob(file) or _of_download(file) or _of_sums(file)


def _of_blob(file: Path) -> str | None:
    """In the Hub's cache a file is a link to one that is named by its hash."""
    name = file.resolve().name
    return name if file.is_symlink() and _SHA256.fullmatch(name) else None


def _of_download(file: Path) -> str | None:
    """``hf download --local-dir`` writes commit, hash and time to ``.cache/huggingface/download/PATH.metadata``."""
    for root in file.parents[:3]:
        metadata = root / ".cache/huggingface/download" / f"{file.relative_to(root)}.metadata"
        if metadata.is_file():
            lines = metadata.read_text(encoding="utf-8", errors="replace").split()
            return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None
    return None


def _of_sums(file: Path) -> str | None:
    """``sha256sum``'s own format, in the component's folder or the checkpoint's."""
    for root in file.parents[:2]:
        sums = root / SUMS
        if not sums.is_file():
            continue
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            found, _, name = line.strip().partition(" ")
            if _SHA256.fullmatch(found) and name.strip(" *").removeprefix("./") == str(file.relative_to(root)):
                return found
    return None


def _sha256(file: Path, stage: str) -> str:
    reporter, digest, done = current_reporter(), hashlib.sha256(), 0
    total = max(1, file.stat().st_size >> 20)
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            done += len(block)
            reporter.progress(stage, done >> 20, total)
            reporter.check_cancelled()
    return digest.hexdigest()
