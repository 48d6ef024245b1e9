"""A checkpoint is checked before it is trusted, read exactly, and every fault is named with what to do about it."""

import json
import os
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_tpu.runtime.checkpoint import MAX_HEADER_BYTES, Checkpoint, read_config
from comfyui_tpu.runtime.errors import CheckpointError
from tests.checkpoints.raw import DTYPE_NAMES, entry, header_of, write_file, write_index, write_raw, write_sharded

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts the bytes that positioned reads returned since the checkpoint was opened."""
    counts = []
    preadv = os.preadv

    def counting(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


# What is accepted.


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_single_file_is_read_as_safetensors_reads_it(tmp_path, stem):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(2, 3, 4).bfloat16(),
        "c": torch.tensor(7),
        "d": torch.ones(0, 4),
    }
    save_file(tensors, tmp_path / f"{stem}.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in load_file(tmp_path / f"{stem}.safetensors").items():
        assert checkpoint.read(name).shape == tuple(expected.shape)
        assert np.array_equal(checkpoint.read(name).astype(np.float32), expected.float().numpy())


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=lambda dtype: dtype.name)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    array = RNG.integers(0, 2, (4, 6)).astype(dtype)
    write_file(tmp_path / "model.safetensors", {"odd": np.ones(3, np.uint8), "x": array})  # data at an odd offset
    got = Checkpoint.open(tmp_path).read("x")
    assert got.dtype == dtype
    assert got.tobytes() == array.tobytes()


def test_shards_are_found_through_the_index(tmp_path):
    tensors = {f"layer.{i}": floats(3, i + 1) for i in range(7)}
    write_sharded(tmp_path, tensors, shards=3, stem="diffusion_pytorch_model")
    checkpoint = Checkpoint.open(tmp_path)
    assert len({info.file for info in checkpoint.tensors.values()}) == 3
    assert all(np.array_equal(checkpoint.read(name), array) for name, array in tensors.items())


def test_numbered_shards_without_an_index_are_accepted_when_all_are_there(tmp_path):
    write_sharded(tmp_path, {"a": floats(2), "b": floats(3)}, shards=2).unlink()
    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b"}
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert "shards 1 to 2" in refusal(tmp_path)


def test_a_variant_beside_the_standard_file_is_not_read(tmp_path):
    write_file(tmp_path / "model.safetensors", {"standard": floats(1)})
    write_file(tmp_path / "model.fp16.safetensors", {"variant": floats(1)})
    assert set(Checkpoint.open(tmp_path).tensors) == {"standard"}


def test_an_index_decides_what_belongs_to_the_checkpoint(tmp_path):
    write_file(tmp_path / "model-00001-of-00001.safetensors", {"named": floats(1), "forgotten": floats(1)})
    write_index(tmp_path, {"named": "model-00001-of-00001.safetensors"})
    assert set(Checkpoint.open(tmp_path).tensors) == {"named"}


def test_links_as_in_the_hub_cache_are_followed_and_broken_ones_are_missing(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_sharded(tmp_path / "blobs", {"a": floats(2), "b": floats(3)}, shards=2)
    for blob in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / blob.name).symlink_to(f"../blobs/{blob.name}")
    assert set(Checkpoint.open(tmp_path / "snapshot").tensors) == {"a", "b"}
    (tmp_path / "blobs" / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is not in the folder" in refusal(tmp_path / "snapshot")


# Reading.


def test_only_the_asked_rows_leave_the_disk(tmp_path, bytes_read):
    array = floats(100, 7)
    write_file(tmp_path / "model.safetensors", {"before": floats(9), "x": array})
    checkpoint = Checkpoint.open(tmp_path)
    bytes_read.clear()
    assert np.array_equal(checkpoint.read("x", rows=slice(10, 25)), array[10:25])
    assert sum(bytes_read) == 15 * 7 * 4


def test_opening_reads_headers_only(tmp_path, bytes_read):
    path = write_file(tmp_path / "model.safetensors", {"x": floats(1000, 1000)})
    Checkpoint.open(tmp_path)
    assert sum(bytes_read) == path.stat().st_size - 4_000_000


def test_out_receives_the_data_and_must_fit(tmp_path):
    array = floats(6, 4)
    write_file(tmp_path / "model.safetensors", {"x": array})
    checkpoint = Checkpoint.open(tmp_path)
    out = np.zeros((10, 4), np.float32)
    checkpoint.read("x", rows=slice(1, 4), out=out[2:5])
    assert np.array_equal(out[2:5], array[1:4])
    assert not out[:2].any()
    assert not out[5:].any()
    for wrong in (np.zeros((3, 5), np.float32), np.zeros((3, 4), np.float16), np.zeros((4, 3), np.float32).T):
        with pytest.raises(ValueError, match="expected out to be C-contiguous float32"):
            checkpoint.read("x", rows=slice(1, 4), out=wrong)


def test_rows_that_make_no_sense_are_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", {"x": floats(6), "scalar": np.float32(1).reshape(())})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ValueError, match="step 1"):
        checkpoint.read("x", rows=slice(0, 6, 2))
    with pytest.raises(ValueError, match="scalar"):
        checkpoint.read("scalar", rows=slice(0, 1))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    array = floats(50)
    write_file(tmp_path / "model.safetensors", {"x": array})
    checkpoint = Checkpoint.open(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    assert np.array_equal(checkpoint.read("x"), array)


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    path = write_file(tmp_path / "model.safetensors", {"x": floats(100)})
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ended .* expected 10 bytes more"):
        checkpoint.read("x")


def test_an_unknown_tensor_is_named(tmp_path):
    write_file(tmp_path / "model.safetensors", {"x": floats(1)})
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        Checkpoint.open(tmp_path).read("y")


def test_threads_read_at_the_same_time(tmp_path):
    tensors = {f"t{i}": floats(200, 50) for i in range(16)}
    write_sharded(tmp_path, tensors, shards=2)
    checkpoint, right = Checkpoint.open(tmp_path), []
    check = lambda name: right.extend(np.array_equal(checkpoint.read(name), tensors[name]) for _ in range(20))  # noqa: E731
    threads = [threading.Thread(target=check, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 320


def test_files_are_closed_with_the_checkpoint(tmp_path):
    write_sharded(tmp_path, {"a": floats(2), "b": floats(3)}, shards=2)
    before = set(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    del checkpoint
    assert not set(os.listdir("/proc/self/fd")) - before


# What is refused: incomplete downloads.


def test_a_missing_folder_is_named(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_an_empty_folder_says_what_was_expected(tmp_path):
    message = refusal(tmp_path)
    assert "diffusion_pytorch_model.safetensors or model.safetensors" in message
    assert "Download it again" in message


def test_pickle_files_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "never loaded" in message
    assert not (tmp_path / "executed").exists()


def test_variant_files_alone_are_named(tmp_path):
    write_file(tmp_path / "model.fp16.safetensors", {"x": floats(1)})
    assert "got only model.fp16.safetensors" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path, {"a": floats(2), "b": floats(3), "c": floats(4)}, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is not in the folder" in refusal(tmp_path)


@pytest.mark.parametrize("lost", [1, 39, 40])
def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path, lost):
    path = write_file(tmp_path / "model.safetensors", {"x": floats(10)})
    size = path.stat().st_size
    os.truncate(path, size - lost)
    assert f"truncated: expected {size} bytes, got {size - lost}" in refusal(tmp_path)


def test_a_file_that_is_too_long_is_refused(tmp_path):
    path = write_file(tmp_path / "model.safetensors", {"x": floats(10)})
    with path.open("ab") as file:
        file.write(b"more")
    assert "longer than it should be" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"<!DOCTYPE html><html>404 Not Found</html>"])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: expected a" in refusal(tmp_path)


# What is refused: indexes that lie.


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "model.bin", "..", 5]
)
def test_an_index_must_name_files_beside_it(tmp_path, shard):
    (tmp_path / "part").mkdir()
    write_file(tmp_path / "secret.safetensors", {"x": floats(1)})
    write_index(tmp_path / "part", {"x": shard})
    message = refusal(tmp_path / "part")
    assert repr(shard) in message
    assert "must not point elsewhere" in message


def test_a_tensor_in_the_index_but_not_in_its_shard_is_named(tmp_path):
    write_file(tmp_path / "model-00001-of-00001.safetensors", {"a": floats(1)})
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"})
    assert "holds 'b', but it does not" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: expected" in refusal(tmp_path)


def test_a_tensor_in_two_shards_without_an_index_is_refused(tmp_path):
    for number in (1, 2):
        write_file(tmp_path / f"model-0000{number}-of-00002.safetensors", {"a": floats(1)})
    assert "a are in model-00001-of-00002.safetensors too" in refusal(tmp_path)


# What is refused: headers that lie.


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1, 300])
def test_an_absurd_header_length_is_refused_without_taking_memory(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", header_of({"x": floats(2)}), b"\0" * 8, header_length=length)
    assert f"it claims {length}" in refusal(tmp_path)


HEADERS = {
    "overlapping": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "overlaps the one before it"),
    "the same bytes twice": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, "overlaps"),
    "gap": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, "leaves a gap before it"),
    "beyond the end": ({"a": entry("F32", [5], 0, 20)}, "truncated: expected"),
    "too few bytes for the shape": ({"a": entry("F32", [4], 0, 12)}, "expected 16 bytes for F32[4]; got 12 bytes"),
    "backwards": ({"a": entry("F32", [3], 12, 0)}, "got -12 bytes"),
    "negative": ({"a": entry("F32", [3], -12, 0)}, "expected whole numbers"),
    "huge shape": ({"a": entry("F32", [2**40, 2**40], 0, 12)}, "got 12 bytes"),
    "fraction": ({"a": entry("F32", [1.5], 0, 6)}, "expected whole numbers"),
    "true as a number": ({"a": entry("F32", [True], 0, 4)}, "expected whole numbers"),
    "unknown dtype": ({"a": entry("F4", [3], 0, 12)}, "'F4'"),
    "dtype of another kind": ({"a": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}}, "dtypes"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [3]}}, "two data_offsets"),
    "no entry": ({"a": 5}, "two data_offsets"),
    "not an object": (b"[1, 2]", "expected a JSON object"),
    "not JSON": (b"{'a': 1}", "expected JSON"),
    "not text": (b"\xff\xfe{}", "expected JSON"),
    "a name twice": (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "a": 1}', "'a' is there twice"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused(tmp_path, case):
    header, expected = HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 12)
    message = refusal(tmp_path)
    assert expected in message
    assert "model.safetensors" in message
    assert "download the checkpoint again" in message


def test_metadata_is_no_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, **header_of({"x": floats(3)})}
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 12)
    assert set(Checkpoint.open(tmp_path).tensors) == {"x"}


# config.json


def test_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "num_layers": 4}))
    assert read_config(tmp_path) == {"_class_name": "WanTransformer3DModel", "num_layers": 4}


@pytest.mark.parametrize("text", ["", "[1]", "{'a': 1}"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json; got no such file"):
        read_config(tmp_path)


def test_bfloat16_is_what_torch_calls_bfloat16(tmp_path):
    tensor = torch.randn(64, 3).bfloat16()
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    got = Checkpoint.open(tmp_path).read("x")
    assert got.dtype == ml_dtypes.bfloat16
    assert np.array_equal(got.astype(np.float32), tensor.float().numpy())
