"""The optional hash check: finds a flipped bit, knows where the right hash stands, can be cancelled."""

import hashlib

import pytest

from comfyui_tpu.runtime.errors import CheckpointError
from comfyui_tpu.runtime.integrity import VERIFY_VARIABLE, expected_sha256, verify_if_asked
from comfyui_tpu.runtime.reporting import Reporter, reporting

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(VERIFY_VARIABLE, "1")
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(CONTENT)
    return path


def in_hub_cache(file):
    blob = file.parents[2] / "blobs" / SHA256
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)


def as_local_dir(file):
    metadata = file.parents[1] / f".cache/huggingface/download/transformer/{file.name}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"commit\n{SHA256}\n1700000000.0\n")


def sums_of_component(file):
    (file.parent / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{SHA256}  {file.name}\n")


def sums_of_checkpoint(file):
    (file.parents[1] / "SHA256SUMS").write_text(f"{SHA256} *./transformer/{file.name}\n")


PLACES = [in_hub_cache, as_local_dir, sums_of_component, sums_of_checkpoint]


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_found_wherever_the_hash_stands(file, place):
    place(file)
    assert expected_sha256(file) == SHA256
    verify_if_asked(file.parent)
    damaged = bytearray(CONTENT)
    damaged[777] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: expected SHA-256 {SHA256}"):
        verify_if_asked(file.parent)


def test_nothing_is_read_unless_asked(file, monkeypatch):
    sums_of_component(file)
    file.write_bytes(b"damaged")
    for value in ("", "0"):
        monkeypatch.setenv(VERIFY_VARIABLE, value)
        verify_if_asked(file.parent)


def test_what_has_no_hash_is_said_and_used(file, caplog):
    verify_if_asked(file.parent)
    assert "cannot be verified" in caplog.text


def test_cancel_is_noticed(file):
    class Cancelling(Reporter):
        def check_cancelled(self):
            raise KeyboardInterrupt

    sums_of_component(file)
    with reporting(Cancelling()), pytest.raises(KeyboardInterrupt):
        verify_if_asked(file.parent)
