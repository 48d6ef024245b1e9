"""Modules are built without weights, with their computed tables, and repeated blocks become one scan."""

import pytest
import torch

from comfyui_tpu.runtime import skeleton
from comfyui_tpu.runtime.errors import PlanError


class Block(torch.nn.Module):
    def __init__(self, width, index):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.register_buffer("table", torch.arange(float(width)), persistent=False)
        self.register_buffer("running", torch.zeros(width))
        self.index = index

    def forward(self, x):
        return x + self.linear(x)


class Model(torch.nn.Module):
    def __init__(self, widths=(8, 8, 8)):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, widths[0])
        self.blocks = torch.nn.ModuleList(Block(width, i) for i, width in enumerate(widths))
        self.head = torch.nn.Linear(widths[0], 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("rotary", torch.cos(torch.arange(16.0)), persistent=False)


def test_no_weight_is_allocated_and_computed_tables_are_real():
    built = skeleton.build(Model)
    assert {p.device.type for p in built.module.parameters()} == {"meta"}
    assert torch.equal(built.computed["rotary"], torch.cos(torch.arange(16.0)))
    assert built.module.blocks[0].running.is_meta, "a persistent buffer comes from the checkpoint"


def test_a_model_of_14_billion_parameters_is_built_in_no_memory():
    built = skeleton.build(lambda: torch.nn.Sequential(*[torch.nn.Linear(40_000, 40_000) for _ in range(9)]))
    assert sum(p.numel() for p in built.module.parameters()) > 14e9


def test_tied_weights_stay_tied_and_know_both_names():
    built = skeleton.build(Model)
    assert built.module.head.weight is built.module.embedding.weight
    assert built.weights["embedding.weight"].sources == (("embedding.weight", "head.weight"),)
    assert "head.weight" not in built.weights


def test_stacked_blocks_list_the_sources_of_every_layer():
    built = skeleton.build(Model, stacked=["blocks"])
    weight = built.weights["blocks.0.block.linear.weight"]
    assert weight.shape == (3, 8, 8)
    assert weight.stacked
    assert weight.sources == tuple((f"blocks.{i}.linear.weight",) for i in range(3))
    assert built.weights["blocks.0.block.running"].sources[2] == ("blocks.2.running",)
    assert built.computed["blocks.0.block.table"].shape == (3, 8)


def test_blocks_that_differ_cannot_be_scanned():
    with pytest.raises(PlanError, match=r"blocks\.2 differs from blocks\.0"):
        skeleton.build(lambda: Model((8, 8, 16)), stacked=["blocks"])


def test_building_leaves_the_users_random_state_and_defaults_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode():
        skeleton.build(Model, stacked=["blocks"])
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"
