"""How the cycles of the compared kernels are counted."""

import dataclasses

import pytest

from comfyui_tpu.bench.kernels import (
    JAX_SPLASH,
    OURS,
    TOKAMAX_SPLASH,
    Job,
    Shape,
    SplashBlocks,
    count,
    head_dim_bound,
    our_blocks,
    splash_candidates,
)
from comfyui_tpu.ops.splash_blocks import Blocks
from comfyui_tpu.plan.bundles import BundleError
from comfyui_tpu.plan.hardware import parse
from tests.bench.made import BRANCH, Made
from tests.bench.stored import JOBS, schedule

EXP, MAX = "%1 = vpow2.f32 %2", "%1 = vmax.f32 %2"
SHAPE = Shape(heads=3, queries=1000, keys=1500, head_dim=128)
TILED = Job(OURS, "v6e:1x1", SHAPE, Blocks(512, 512, 256, 256))  # 2 blocks of queries, 3 tiles
ONE_TILE = Job(OURS, "v6e:1x1", SHAPE, Blocks(512, 1536, 256, 256))
SPLASH = Job(JAX_SPLASH, "v6e:1x1", SHAPE, SplashBlocks(512, 512, 512))

START, COPY, BOUNDED, ONLINE, FINISH = 11, 7, 100, 50, 13


def softmaxes(made):
    online = made.loop(made.plain(ONLINE - BRANCH - 1) + made.plain(1, f"{EXP} ;; {MAX}"), 8)
    return made.branch(made.plain(BOUNDED, EXP)) + made.branch(online)


def ours(made, tiles, start_trips=2):
    """Bundles 0 to 1 before the grid; then what our kernel is made of, each piece of the length above."""
    start = made.loop(made.plain(START - BRANCH), start_trips)
    per_tile = made.branch(made.plain(COPY)) + softmaxes(made)
    finish = made.loop(made.plain(FINISH - BRANCH), 2)
    middle = made.loop(made.plain(1) + per_tile, tiles) if tiles else softmaxes(made)
    step = made.branch(start + middle + finish)
    return made.schedule(made.plain(2) + made.loop(made.plain(1) + step, None))


AROUND = 1 + BRANCH + 1 + BRANCH  # of a grid step: the loop's first bundle, the step's branch, its mark, the way back
TWO_SOFTMAXES = 2 * (BRANCH + 1)  # their branches and marks
TILE = 1 + (BRANCH + COPY + 1) + TWO_SOFTMAXES + BRANCH


def test_a_call_is_its_steps_and_a_step_its_tiles_with_the_bounded_softmax():
    counted = count(TILED, ours(Made(), tiles=3))
    assert counted.tile == TILE + BOUNDED
    assert counted.total == 2 + 3 * 2 * (AROUND + 2 * START + 3 * (TILE + BOUNDED) + 2 * FINISH)


def test_the_fall_back_is_counted_on_request_with_its_trips():
    counted = count(TILED, ours(Made(), tiles=3), online=True)
    assert counted.tile == TILE + 8 * ONLINE
    assert counted.total == 2 + 3 * 2 * (AROUND + 2 * START + 3 * (TILE + 8 * ONLINE) + 2 * FINISH)


def test_a_single_tile_has_no_loop():
    counted = count(ONE_TILE, ours(Made(), tiles=None))
    assert counted.tile == BOUNDED
    assert counted.total == 2 + 3 * 2 * (AROUND + 2 * START + TWO_SOFTMAXES + BOUNDED + 2 * FINISH)


def test_utilisation_is_that_of_the_softmax_that_is_counted():
    made = ours(Made(), tiles=3)
    assert count(TILED, made).utilisation == {"EUP": 1.0, "MXU": 0.0}
    assert count(TILED, made).limiting_unit == "EUP"
    assert count(TILED, made, online=True).utilisation["EUP"] == pytest.approx(1 / ONLINE)


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    counted = count(TILED, ours(Made(), tiles=3, start_trips=None))
    assert counted.total == 2 + 3 * 2 * (AROUND + START + 3 * (TILE + BOUNDED) + 2 * FINISH)
    assert "1 loop(s) of unknown length are counted once" in counted.notes


