"""Downloads a Diffusers checkpoint from the Hugging Face Hub: safetensors only, with progress, Cancel and clear errors.

``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured because ``huggingface_hub`` reads them.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path

from comfyui_tpu.comfy.resumable import DownloadFailed, fetch
from comfyui_tpu.runtime.errors import InvalidInput, ModelNotFound, TPUError
from comfyui_tpu.runtime.reporting import Reporter, current_reporter

# Weights as safetensors, configs, and what tokenizers need. No pickles (.bin, .pt) and no code (.py): they can execute.
# Chat templates (.jinja) can not: transformers renders them in a sandbox.
ALLOWED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

# The Hub client waits for ever by default; a user without network wants an answer now.
TIMEOUT_S = 10.0

_COPY_HINT = "copy the checkpoint into a folder ComfyUI/models/diffusers/NAME and use NAME as model_id"
_TOKEN_HINT = "create a token at https://huggingface.co/settings/tokens, set it as HF_TOKEN and restart ComfyUI"  # noqa: S105


def download_checkpoint(repo_id: str, revision: str | None) -> Path:
    """The folder of the repo's snapshot in the Hub cache, complete. Asks the network only if files are missing."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    reporter = current_reporter()
    cached = _cached_snapshot(repo_id, revision)
    if cached is not None:
        return cached
    reporter.message(f"looking up {repo_id} on the Hugging Face Hub")
    with _explained_errors(repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        found = [file.rfilename for file in info.siblings or ()]
        if "model_index.json" not in found:
            raise ModelNotFound(
                f"The repo {repo_id} on the Hugging Face Hub is not in Diffusers layout: it has no model_index.json. "
                "Use its Diffusers edition (the name often ends in -Diffusers)."
            )
        index = hf_hub_download(repo_id, "model_index.json", revision=info.sha, etag_timeout=TIMEOUT_S)
        files = [path for path in found if _is_needed(path, _components(Path(index)))]
        # File by file instead of one snapshot_download: the only way to stop between files and inside them.
        for number, path in enumerate(files, start=1):
            progress_bar = _progress_bar(reporter, f"downloading {number}/{len(files)} {path}")
            fetch(repo_id, path, info.sha, TIMEOUT_S, progress_bar)
            progress_bar.raise_if_cancelled()
            hf_hub_download(repo_id, path, revision=info.sha, etag_timeout=TIMEOUT_S, tqdm_class=progress_bar)
            progress_bar.raise_if_cancelled()
            reporter.progress(f"downloading {repo_id}, files", number, len(files))
        # All files are there: this only writes down which commit the revision stands for.
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, etag_timeout=TIMEOUT_S))


def _is_needed(path: str, components: list[str]) -> bool:
    """Whether a file belongs to the Diffusers checkpoint.

    Repos often hold the same weights once more for other programs, at the top (FLUX.2-dev: 64 GB of them).
    """
    folder, _, name = path.rpartition("/")
    allowed = any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED_FILES)
    return path == "model_index.json" or (allowed and folder in components)


def _components(model_index: Path) -> list[str]:
    """Names (and folders) of the components that a ``model_index.json`` lists."""
    index = json.loads(model_index.read_text(encoding="utf-8"))
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot in the Hub cache, if all of it is there. No network: nodes of one workflow see one revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # One file that every checkpoint has names the folder; whether the others are there is ours to check.
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=["model_index.json"], local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InvalidInput(f"model_id {repo_id!r} is no valid Hugging Face repo id: {error}") from error
    return Path(folder) if _is_complete(Path(folder)) else None


def _is_complete(folder: Path) -> bool:
    """Whether an earlier download was not interrupted: every component is there, and every shard an index names."""
    try:
        model_index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        for name in _components(folder / "model_index.json"):
            files = {file.name for file in (folder / name).glob("*")}
            for index in (folder / name).glob("*.safetensors.index.json"):
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not files.issuperset(weight_map.values()):
                    return False
            has_weights = any(file.endswith(".safetensors") for file in files)
            is_plain = any(word in model_index[name][1] for word in ("Tokenizer", "Scheduler", "Processor"))
            if not files or not (has_weights or is_plain):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # also: JSON of another shape
        return False
    return True


