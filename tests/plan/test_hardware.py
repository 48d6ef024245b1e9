"""Topologies by name, and the devices that stand for them."""

import pytest

from comfyui_tpu.plan.hardware import GENERATIONS, describe_devices, parse
from comfyui_tpu.runtime.errors import PlanError


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v4:1x1x1", 1),
        ("v4:2x2x1", 4),
        ("v5e:1x1", 1),
        ("v5e:2x4", 8),
        ("v5p:2x2x1", 4),
        ("v5p:2x2x2", 8),
        ("v6e:1x1", 1),
        ("v6e:1x2", 2),
        ("v6e:2x2", 4),
        ("v6e:2x4", 8),
        ("v6e:4x4", 16),
        ("tpu7x:2x2x1", 8),
        ("v7x:1x1x1", 2),
    ],
)
def test_the_compiler_knows_the_topology_and_its_devices_are_counted_right(name, devices):
    topology = parse(name)
    assert topology.devices == devices
    described = describe_devices(topology)
    assert len(described) == devices
    assert described[0].platform == "tpu"


@pytest.mark.parametrize("text", ["v6e", "v6e:8", "v9:2x4", "v6e:2x4x1", "v5p:2x2", "v6e:0x4", "2x4"])
def test_what_is_no_topology_is_refused_with_an_example(text):
    with pytest.raises(PlanError, match="such as"):
        parse(text)


def test_a_compiler_that_cannot_is_an_error_that_names_the_topology_and_the_package(monkeypatch):
    def without_libtpu(**options):
        raise RuntimeError("no TPU plug-in")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", without_libtpu)
    with pytest.raises(PlanError, match=r"v6e:3x5: no TPU plug-in .*pip install libtpu"):
        describe_devices(parse("v6e:3x5"))


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: bfloat16 TFLOP/s of a chip.
@pytest.mark.parametrize(("name", "teraflops"), [("v4", 275), ("v5e", 197), ("v5p", 459), ("v6e", 918), ("v7x", 2307)])
def test_flop_per_cycle_and_clock_make_the_published_peak(name, teraflops):
    generation = GENERATIONS[name]
    assert generation.peak_flops * generation.devices_per_chip == pytest.approx(teraflops * 1e12, rel=2e-3)


@pytest.mark.parametrize("name", ["v6e:1x2", "v6e:2x4", "v6e:4x4", "v5p:2x2x2", "v5p:2x2x4", "v4:4x4x2", "tpu7x:2x2x1"])
def test_devices_are_counted_as_jax_counts_them(name):
    topology = parse(name)
    described = [(*device.coords[: len(topology.shape)], device.core_on_chip) for device in describe_devices(topology)]
    assert [topology.position(number) for number in range(topology.devices)] == described


@pytest.mark.parametrize(
    ("name", "devices", "grid"),
    [
        ("v6e:2x4", range(8), (2, 4)),
        ("v6e:2x4", (0, 1, 2, 3), (2, 2)),
        ("v6e:2x4", (4, 5, 6, 7), (2, 2)),
        ("v6e:2x4", (0, 2, 4, 6), (4,)),
        ("v6e:2x4", (0, 4), (2,)),  # not neighbours
        ("v6e:2x4", (3,), ()),
        ("tpu7x:2x2x1", (0, 1, 2, 3), (2, 2)),
    ],
)
def test_a_group_of_devices_is_the_box_it_fills_or_a_line(name, devices, grid):
    assert parse(name).grid_of(devices) == grid
