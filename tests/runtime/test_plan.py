"""Plans place weights and activations for any number of chips."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from comfyui_tpu.runtime.errors import PlanError
from comfyui_tpu.runtime.plan import LARGEST_AXIS, REPLICATED, Plan, mesh_of, spatial, spread

CHIPS = ("chips",)


def test_large_weights_are_split_along_their_largest_axis():
    assert spread(8).weight_spec("ffn.weight", (13824, 5120)) == P(CHIPS)
    assert spread(8).weight_spec("proj.weight", (5120, 13824)) == P(None, CHIPS)


def test_stacked_weights_keep_their_layer_axis_whole():
    assert spread(8).weight_spec("ffn.weight", (40, 13824, 5120), stacked=True) == P(None, CHIPS)
    assert spread(8).weight_spec("norm.weight", (40, 5120), stacked=True) == P(), "counted per layer, it is small"


def test_an_axis_that_does_not_divide_is_passed_over():
    assert spread(8).weight_spec("odd.weight", (1001, 512)) == P(None, CHIPS)
    assert spread(8).weight_spec("prime.weight", (1009, 1013)) == P()


def test_one_chip_shards_nothing():
    assert spread(1).weight_spec("ffn.weight", (13824, 5120)) == P()


def test_the_first_matching_rule_decides():
    plan = dataclasses.replace(spread(4), weights=(("norm", REPLICATED), (r"to_q\.", P("chips")), (".", LARGEST_AXIS)))
    assert plan.weight_spec("norm1.weight", (4096, 4096)) == P()
    assert plan.weight_spec("to_q.weight", (4, 8)) == P("chips")
    assert plan.weight_spec("other.weight", (4096, 8192)) == P(None, CHIPS)


def test_a_rule_that_does_not_divide_is_an_error_with_both_numbers():
    plan = dataclasses.replace(spread(8), weights=((".", P("chips")),))
    with pytest.raises(PlanError, match="12 does not divide by 8"):
        plan.weight_spec("to_q.weight", (12, 64))


@pytest.mark.parametrize(
    ("latents", "spec"),
    [
        ((90, 160), P(None, None, None, ("space0",), ("space1", "space2"))),  # 720 × 1280: 45 rows left, odd
        ((60, 106), P(None, None, None, ("space0", "space1"), ("space2",))),  # 480 × 848
        ((32, 32), P(None, None, None, ("space0", "space1", "space2"), None)),
        ((45, 53), P(None, None, None, None, None)),
    ],
)
def test_space_is_split_wherever_it_divides(latents, spec):
    assert spatial(8).activation_spec((1, 16, 5, *latents)) == spec
    assert spatial(8).activation_spec((1, 32, *latents)) == P(*spec[1:]), "a picture has no axis for time"


def test_only_pictures_are_split_in_space():
    assert spatial(8).activation_spec((1, 512)) == P()
    assert spread(8).activation_spec((1, 16, 5, 32, 32)) == P()


@pytest.mark.parametrize("chips", [1, 2, 3, 4, 6, 8, 256])
def test_default_plans_exist_for_every_number_of_chips(chips):
    assert spread(chips).chips == spatial(chips).chips == chips


def test_attention_is_one_of_the_known_ways():
    with pytest.raises(PlanError, match=r"one of \('heads', 'ring', 'replicated'\); got 'columns'"):
        dataclasses.replace(spread(8), attention="columns")


@pytest.mark.parametrize(("attention", "ring"), [("heads", 3), ("heads", 0), ("ring", 2), ("replicated", 2)])
def test_a_ring_divides_the_chips_of_an_exchange_of_heads(attention, ring):
    assert dataclasses.replace(spread(8), ring_chips=2).ring_chips == 2
    with pytest.raises(PlanError, match=f"must divide the 8 chips; got {ring} with '{attention}'"):
        dataclasses.replace(spread(8), attention=attention, ring_chips=ring)


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(PlanError, match="made for 4 chips; got 8 devices"):
        mesh_of(spread(4), tuple(jax.devices()))


def test_plans_are_data():
    assert spread(8) == spread(8)
    assert hash(Plan("x", (("a", 2),))) == hash(Plan("x", (("a", 2),)))
