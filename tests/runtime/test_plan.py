"""Plans place weights and activations for any number of chips."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from comfyui_tpu.runtime.errors import PlanError
from comfyui_tpu.runtime.plan import (
    LARGEST_AXIS,
    REPLICATED,
    Plan,
    guided,
    mesh_of,
    neighbours_in_a_ring,
    spatial,
    spread,
    tensor,
)

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
    with pytest.raises(PlanError, match=r"one of .*'own heads'\); got 'columns'"):
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


def test_tensor_parallel_weights_are_split_by_features():
    plan = tensor(8, r"to_q\.", r"to_out\.")
    assert plan.weight_spec("to_q.weight", (6144, 3072)) == P(CHIPS)
    assert plan.weight_spec("to_q.bias", (6144,)) == P(CHIPS), "a bias belongs to the outputs"
    assert plan.weight_spec("to_out.weight", (40, 6144, 3072), stacked=True) == P(None, None, CHIPS)
    assert plan.weight_spec("to_out.bias", (6144,)) == P(), "added once, by everybody"
    assert plan.weight_spec("to_q.weight", (12, 64)) == P(), "12 features are not split 8 ways"


def test_a_batch_takes_its_axes_only_where_it_divides():
    plan = guided(8)
    assert plan.axes_of(2) == (("branch",), ("chips",))
    assert plan.axes_of(1) == ((), ("branch", "chips"))
    assert plan.splits_batch(2)
    assert not plan.splits_batch(1)
    assert not spread(8).splits_batch(2)


def fake_devices(*coords):
    return tuple(SimpleNamespace(coords=place) for place in coords)


def test_a_ring_goes_from_neighbour_to_neighbour():
    devices = fake_devices(*((x, y, 0) for y in range(4) for x in range(2)))
    ring = neighbours_in_a_ring(devices)
    assert sorted(map(id, ring)) == sorted(map(id, devices))
    for one, other in zip(ring, (*ring[1:], ring[0]), strict=True):
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_devices_without_a_ring_stay_in_their_order():
    line = fake_devices((0, 0, 0), (1, 0, 0), (2, 0, 0))
    assert neighbours_in_a_ring(line) == line
    assert neighbours_in_a_ring(tuple(jax.devices())) == tuple(jax.devices())