def test_the_softmax_that_is_not_counted_is_said():
    made = ours(Made(), tiles=3)
    assert any("online softmax" in note and "not counted" in note for note in count(TILED, made).notes)
    assert any("bounded softmax" in note and "not counted" in note for note in count(TILED, made, online=True).notes)


def test_a_schedule_without_the_loop_over_tiles_is_refused():
    with pytest.raises(BundleError, match="expected 1 loop over 3 tiles, found 0"):
        count(TILED, ours(Made(), tiles=None))


def test_a_loop_over_another_number_of_tiles_is_refused():
    with pytest.raises(BundleError, match="expected 3 tiles, the loop over them runs 4 times"):
        count(TILED, ours(Made(), tiles=4))


def test_two_cores_share_the_heads():
    made = ours(Made(), tiles=3)
    first = made.bundles[0].replace("%1 = vst", "%1 = sld [smem:0] /* core id */")
    one, two = (count(TILED, dataclasses.replace(made, bundles=(top, *made.bundles[1:]))) for top in ("", first))
    assert (two.total - 2) / (one.total - 2) == 2 / 3  # of three heads
    assert two.tile == one.tile


def test_two_heads_of_64_share_a_step():
    narrow = dataclasses.replace(TILED, shape=dataclasses.replace(SHAPE, heads=6, head_dim=64))
    made = ours(Made(), tiles=3)
    assert count(narrow, made).total == count(TILED, made).total
    assert count(dataclasses.replace(narrow, shape=dataclasses.replace(SHAPE, heads=5, head_dim=64)), made).total == (
        count(TILED, made).total
    )


def test_a_grid_of_one_step_has_no_loop():
    made = Made()
    job = dataclasses.replace(ONE_TILE, shape=Shape(heads=1, queries=500, keys=1500, head_dim=128))
    counted = count(job, made.schedule(made.plain(2) + softmaxes(made)))
    assert (counted.tile, counted.total) == (BOUNDED, 2 + TWO_SOFTMAXES + BOUNDED)


def test_a_grid_of_other_steps_is_refused():
    other = dataclasses.replace(JOBS[OURS], shape=dataclasses.replace(JOBS[OURS].shape, heads=4))
    with pytest.raises(BundleError, match="expected 8 steps of the grid, its loop runs 6 times"):
        count(other, schedule(OURS))


def test_a_schedule_without_a_bounded_softmax_is_refused():
    made = Made()
    body = made.branch(made.plain(10, f"{EXP} ;; {MAX}"))
    with pytest.raises(BundleError, match="found 0 and 1"):
        count(ONE_TILE, made.schedule(made.loop(made.plain(1) + made.branch(body), None)))


def test_a_schedule_without_exponentials_is_refused():
    made = Made()
    with pytest.raises(BundleError, match="exponentials"):
        count(SPLASH, made.schedule(made.loop(made.plain(10), 3)))


def splash(made):
    step = made.branch(made.plain(7)) + made.branch(made.plain(90, EXP)) + made.branch(made.plain(20))
    return made.schedule(made.plain(2) + made.loop(made.plain(1) + made.branch(step), None))


def test_jax_splash_starts_and_ends_a_block_of_queries_once():
    counted = count(SPLASH, splash(Made()))
    tile = AROUND + 3 * (BRANCH + 1) + 90
    assert counted.tile == tile
    assert counted.total == 2 + 3 * 2 * (3 * tile + 7 + 20)


def tokamax(made):
    """A step of its kernel is JAX's, but that what is done for every tile has no branch of its own."""
    step = made.branch(made.plain(7)) + made.plain(90, EXP) + made.branch(made.plain(20))
    return made.schedule(made.plain(2) + made.loop(made.plain(1) + made.branch(step), None))


