"""Whatever is connected to Show Any becomes readable text of bounded length."""

from __future__ import annotations

import enum
import json
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from comfyui_tpu.comfy import summaries
from comfyui_tpu.metadata.reading import Metadata
from comfyui_tpu.metadata.summary import MAX_ITEMS, MAX_TEXT, show, summary


def shown(value: object) -> object:
    return json.loads(summaries.show(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [("a\nb", "a\nb"), (1, "1"), (True, "true"), (None, "null"), (0.5, "0.5"), (float("nan"), '"NaN"'), ("", "")],
)
def test_simple_values_are_shown_as_they_are(value, text):
    assert show(value) == text


def test_plain_data_is_shown_as_json():
    value = {"a": [1, (2,)], 3: {"x"}, ("k",): float("-inf"), "路": b"12"}
    assert summary(value) == {"a": [1, [2]], "3": ["x"], "<builtins.tuple>": "-Infinity", "路": "<2 bytes>"}


def test_tensors_are_told_by_type_shape_and_range():
    assert shown(torch.arange(100.0).reshape(4, 25)) == {
        "tensor": "torch.float32", "shape": [4, 25], "device": "cpu", "min": 0, "max": 99, "mean": 49.5
    }  # fmt: skip
    assert shown(torch.tensor([1, 3]))["values"] == [1, 3]
    assert shown(torch.tensor([True, False])) | {"device": ""} == {
        "tensor": "torch.bool", "shape": [2], "device": "", "true": 1, "of": 2
    }  # fmt: skip
    bad = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.bfloat16)
    assert (shown(bad)["not finite"], shown(bad)["max"]) == (2, 1)
    assert "min" not in shown(torch.full((3,), float("nan")))
    assert "min" not in shown(torch.zeros(0, 3))
    assert "min" not in shown(torch.zeros(3, device="meta"))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int64", "bool"])
def test_numpy_arrays_are_told_like_tensors(dtype):
    assert shown(np.ones((2, 30), dtype))["shape"] == [2, 30]
    assert shown(np.ones((2, 30), dtype)).get("max", 1) == 1


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array([object()]),
        np.ones(2, np.uint16),
        np.float32(2),
        np.ones(2, ">f4"),
        np.zeros(2, "M8[s]"),
    ],
)
def test_arrays_of_anything_are_shown(value):
    assert shown(value)["shape"] == list(value.shape)


def test_arrays_on_a_device_are_not_fetched():
    import jax.numpy as jnp

    assert shown(jnp.ones((2, 3))) == {
        "array": "jax.float32",
        "shape": [2, 3],
        "sharding": shown(jnp.ones(1))["sharding"],
    }


def test_latents_and_conditioning_are_shown_with_their_tensors():
    latent, conditioning = {"samples": torch.zeros(1, 4, 8, 8)}, [[torch.ones(1, 77, 4), {"pooled_output": None}]]
    assert shown(latent)["samples"]["shape"] == [1, 4, 8, 8]
    assert shown(conditioning)[0][0]["mean"] == 1
    assert shown(conditioning)[0][1] == {"pooled_output": None}


class Colour(enum.Enum):
    RED = 1


@dataclass
class Settings:
    steps: int
    colour: Colour


class Model:
    def __init__(self):
        self.name, self.inner, self._secret = "m", Settings(4, Colour.RED), "hidden"
        self.itself = self

    @property
    def costly(self):
        raise AssertionError("looked at")

    def __repr__(self):
        raise AssertionError("looked at")

    __str__ = __repr__


def test_objects_are_told_by_what_they_store_and_none_of_their_code_runs():
    found = shown(Model())
    assert found["object"].endswith(".Model")
    assert (found["name"], found["inner"]["steps"], found["inner"]["colour"]) == ("m", 4, "Colour.RED")
    assert "_secret" not in found
    assert found["itself"].startswith("<cycle: ")
    assert shown(torch.nn.Linear(2, 2)) == {"object": "torch.nn.modules.linear.Linear"}
    assert shown(Metadata({"filename": "a"}))["fileinfo"] == {"filename": "a"}


def test_cycles_end():
    value = {"a": []}
    value["a"].append(value)
    assert summary(value) == {"a": ["<cycle: builtins.dict>"]}
    shared = [1]
    assert summary([shared, shared]) == [[1], [1]]


def test_huge_values_are_cut_and_say_so():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    start = time.monotonic()
    assert "too deep" in show(deep)
    assert summary(list(range(MAX_ITEMS + 5)))[-1] == "… 5 more"
    assert summary(dict.fromkeys(range(MAX_ITEMS + 5)))["…"] == "5 more"
    assert len(show("x" * (MAX_TEXT + 100))) < MAX_TEXT + 100
    assert "100 more characters" in show("x" * (MAX_TEXT + 100))
    wide = [[[0] * 50 for _ in range(200)] for _ in range(200)]
    assert "more" in show(wide)
    assert show(10**9999) == f'"<integer of {(10**9999).bit_length()} bits>"'
    assert time.monotonic() - start < 20
