"""Damaged and hostile files: always a clear error, never a crash, a hang or a file outside of the model folders."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from comfyui_tpu.models.cogvideox import CogVideoX
from comfyui_tpu.models.flux2 import Flux2
from comfyui_tpu.models.wan import WanTextToVideo
from comfyui_tpu.runtime.checkpoint import DTYPES, Checkpoint
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, ModelNotFound, TPUError
from tests.checkpoints import write
from tests.reliability.fuzzing import anything, damaged, fuzz, numbers, words


@contextlib.contextmanager
def refused_naming(place: Path) -> Iterator[list]:
    """Accepts success and our own errors if their message names ``place``; yields a list of what was refused."""
    refused: list[TPUError] = []
    try:
        yield refused
    except TPUError as error:
        refused.append(error)
    assert all(str(place) in str(error) for error in refused), refused


# --- safetensors ------------------------------------------------------------------------------------------------------

offsets = st.one_of(st.integers(0, 200), numbers)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(DTYPES)), words),
            "shape": st.one_of(st.lists(st.one_of(st.integers(0, 6), numbers), max_size=4), anything),
            "data_offsets": st.one_of(st.tuples(offsets, offsets).map(list), anything),
        }
    ),
    anything,
)
headers = st.one_of(st.dictionaries(words, entries, max_size=4), anything)


@st.composite
def good_files(draw) -> bytes:
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
    kinds = draw(st.lists(st.sampled_from(["float32", "float16", "int8"]), min_size=len(shapes), max_size=len(shapes)))
    return safetensors.numpy.save({f"t{i}": np.ones(s, k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))})


@st.composite
def bad_files(draw) -> bytes:
    """A header of anything with data of any length; or a good file, changed in places or cut."""
    if draw(st.booleans()):
        text = json.dumps(draw(headers)).encode()
        length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1), st.integers(0, 400)))
        return struct.pack("<Q", length) + text + bytes(draw(st.integers(0, 200)))
    content = bytearray(draw(good_files()))
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = draw(st.integers(0, 255))
    cut = draw(st.integers(-9, 9))
    return bytes(content[:cut] if cut < 0 else content + bytes(cut))


def check_against_the_reference(folder, content: bytes) -> None:
    """Refused, or the reference reads it too and finds the same tensors."""
    file = folder / "model.safetensors"
    file.write_bytes(content)
    with refused_naming(file) as refused:
        opened = Checkpoint.open(folder)
    if refused:
        return
    with safetensors.safe_open(file, "numpy") as reference:
        assert set(reference.keys()) == set(opened.tensors)
        for name, info in opened.tensors.items():
            assert tuple(reference.get_slice(name).get_shape()) == info.shape
            assert opened.read(name).tobytes() == content[info.offset : info.offset + info.nbytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz(400)
@given(content=bad_files())
def test_a_damaged_safetensors_file_is_refused_or_read_as_the_reference_reads_it(folder, content):
    check_against_the_reference(folder, content)


@fuzz(50)
@given(content=good_files())
def test_a_good_safetensors_file_is_read(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert Checkpoint.open(folder).tensors


@fuzz(200)
@given(index=st.one_of(anything, st.fixed_dictionaries({"weight_map": st.dictionaries(words, anything, max_size=4)})))
def test_a_hostile_index_is_refused(tmp_path_factory, index):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)
    shutil.rmtree(folder)


# --- settings ---------------------------------------------------------------------------------------------------------

FAMILIES = {"flux2-tiny": Flux2, "wan21-tiny": WanTextToVideo, "cogvideox15-tiny": CogVideoX}
SETTINGS = {
    "model_index": "model_index.json",
    "text_encoder": "text_encoder/config.json",
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    for name in FAMILIES:
        write(name, folder / name)
    return folder


def use(family, folder) -> None:
    """All that is done with settings before a weight is read."""
    model = family.open(folder)
    for component in model.components:
        assert component.bytes_per_device > 0
        _ = component.config
    model._pipeline()


@pytest.mark.parametrize("file", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_damaged_settings_are_a_clear_error(models, name, file):
    path = models / name / SETTINGS[file]
    original = path.read_text()

    @fuzz(15)
    @given(content=damaged(json.loads(original)))
    def property(content):
        path.write_text(json.dumps(content))
        with refused_naming(models / name):
            use(FAMILIES[name], models / name)

    try:
        property()
    finally:
        path.write_text(original)
    use(FAMILIES[name], models / name)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '"x"', "\ufeff{}", '{"a": ' * 100_000, "9" * 100_000, "\0\0"])
def test_settings_that_are_no_json_object_are_a_clear_error(models, text):
    path = models / "wan21-tiny" / "transformer" / "config.json"
    original = path.read_text()
    try:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            WanTextToVideo.open(models / "wan21-tiny")
    finally:
        path.write_text(original)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_damaged_tokenizer_is_a_clear_error(models, name):
    path = models / name / "tokenizer" / "tokenizer.json"
    original = path.read_text()
    found = json.loads(original)

    @fuzz(12)
    @given(content=damaged({key: value for key, value in found.items() if key != "model"}))
    def property(content):
        path.write_text(json.dumps({**content, "model": found["model"]}))
        model = FAMILIES[name](models / name)  # not `open`, which would remember the tokenizer
        with refused_naming(models / name / "tokenizer"):
            _ = model._processor if name == "flux2-tiny" else model._tokenizer

    try:
        property()
    finally:
        path.write_text(original)


# --- names ------------------------------------------------------------------------------------------------------------

segments = st.one_of(
    words, st.sampled_from(["..", ".", "~", "models", "wan", "org", "name@main", "a b", "\u202e", "CON"])
)
names = st.one_of(words, st.lists(segments, min_size=1, max_size=5).map("/".join), anything)


@fuzz(500)
@given(name=names)
def test_no_model_id_leads_out_of_the_model_folders(tmp_path_factory, name):
    from comfyui_tpu.comfy.model_lookup import find_local

    root = tmp_path_factory.getbasetemp() / "lookup"
    folder = root / "models" / "diffusers"
    for inside in (folder / "wan", folder / "org" / "name", root / "secret"):
        inside.mkdir(parents=True, exist_ok=True)
        (inside / "model_index.json").write_text("{}")
    try:
        found = find_local(name, [folder])
    except (InvalidInput, ModelNotFound, CheckpointError):
        return
    assert found is None or found.resolve().is_relative_to(folder.resolve())