def test_tokamax_starts_and_ends_a_block_of_queries_once():
    job = dataclasses.replace(SPLASH, kernel=TOKAMAX_SPLASH)
    counted = count(job, tokamax(Made()))
    tile = AROUND + 2 * (BRANCH + 1) + 90
    assert counted.tile == tile
    assert counted.total == 2 + 3 * 2 * (3 * tile + 7 + 20)
    assert counted.utilisation["EUP"] == pytest.approx(90 / (90 + 1 + BRANCH))  # between its two branches


def test_a_peer_of_another_number_of_steps_is_refused():
    other = dataclasses.replace(JOBS[TOKAMAX_SPLASH], shape=dataclasses.replace(JOBS[OURS].shape, heads=4))
    with pytest.raises(BundleError, match="expected 96 steps of the grid, its loop runs 50 times"):
        count(other, schedule(TOKAMAX_SPLASH))


def test_a_peer_without_an_end_of_a_block_of_queries_is_refused():
    made = Made()
    step = made.branch(made.plain(7)) + made.plain(90, EXP)
    with pytest.raises(BundleError, match="for the last block of keys in a peer's kernel"):
        count(SPLASH, made.schedule(made.plain(2) + made.loop(made.plain(1) + made.branch(step), None)))


def test_padding_is_said():
    assert any("1024 × 1536" in note for note in count(SPLASH, splash(Made())).notes)
    whole = dataclasses.replace(SPLASH, shape=Shape(3, 1024, 1536, 64))
    assert count(whole, splash(Made())).notes == ()


def test_stored_dumps_of_all_kernels():
    """As they were when they were stored; schedules that are counted by hand are above."""
    found = {name: count(job, schedule(name)) for name, job in JOBS.items()}
    assert (found[OURS].tile, found[OURS].total) == (463, 7575)
    assert (found[JAX_SPLASH].tile, found[JAX_SPLASH].total) == (513, 25135)
    assert (found[TOKAMAX_SPLASH].tile, found[TOKAMAX_SPLASH].total) == (401, 19733)
    assert count(JOBS[OURS], schedule(OURS), online=True).total == 12531


def test_copies_within_vmem_are_said():
    notes = count(JOBS[OURS], schedule(OURS)).notes
    assert any("VMEM" in note and "bf16[1,704,256]" in note for note in notes)


@pytest.mark.parametrize(
    ("topology", "head_dim", "bound"),
    [
        ("v6e:1x1", 128, 2 / 3),
        ("v6e:1x1", 64, 0.4),
        ("v6e:1x1", 256, 1.0),
        ("v7x:2x2x1", 128, 2 / 3),
        ("v5e:2x4", 128, 1.0),
        ("v4:2x2x1", 64, 2 / 3),
    ],
)
def test_the_head_dim_bound(topology, head_dim, bound):
    assert head_dim_bound(parse(topology), head_dim) == pytest.approx(bound)


def test_candidates_for_jax_splash_suit_the_length():
    assert SplashBlocks(2048, 2048, 1024) in splash_candidates(Shape(10, 75600, 75600, 128))
    assert SplashBlocks(1536, 2304, 768) in splash_candidates(Shape(6, 4608, 4608, 128))
    assert splash_candidates(Shape(1, 100, 300, 64)) == [SplashBlocks(128, 384, 384)]


@pytest.mark.parametrize("length", [1, 128, 1000, 4608, 39826, 75600])
def test_candidates_for_jax_splash_are_ones_it_takes(length):
    for blocks in splash_candidates(Shape(1, length, length, 128)):
        assert blocks.keys % blocks.compute == 0
        assert all(size % 128 == 0 and size for size in dataclasses.astuple(blocks))


def test_our_tile_is_the_one_of_production():
    from comfyui_tpu.ops.splash_blocks import fit

    shape = Shape(6, 4608, 4608, 100)
    assert our_blocks(parse("tpu7x:2x2x1"), shape) == fit("v7x", 4608, 4608, 128, 2)


@pytest.mark.parametrize("job", JOBS.values(), ids=lambda job: job.kernel)
def test_a_job_survives_json(job):
    assert Job.from_json(job.to_json()) == job
