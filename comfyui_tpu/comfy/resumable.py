"""One file of a Hub repo into the Hub's cache, going on where an earlier attempt stopped.

``hf_hub_download`` throws an unfinished file away: after a Cancel at 9 of 10 GB it begins again. Here the unfinished
file stays beside the finished ones (``blobs/ETAG.part``) until it is whole; then it is renamed, and ``hf_hub_download``
finds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from comfyui_tpu.runtime.errors import TPUError

UNFINISHED = ".part"
_BLOCK = 8 << 20


class DownloadFailed(TPUError):
    """The Hub could not be reached, or the download broke off. What has arrived is kept."""


def fetch(repo_id: str, path: str, commit: str, timeout: float, tqdm_class: type) -> None:
    """Make sure that the Hub's cache holds the content of ``path`` in ``repo_id`` at ``commit``.

    Raises:
        DownloadFailed: no room on the disk, or what arrived is not what the Hub announced.
        What huggingface_hub raises for its own errors, and what ``tqdm_class`` raises to stop.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if isinstance(try_to_load_from_cache(repo_id, path, revision=commit), str):
        return
    url = hf_hub_url(repo_id, path, revision=commit)
    known = get_hf_file_metadata(url, timeout=timeout)
    blob = _blob(repo_id, known.etag)
    if blob is None or blob.exists():
        return  # without an ETag, hf_hub_download has to do it
    name = f"{path} of {repo_id}"
    with _unfinished(blob) as out:
        if out is None:
            return  # another process is downloading it; hf_hub_download waits for nobody and works all the same
        have = out.tell()
        _check_room(name, blob.parent, (known.size or 0) - have)
        with _explained(name, blob.parent):
            http_get(
                url, out, resume_size=have, headers=build_hf_headers(), expected_size=known.size, tqdm_class=tqdm_class
            )
            out.flush()
            os.fsync(out.fileno())
        if have:
            _check_content(name, Path(out.name), blob.name)
        os.replace(out.name, blob)


def _blob(repo_id: str, etag: str | None) -> Path | None:
    """Where the Hub's cache keeps the content with this ETag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not etag or not etag.isalnum():  # the name of a file is made of it
        return None
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs" / etag


@contextlib.contextmanager
def _unfinished(blob: Path) -> Iterator[BinaryIO | None]:
    """The unfinished file, open at its end; None if another process has it."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    with blob.with_name(blob.name + UNFINISHED).open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield out


def _check_room(name: str, folder: Path, needed: int) -> None:
    """DownloadFailed before the disk is filled in vain."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadFailed(
            f"The disk is too full for {name}: it takes {needed / 2**30:.2f} GiB more, but {folder} has "
            f"{free / 2**30:.2f} GiB free. Free space, or set HF_HOME to a folder on a larger disk, and queue again: "
            "what has arrived is kept."
        )


@contextlib.contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadFailed(
                f"The disk is full: {name} could not be written to {folder}. Free space, or set HF_HOME to a folder "
                "on a larger disk, and queue again: what has arrived is kept."
            ) from error
        if error.errno is None and "Consistency check" in str(error):
            raise DownloadFailed(f"{name} arrived truncated. Queue again: the download goes on from there.") from error
        raise


def _check_content(name: str, file: Path, etag: str) -> None:
    """Of a file that arrived in several pieces: what the Hub knows the hash of must have it (large files)."""
    if len(etag) != 64:
        return
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != etag:
        file.unlink()
        raise DownloadFailed(f"{name} arrived damaged (its SHA-256 is wrong). Queue again: it is downloaded anew.")
