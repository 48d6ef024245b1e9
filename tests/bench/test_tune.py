"""Ranking tiles, and the line for the table of tiles."""

import dataclasses

import pytest

from comfyui_tpu.bench import tune
from comfyui_tpu.bench.compiling import Compiled
from comfyui_tpu.bench.kernels import OURS, Shape, our_blocks
from comfyui_tpu.ops.splash_blocks import Blocks, Limits
from comfyui_tpu.plan.hardware import parse
from tests.bench.made import Made
from tests.bench.stored import JOBS, schedule
from tests.bench.test_kernels import SHAPE, TILED, ours

V6E = parse("v6e:1x1")


def stored(seconds=1.0) -> Compiled:
    return Compiled(JOBS[OURS], schedule(OURS), seconds)


def test_the_fastest_comes_first_within_its_length():
    made = ours(Made(), tiles=3)
    slower = dataclasses.replace(TILED, shape=dataclasses.replace(SHAPE, heads=4))
    report = tune.rank([Compiled(slower, made), Compiled(TILED, made), stored()], V6E, 128)
    assert [row["seq"] for row in report["rows"]] == [500, 1000, 1000]
    assert report["rows"][1]["cycles_total"] < report["rows"][2]["cycles_total"]


def test_the_line_is_one_for_the_table():
    line = tune.rank([stored()], V6E, 128)["limits"]
    assert line.startswith(
        "128: Limits(queries=256, keys=256, area=65536, columns=128, slices=(128,), ahead=1, behind=1"
    )
    names = {field.name for field in dataclasses.fields(Limits)}
    assert names == {part.split("=")[0].strip() for part in line.split("Limits(")[1].split(", ")}


def test_one_tile_alone_puts_all_its_cycles_on_its_logits():
    assert f"cycles={(463 - 150) / 64:.3f}, part_cycles=0" in tune.rank([stored()], V6E, 128)["limits"]


def test_costs_are_told_apart_by_tiles_of_several_sizes():
    """1.3 cycles per 1024 logits and 20 per part."""
    tiles = [Blocks(512, 512, 256, 256), Blocks(1024, 512, 256, 512), Blocks(512, 2048, 512, 256)]
    rows = []
    for blocks in tiles:
        area, parts = blocks.queries * blocks.keys, (blocks.queries // blocks.columns) * blocks.slices
        cycles = 150 + 1.3 * area / 1024 + 20 * parts
        rows.append({"block_q": blocks.queries, "block_kv": blocks.keys, "cycles_per_tile": cycles})
        rows[-1]["blocks"] = dataclasses.asdict(blocks)
    assert tune._costs(rows) == pytest.approx((1.3, 20))
    for row in rows:
        row["cycles_per_tile"] += row["cycles_per_tile"] - 150
    assert tune._costs(rows, together=2) == pytest.approx((1.3, 20))  # two heads in each tile


def test_what_does_not_fit_is_listed_and_not_ranked():
    outside = Compiled(TILED, None, reason="RESOURCE_EXHAUSTED: VMEM")
    report = tune.rank([outside, stored()], V6E, 128)
    assert len(report["rows"]) == 1
    assert "does not fit: RESOURCE_EXHAUSTED: VMEM" in tune.render(report)


def test_the_text_has_the_versions_the_basis_and_the_line():
    report = tune.rank([stored()], V6E, 128)
    text = tune.render(report)
    assert f"libtpu {report['versions']['libtpu']}" in text
    assert "nothing was measured on a TPU" in text
    assert report["limits"] in text


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:1x1", "v7x:2x2x1"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_usual_candidates_are_cuts_of_the_tile_in_use(topology, head_dim):
    shape, topology = Shape(8, 4608, 4608, head_dim), parse(topology)
    candidates = [job.blocks for job in tune.jobs(topology, [shape], None)]
    used = our_blocks(topology, shape)
    assert candidates[0] == used
    assert len(set(candidates)) == len(candidates) > 1
    assert {(each.queries, each.keys) for each in candidates} == {(used.queries, used.keys)}


def test_candidates_that_are_asked_for_are_tried_for_every_length():
    shapes = [Shape(8, length, length, 64) for length in (1000, 2000)]
    tiles = [Blocks(256, 256, 128, 128), Blocks(512, 256, 128, 128)]
    jobs = tune.jobs(V6E, shapes, tiles)
    assert [(job.shape, job.blocks) for job in jobs] == [(shape, each) for shape in shapes for each in tiles]
