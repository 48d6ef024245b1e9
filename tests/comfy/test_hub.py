"""Downloads from the Hugging Face Hub, against a small one on this machine; every failure says what to do."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from comfyui_tpu.comfy.hub import _progress_bar
from comfyui_tpu.comfy.resumable import DownloadFailed, _check_room
from comfyui_tpu.runtime.reporting import Reporter
from tests.comfy import fake_hub
from tests.comfy.fake_hub import SHA, FakeHub

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "image_encoder": [None, None],
}
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "transformer/config.json": b"{}",
    "transformer/model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
    "transformer/model-1.safetensors": b"1" * 1000,
    "transformer/model-2.safetensors": b"2" * 3_000_000,
    "tokenizer/spiece.model": b"sentencepiece",
    "tokenizer/vocab.txt": b"words",
    "tokenizer/chat_template.jinja": b"{{ messages }}",
    "README.md": b"readme",
    "flux2-dev.safetensors": b"the same weights once more, for other programs",
    "image_encoder/model.safetensors": b"a component that model_index.json does not list",
    "transformer/diffusion_pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"code",
}
SHARD = "transformer/model-2.safetensors"
LARGE = {**FILES, SHARD: b"2" * (30 * 2**20)}  # the Hub's client reads 10 MB at a time
UNNEEDED = {"flux2-dev.safetensors", "image_encoder/model.safetensors"}
ALLOWED = {name for name in FILES if not name.endswith((".md", ".bin", ".py"))} - UNNEEDED

# One download in a process of its own: huggingface_hub reads its environment when it is imported.
DRIVER = textwrap.dedent("""
    import json, sys, traceback
    from comfyui_tpu.comfy import hub
    from comfyui_tpu.runtime.reporting import Reporter, reporting

    class Cancelled(Exception):
        pass

    class Recorder(Reporter):
        said, cancel_at = [], None
        def message(self, text):
            self.said.append(text)
        def progress(self, stage, done, total):
            self.said.append(f"{stage} {done}/{total}")
            if self.cancel_at and self.cancel_at in self.said[-1]:
                raise Cancelled

    repo_id, revision, Recorder.cancel_at, timeout = json.loads(sys.argv[1])
    hub.TIMEOUT_S = timeout
    try:
        with reporting(Recorder()):
            result = {"folder": str(hub.download_checkpoint(repo_id, revision))}
    except Exception as error:
        traceback.print_exc()  # as ComfyUI does
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps({**result, "said": Recorder.said}))
""")


@pytest.fixture
def hub():
    with FakeHub(
        {"org/wan": FILES, "org/gated": FILES, "org/plain": {"model.safetensors": b""}}, ("org/gated",)
    ) as hub:
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    def run(repo_id, revision=None, cancel_at=None, timeout=10.0, **environment):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        }
        arguments = [sys.executable, "-c", DRIVER, json.dumps([repo_id, revision, cancel_at, timeout])]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        run.output = done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir()}


def test_it_downloads_safetensors_and_configs_but_no_pickles_and_no_code(download):
    result = download("org/wan")
    assert files_in(result["folder"]) == ALLOWED
    assert result["said"][0] == "looking up org/wan on the Hugging Face Hub"
    assert f"downloading org/wan, files {len(ALLOWED)}/{len(ALLOWED)}" in result["said"]
    assert any("model-2.safetensors (MiB) 2/2" in line for line in result["said"])


def test_a_complete_snapshot_is_used_without_asking_the_network(download, hub):
    folder = download("org/wan")["folder"]
    hub.requests.clear()
    assert download("org/wan") == {"folder": folder, "said": []}
    assert hub.requests == []
    assert download("org/wan", HF_HUB_OFFLINE="1")["folder"] == folder


def test_a_revision_is_honoured(download):
    assert download("org/wan", SHA)["folder"].endswith(SHA)
    missing = download("org/wan", "v9")
    assert missing["error"] == "ModelNotFound"
    assert "no such revision: org/wan@v9" in missing["message"]


# With a commit instead of a branch the Hub client itself cannot tell that a snapshot is incomplete.
@pytest.mark.parametrize("revision", [None, SHA])
def test_cancel_stops_between_and_inside_files_and_the_next_run_goes_on(download, hub, revision):
    between = download("org/wan", revision, cancel_at="files 2/")
    assert between["error"] == "Cancelled"
    inside = download("org/wan", revision, cancel_at="model-2.safetensors (MiB)")
    assert inside["error"] == "Cancelled"
    hub.requests.clear()
    assert files_in(download("org/wan", revision)["folder"]) == ALLOWED
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith("model_index.json")]


def test_a_file_goes_on_where_cancel_stopped_it_and_is_checked_in_the_end(download, hub, tmp_path):
    hub.repos["org/wan"] = LARGE
    assert download("org/wan", cancel_at="model-2.safetensors (MiB) 20/")["error"] == "Cancelled"
    (part,) = (tmp_path / "hf").rglob("*.part")
    have = part.stat().st_size
    assert 0 < have < len(LARGE[SHARD])
    folder = Path(download("org/wan")["folder"])
    assert any(line.endswith(f"model-2.safetensors bytes={have}-") for line in hub.ranges)
    assert (folder / SHARD).read_bytes() == LARGE[SHARD]
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.suffix in (".part", ".incomplete")]


def test_a_connection_that_breaks_is_taken_up_again(download, hub):
    hub.repos["org/wan"] = LARGE
    hub.cuts[SHARD] = 25 * 2**20
    folder = Path(download("org/wan")["folder"])
    assert (folder / SHARD).read_bytes() == LARGE[SHARD]
    assert len(hub.ranges) == 1


def test_what_arrived_in_pieces_of_different_contents_is_not_used(download, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_hub, "_etag", lambda body: hashlib.sha256(body).hexdigest())
    hub.repos["org/wan"] = LARGE
    download("org/wan", cancel_at="model-2.safetensors (MiB) 20/")
    (part,) = (tmp_path / "hf").rglob("*.part")
    with part.open("r+b") as file:
        file.write(b"damage")
    damaged = download("org/wan")
    assert damaged["error"] == "DownloadFailed"
    assert "transformer/model-2.safetensors of org/wan arrived damaged" in damaged["message"]
    folder = Path(download("org/wan")["folder"])
    assert (folder / SHARD).read_bytes() == LARGE[SHARD]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full, the file on a disk without room")
def test_a_full_disk_names_the_file_and_the_next_run_goes_on(download, hub, tmp_path):
    blobs = tmp_path / "hf" / "hub" / "models--org--wan" / "blobs"
    blobs.mkdir(parents=True)
    unfinished = blobs / f"{fake_hub._etag(FILES['transformer/model-2.safetensors'])}.part"
    unfinished.symlink_to("/dev/full")
    result = download("org/wan")
    assert result["error"] == "DownloadFailed"
    for part in ("disk is full", "transformer/model-2.safetensors of org/wan", str(blobs), "HF_HOME"):
        assert part in result["message"]
    unfinished.unlink()
    assert files_in(download("org/wan")["folder"]) == ALLOWED


def test_a_file_that_cannot_fit_is_refused_before_the_disk_is_full(tmp_path):
    with pytest.raises(DownloadFailed, match=r"too full for a\.safetensors of org/wan: it takes 8388608\.00 GiB more"):
        _check_room("a.safetensors of org/wan", tmp_path, 2**53)


TOKEN = "hf_thisIsASecretThatNobodyMaySee"  # noqa: S105


# With a character that no header may hold, the error quotes the header.
@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}ü"])
@pytest.mark.parametrize("repo_id", ["org/wan", "org/gated", "org/nothing"])
def test_the_token_is_sent_and_neither_printed_nor_stored(download, hub, tmp_path, token, repo_id):
    result = download(repo_id, HF_TOKEN=token, HF_DEBUG="0")
    if token == TOKEN:
        assert f"Bearer {TOKEN}" in hub.tokens
    else:
        assert result["error"] == "DownloadFailed"
    shown = json.dumps(result) + download.output
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in shown
    assert stored == []


def test_a_cancel_that_native_transfer_code_swallows_is_not_lost():
    class Cancelling(Reporter):
        def check_cancelled(self):
            raise KeyboardInterrupt

    bar_class = _progress_bar(Cancelling(), "downloading")
    with contextlib.suppress(KeyboardInterrupt):
        bar_class(total=10).update(5)
    with pytest.raises(KeyboardInterrupt):
        bar_class.raise_if_cancelled()


def test_an_interrupted_download_is_not_taken_for_a_checkpoint(download):
    folder = Path(download("org/wan")["folder"])
    (folder / "transformer" / "model-2.safetensors").unlink()
    assert files_in(download("org/wan")["folder"]) == ALLOWED
    (folder / "transformer" / "model-2.safetensors").unlink()
    offline = download("org/wan", HF_HUB_OFFLINE="1")
    assert offline["error"] == "ModelNotFound"
    assert "HF_HUB_OFFLINE" in offline["message"]


@pytest.mark.parametrize(
    ("repo_id", "environment", "error", "parts"),
    [
        (
            "org/nothing",
            {},
            "ModelNotFound",
            ["no repo org/nothing, or it is private", "Check the spelling", "HF_TOKEN"],
        ),
        (
            "org/gated",
            {},
            "ModelNotFound",
            ["org/gated", "gated", "Accept its terms at https://huggingface.co/org/gated"],
        ),
        ("org/plain", {}, "ModelNotFound", ["no model_index.json", "-Diffusers"]),
        ("org/wan", {"HF_HUB_OFFLINE": "1"}, "ModelNotFound", ["HF_HUB_OFFLINE forbids", "models/diffusers/NAME"]),
        ("org/wan", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "DownloadFailed", ["Check the network", "models/diffusers"]),
        ("-org/w..an", {}, "InvalidInput", ["'-org/w..an' is no valid Hugging Face repo id"]),
    ],
)
def test_every_failure_says_what_to_do(download, repo_id, environment, error, parts):
    started = time.monotonic()
    result = download(repo_id, **environment)
    assert result["error"] == error, result
    for part in parts:
        assert part in result["message"]
    assert time.monotonic() - started < 20


def test_a_network_that_swallows_everything_is_given_up_soon(download, hub):
    hub.silent = True
    started = time.monotonic()
    assert download("org/wan", timeout=1.0)["error"] == "DownloadFailed"
    assert time.monotonic() - started < 20
