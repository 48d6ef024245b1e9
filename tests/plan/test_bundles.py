"""The reader of schedules on small texts whose cycles can be counted by eye."""

import numpy as np
import pytest

from comfyui_tpu.plan.bundles import BundleError, Loop, Span, parse, read

# Bundles 2 to 8 are a loop of five trips, 3 after its branch back included; 11 to 13 may be skipped.
TEXT = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: f32[2,64,1], index: 0, kind: input, shape index: {}] /* a
comment of two lines */  ;;  %s2_s1 = inlined_call_operand.hbm [shape: bf16[2,1500,64], index: 1, kind: output, x] }
   0x1   :  { %s3_s2 = smov 0 }
   0x2 LB: > { %s4_s4 = sadd.s32 1, %s4_s3  ;;  %s4_s3 = sphi %s3_s2, %s4_s4 /* phi copy */ } /* Start region 7 */
   0x3   : > { %p5_p1 = scmp.ge.s32.totalorder %s4_s4, 5 /* loop exit test */ }
   0x4   : > { %6 = sbr.rel (!%p5_p1) target = $region7  ;;  %v1_v1 = vpow2.f32 %v0_v0 }
   0x5   :  {}
   0x6   : > { %7 = vst [vmem:[#allocation2]] %v1_v1 } /* End region 7 */
   0x7   :  {}
   0x8   :  {}
   0x9   :  { %8 = sbr.rel (%p5_p2) target = $region9 }
   0xa LB:  { %v2_v2 = vmul.f32 %v1_v1 } /* Start region 8 */
   0xb   :  {}
   0xc   :  {} /* End region 8 */
   0xd PF:  { %9 = vsyncpa 1 } /* Start/End empty region 9 */
"""
UNITS = "== CAPACTIY:\nMXU, EUP\n    2     1\n\n== UTILIZATION:\n"


def table(rows: int, used: dict[int, str] | None = None) -> str:
    return UNITS + "\n".join((used or {}).get(row, "0 0") for row in range(rows)) + "\n"


def schedule(text: str = TEXT):
    return parse(text, table(14, {2: "2 1", 4: "1 0"}))


def test_every_bundle_is_read_also_those_of_several_lines():
    found = schedule()
    assert len(found.bundles) == 14
    assert "two lines" in found.bundles[0]


def test_a_jump_back_is_a_loop_with_the_bundles_behind_its_branch():
    assert schedule().loops == (Loop(2, 9, 5),)


def test_a_jump_forward_may_skip_code_from_the_next_mark():
    """The loop body that begins right behind the branch is not part of what always runs."""
    assert schedule().branches == (Span(10, 13),)


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("sadd.s32 1, %s4_s3", "sadd.s32 2, %s4_s3", 3),
        ("%s4_s4, 5 /*", "%s4_s4, %s9_s9 /*", None),
        ("sadd.s32 1, %s4_s3", "sadd.s32 %s9_s9, %s4_s3", None),
        ("scmp.ge", "scmp.lt", None),
        ("(!%p5_p1)", "(%p5_p1)", None),
    ],
)
def test_trips_are_those_of_a_constant_bound_and_step(old, new, trips):
    assert old in TEXT
    assert schedule(TEXT.replace(old, new)).loops[0].trips == trips


def test_cycles_are_bundles_times_trips_times_share():
    found = schedule()
    runs = found.runs(lambda loop: loop.trips, lambda branch: 0.25)
    assert runs.sum() == 2 + 7 * 5 + 1 + 3 * 0.25 + 1


def test_utilisation_weighs_bundles_by_how_often_they_run():
    found = schedule()
    weights = np.zeros(14)
    weights[2], weights[4] = 3, 1
    assert found.utilisation(weights) == {"MXU": (3 * 2 + 1) / (4 * 2), "EUP": 3 / 4}


def test_operands_are_known_by_where_they_lie():
    assert schedule().operands("vmem") == ("input f32[2,64,1]",)
    assert schedule().operands("hbm") == ("output bf16[2,1500,64]",)


def test_texts_of_different_kernels_are_refused():
    with pytest.raises(BundleError, match="got 14 and 13"):
        parse(TEXT, table(13))


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(BundleError, match="table of used units"):
        parse(TEXT, table(14, {3: "1 2 3"}))


def test_a_branch_to_nowhere_is_refused():
    nowhere = TEXT.replace("$region9", "$region99")
    with pytest.raises(BundleError, match="region 99"):
        parse(nowhere + "   0xe   :  {}\n", table(15))


def test_a_jump_without_a_named_target_leads_to_the_last_bundle_if_that_is_jumped_to():
    out = TEXT.replace("$region9", "$region99") + "   0xe PF:  {} /* exit bundle */\n"
    assert parse(out, table(15)).branches == (Span(10, 14),)


def write(folder, name, bundles=TEXT, rows=14):
    (folder / f"{name}-72-final_bundles.txt").write_text(bundles)
    (folder / f"{name}-71-schedule-analysis_final_bundles.txt").write_text("not this one " * 1000)
    (folder / f"{name}-70-final_hlo-static-per-bundle-utilization.txt").write_text(table(rows))


def test_a_dump_is_searched_for_the_kernel(tmp_path):
    write(tmp_path, "17-attention.1")
    write(tmp_path, "18-attention_other.1", TEXT * 2, 28)
    assert len(read(tmp_path, "attention").bundles) == 14


def test_a_dump_without_the_kernel_is_refused(tmp_path):
    write(tmp_path, "17-attention.1")
    with pytest.raises(BundleError, match=r"'splash' in .* found none"):
        read(tmp_path, "splash")


def test_a_dump_without_the_table_is_refused(tmp_path):
    write(tmp_path, "17-attention.1")
    (tmp_path / "17-attention.1-70-final_hlo-static-per-bundle-utilization.txt").unlink()
    with pytest.raises(BundleError, match="table of used units beside"):
        read(tmp_path, "attention")