def _progress_bar(reporter: Reporter, text: str) -> type:
    """A tqdm class for ``hf_hub_download`` that reports to the node and stops the download on Cancel."""
    from tqdm import tqdm

    class ReportingBar(tqdm):
        cancelled: BaseException | None = None

        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)  # the Hub's own bars take it, plain tqdm does not
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            try:
                reporter.check_cancelled()
                if self.total:
                    reporter.progress(f"{text} (MiB)", int(self.n / 2**20), max(1, int(self.total / 2**20)))
            except BaseException as error:
                # Native transfer code calls this too and may swallow it; core forgets a Cancel once it was raised.
                ReportingBar.cancelled = error
                raise

        @classmethod
        def raise_if_cancelled(cls) -> None:
            if cls.cancelled is not None:
                raise cls.cancelled

    return ReportingBar


@contextlib.contextmanager
def _explained_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub client's errors into ones that say what to do; others (Cancel) pass through."""
    try:
        yield
    except TPUError:
        raise
    except Exception as error:
        explained = _explain(error, repo_id, repo_id if revision is None else f"{repo_id}@{revision}")
        if _tells_token(error):
            # Logs and pages show the message and the errors behind it: neither may hold the token.
            raise (_bad_token(error) if explained is None else _without_token(explained)) from None
        if explained is None:
            raise
        raise explained from error


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:  # no token is no reason to hide the error that is being explained
        return None


def _tells_token(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, quotes the token (an HTTP library does that with a header it refuses)."""
    token = _token()
    while token and error is not None:
        if token in str(error) or token in repr(error.args):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_token(error: TPUError) -> TPUError:
    return type(error)(str(error).replace(_token() or "\0", "<HF_TOKEN>"))


def _bad_token(error: Exception) -> TPUError:
    found = f"{type(error).__name__}: {error}"
    return _without_token(DownloadFailed(f"The Hugging Face token cannot be used ({found}). Check HF_TOKEN."))


def _explain(error: Exception, repo_id: str, name: str) -> TPUError | None:
    from huggingface_hub import errors

    url = f"https://huggingface.co/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"The repo {name} on the Hugging Face Hub is gated. Accept its terms at {url} while logged in, "
            f"then {_TOKEN_HINT}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"The repo {repo_id} has no such revision: {name}. See {url}/tree/main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"The Hugging Face Hub has no repo {name}, or it is private. Check the spelling at {url}; "
            f"for a private repo {_TOKEN_HINT}."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelNotFound(
            f"{name} is not completely in this machine's Hugging Face cache, and HF_HUB_OFFLINE forbids to "
            f"download it. Unset HF_HUB_OFFLINE and restart ComfyUI, or {_COPY_HINT}."
        )
    if isinstance(error, errors.HFValidationError):
        return InvalidInput(f"model_id {name!r} is no valid Hugging Face repo id: {error}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return DownloadFailed(
            f"The disk is full: {name} could not be downloaded{where}. Free space, or set HF_HOME to a folder on a "
            "larger disk, and queue again: what has arrived is kept."
        )
    if _is_network_error(error):
        return DownloadFailed(
            f"{name} could not be downloaded from the Hugging Face Hub ({type(error).__name__}: {error}). "
            "Check the network (or set HF_ENDPOINT to a mirror) and queue again: what has arrived is kept. "
            f"Without network, {_COPY_HINT}."
        )
    return None


def _is_network_error(error: BaseException) -> bool:
    """The Hub client's HTTP library has changed twice (requests, httpx, httpx2): recognise its errors by their home."""
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(homes & {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests"}) or isinstance(
        error, (ConnectionError, TimeoutError)
    )
