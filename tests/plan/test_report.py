"""From programs to a model: sums, verdicts, and the three ways to show them."""

import json
import re

import pytest

from comfyui_tpu.plan import html, table
from comfyui_tpu.plan.choose import choose
from comfyui_tpu.plan.hardware import GIB
from comfyui_tpu.plan.report import to_json
from comfyui_tpu.runtime.errors import PlanError
from tests.plan.examples import SECOND, cycles, estimate, program


def test_a_step_has_both_guidance_branches():
    assert estimate().seconds_per_step == pytest.approx(2.0)


def test_a_step_has_the_experts_of_that_step_only():
    shared = program("transformer denoise", 100, components=("transformer", "transformer_2"), cycles=cycles(matmul=1))
    assert estimate(programs=(shared,)).seconds_per_step == pytest.approx(2.0)


def test_the_task_is_the_sum_of_all_calls():
    assert estimate().seconds_per_task == pytest.approx(2 * 0.5 + 100 * 1 + 3)
    assert estimate().phase_seconds() == pytest.approx({"text_encoder": 1, "transformer": 100, "vae": 3})


def test_memory_is_all_weights_and_the_largest_activations():
    assert estimate().hbm_bytes_per_chip == 11 * GIB + 4 * GIB
    assert sum(estimate().hbm_map().values()) == estimate().hbm_bytes_per_chip


def test_components_that_fit_only_in_turns_are_told_from_those_that_stay():
    assert estimate().fits_resident
    in_turns = estimate(weights={"text_encoder": 25 * GIB, "transformer": 10 * GIB, "vae": 0})
    assert in_turns.fits
    assert not in_turns.fits_resident
    too_large = estimate(weights={"text_encoder": 0, "transformer": 28 * GIB, "vae": 0})
    assert not too_large.fits
    assert too_large.missing_bytes == pytest.approx(0.75 * GIB)


def test_a_program_that_the_compiler_refuses_does_not_fit_and_has_no_time():
    refused = estimate(programs=(program("transformer denoise", 100, temp_bytes=40 * GIB, failure="out of memory"),))
    assert not refused.fits
    found = to_json(refused)
    assert found["seconds_per_step_estimate"] is None
    assert found["hbm_bytes_missing"] == pytest.approx(18.75 * GIB)
    assert "out of memory" in table.render(found)


def test_utilisation_is_flop_over_what_all_chips_could_do():
    # 100 calls for 50 steps: two calls' flop in two seconds, on eight chips of 917.504 TFLOP/s each.
    assert estimate().mfu == pytest.approx(1 / 8)
    assert estimate().roofline_seconds() == pytest.approx({"compute": 2 / 8, "memory": 1.0})


def test_the_json_says_what_the_issue_asks_for():
    found = json.loads(json.dumps(to_json(estimate())))
    assert found["hbm_bytes_per_chip"] == 15 * GIB
    assert found["seconds_per_step_estimate"] == pytest.approx(2.0)
    assert found["cycles"] == pytest.approx(cycles(matmul=0.5, attention=1.0, collectives=0.5))
    assert found["compile_seconds"] == pytest.approx(9.0)
    assert found["mfu_estimate"] == pytest.approx(0.125)
    assert "not measured" in found["note"]


def test_the_table_shows_the_verdict_the_step_and_where_the_time_goes():
    text = table.render(to_json(estimate()))
    assert "FITS: 15.00 GiB of 31.25 GiB" in text
    assert re.search(r"one denoising step.*: 2\.00 s", text)
    assert re.search(r"attention +1,750\.0 M cycles +1\.00 s +50\.0%", text)


def test_the_verdict_names_what_is_missing_and_what_fits():
    found = to_json(estimate(weights={"text_encoder": 0, "transformer": 28 * GIB, "vae": 0}))
    text = table.verdict({**found, "topologies_that_fit": ["v5p:2x2x1", "v6e:4x4"]})
    assert "DOES NOT FIT by 0.75 GiB" in text
    assert "v5p:2x2x1, v6e:4x4" in text


def test_a_comparison_has_a_column_for_each():
    text = table.compare([to_json(estimate()), to_json(estimate(model="other"))])
    assert "example v6e:2x4" in text
    assert "other v6e:2x4" in text
    assert len(re.findall(r"2\.00 s", text)) == 2


def test_the_page_loads_nothing_and_shows_names_as_they_are():
    page = html.render([to_json(estimate())])
    assert not re.search(r"(src|href)\s*=|<script|https?://|@import|url\(", page)
    assert "Block.forward (&lt;transformer&gt;.py:1)" in page
    assert "a &lt;warning&gt;" in page


def test_the_page_of_several_compares_them():
    page = html.render([to_json(estimate()), to_json(estimate(model="other"))])
    assert "Side by side" in page
    assert "Side by side" not in html.render([to_json(estimate())])


def test_the_fastest_plan_that_fits_is_chosen():
    slow = program("transformer denoise", 100, cycles=cycles(matmul=3))
    plans = {
        "large": estimate(weights={"text_encoder": 0, "transformer": 40 * GIB, "vae": 0}),
        "slow": estimate(programs=(slow,)),
        "good": estimate(),
    }
    assert choose(plans) == "good"


def test_a_plan_that_keeps_everything_loaded_goes_before_a_faster_one():
    in_turns = estimate(weights={"text_encoder": 25 * GIB, "transformer": 10 * GIB, "vae": 0})
    slow = program("transformer denoise", 100, cycles={"matmul": 2 * SECOND})
    assert choose({"in turns": in_turns, "resident": estimate(programs=(slow,))}) == "resident"


def test_no_plan_that_fits_is_an_error_that_says_how_much_is_missing():
    with pytest.raises(PlanError, match=r"0\.8 GiB"):
        choose({"large": estimate(weights={"text_encoder": 0, "transformer": 28 * GIB, "vae": 0})})
