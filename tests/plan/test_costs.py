"""The cost reader, on schedules small enough to add up by hand."""

import pytest

from comfyui_tpu.plan import costs, hlo
from comfyui_tpu.plan.hardware import HOP_SECONDS, collective_seconds, parse

V6E = parse("v6e:2x4")
CLOCK = V6E.generation.clock


def cycles(number: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


FUSED = """
%fused_matmul (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%fused_norm (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} multiply(%a, %a)
}

%fused_slice (a: bf16[40,8,8], i: s32[]) -> bf16[8,8] {
  %a = bf16[40,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = bf16[1,8,8]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,8,8}
}
"""


def program(*lines: str, before: str = "") -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule m\n{FUSED}{before}\nENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{\n{body}\n}}\n")


X = "%x = bf16[8,8]{1,0} parameter(0)"


def test_each_operation_counts_in_its_category():
    cost = costs.read(
        program(
            X,
            f"%m = bf16[8,8]{{1,0}} fusion(%x, %x), calls=%fused_matmul, {cycles(1000)}",
            f'%a = bf16[8,8]{{1,0}} fusion(%m, %m), calls=%fused_matmul, metadata={{op_name="jit(f)/scaled_dot_product_attention/dot"}}, {cycles(300)}',  # noqa: E501
            f"%n = bf16[8,8]{{1,0}} fusion(%a), calls=%fused_norm, {cycles(70)}",
            f"ROOT %r = bf16[8,8]{{0,1}} copy(%n), {cycles(5)}",
        ),
        V6E,
    )
    assert cost.by_category() == {"matmul": 1000, "attention": 300, "elementwise": 70, "relayout": 5, "collectives": 0}
    assert cost.cycles == 1375


def test_an_operation_without_a_figure_counts_as_long_as_its_bytes_take():
    cost = costs.read(
        program(X, f"ROOT %m = bf16[8,8]{{1,0}} fusion(%x, %x), calls=%fused_matmul, {cycles(2**63 - 1)}"), V6E
    )
    (operation,) = cost.operations
    assert operation.cycles == pytest.approx(3 * 128 / V6E.generation.hbm_bandwidth * CLOCK)
    assert (operation.category, cost.without_figure) == ("matmul", 1)


def test_a_loops_body_counts_as_often_as_it_runs_and_nested_loops_multiply():
    before = """
%condition (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%p, %limit), direction=LT
}

%inner (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %n = s32[] fusion(%p), calls=%fused_norm, CYCLES
}

%outer (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %w = s32[] while(%p), condition=%condition, body=%inner
}
""".replace("CYCLES", cycles(10))
    module = program(X, "ROOT %w = s32[] while(%x), condition=%condition, body=%outer", before=before)
    cost = costs.read(module, V6E)
    assert cost.cycles == 10 * 7 * 7
    (operation,) = cost.operations
    assert operation.executions == 49
    assert cost.unknown_loops == 0


def test_a_collective_takes_the_time_its_bytes_need_on_the_links():
    line = "ROOT %g = bf16[1000000,8]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}"
    cost = costs.read(program(X, line), V6E)
    expected = collective_seconds("all-gather", 16_000_000, (2, 4), V6E) * CLOCK
    assert cost.by_category()["collectives"] == pytest.approx(expected)
    assert cost.collective_bytes == 16_000_000


def test_of_a_collective_beside_the_computation_only_the_wait_counts():
    def cost_with(work: int) -> costs.Cost:
        lines = (
            X,
            "%s = (bf16[8,8], bf16[1000000,8]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}",
            f"%n = bf16[8,8]{{1,0}} fusion(%x), calls=%fused_norm, {cycles(work)}",
            "ROOT %d = bf16[1000000,8]{1,0} all-gather-done(%s)",
        )
        return costs.read(program(*lines), V6E)

    whole = collective_seconds("all-gather", 16_000_000, (2, 4), V6E) * CLOCK
    assert cost_with(1000).by_category()["collectives"] == pytest.approx(whole - 1000)
    assert cost_with(10**9).by_category()["collectives"] == 0


OFFLOADED = """
%gather (x: bf16[8,8]) -> bf16[1000000,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  ROOT %g = bf16[1000000,8]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
}, execution_thread="sparsecore"

%called (x: bf16[8,8]) -> bf16[1000000,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %s = ((bf16[8,8]{1,0}), bf16[1000000,8]{1,0}, s32[]) async-start(%x), calls=%gather
  ROOT %d = bf16[1000000,8]{1,0} async-done(%s)
}, execution_thread="sparsecore"
"""


@pytest.mark.parametrize(("kind", "attribute"), [("async", "calls=%gather"), ("call", "to_apply=%called")])
def test_a_collective_under_a_generic_name_is_one(kind, attribute):
    def cost_with(work: int) -> costs.Cost:
        lines = (
            X,
            f"%s = ((bf16[8,8]{{1,0}}), bf16[1000000,8]{{1,0}}) {kind}-start(%x), {attribute}",
            f"%n = bf16[8,8]{{1,0}} fusion(%x), calls=%fused_norm, {cycles(work)}",
            f"ROOT %d = bf16[1000000,8]{{1,0}} {kind}-done(%s)",
        )
        return costs.read(program(*lines, before=OFFLOADED), V6E)

    whole = collective_seconds("all-gather", 16_000_000, (2, 4), V6E) * CLOCK
    assert cost_with(1000).by_category()["collectives"] == pytest.approx(whole - 1000)
    assert cost_with(10**9).by_category()["collectives"] == 0
    assert cost_with(1000).collective_bytes == 16_000_000


FUSED_STEPS = """
%step.1 (x: bf16[8,8]) -> (bf16[8,8], bf16[1000000,8]) {
  %x = bf16[8,8]{1,0} parameter(0)
  %g = bf16[1000000,8]{1,0} all-gather(%x), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %c = (bf16[8,8]{1,0}, bf16[1000000,8]{1,0}) custom-call(%x, %g), custom_call_target="AsyncCollectiveStart"
}
"""


def test_a_collective_that_fusions_carry_on_runs_beside_them():
    def cost_with(work: int) -> costs.Cost:
        lines = (
            X,
            "%async-collective-start = (bf16[8,8], bf16[1000000,8]{1,0}) fusion(%x), kind=kCustom, calls=%step.1",
            "%t = bf16[8,8]{1,0} get-tuple-element(%async-collective-start), index=0",
            f"%n = bf16[8,8]{{1,0}} fusion(%t), calls=%fused_norm, {cycles(work)}",
            "ROOT %async-collective-done = bf16[1000000,8]{1,0} fusion(%n), kind=kCustom, calls=%step.1",
        )
        return costs.read(program(*lines, before=FUSED_STEPS), V6E)

    whole = collective_seconds("all-gather", 16_000_000, (2, 4), V6E) * CLOCK
    assert cost_with(1000).by_category()["collectives"] == pytest.approx(whole - 1000)
    assert cost_with(10**9).by_category()["collectives"] == 0
    assert cost_with(1000).collective_bytes == 16_000_000


def test_copies_beside_the_computation_share_the_memorys_bandwidth():
    lines = (
        X,
        "%s1 = (f32[1000000,8]{1,0}, f32[1000000,8]{1,0:S(1)}, u32[]) copy-start(%x)",
        "%s2 = (f32[1000000,8]{1,0}, f32[1000000,8]{1,0:S(1)}, u32[]) copy-start(%x)",
        "%d1 = f32[1000000,8]{1,0:S(1)} copy-done(%s1)",
        "ROOT %d2 = f32[1000000,8]{1,0:S(1)} copy-done(%s2)",
    )
    cost = costs.read(program(*lines), V6E)
    one = 32_000_000 / V6E.generation.hbm_bandwidth * CLOCK
    assert cost.by_category()["relayout"] == pytest.approx(2 * one)
    assert cost.hbm_bytes == 2 * 32_000_000


def test_a_slice_copied_beside_the_computation_moves_its_own_bytes_alone():
    lines = (
        X,
        "%s = ((f32[1000000,8]{1,0}), f32[1000,8]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:1000], [0:8]}",
        "ROOT %d = f32[1000,8]{1,0:S(1)} slice-done(%s)",
    )
    cost = costs.read(program(*lines), V6E)
    assert cost.hbm_bytes == 32_000
    assert cost.cycles == pytest.approx(32_000 / V6E.generation.hbm_bandwidth * CLOCK)


def test_one_layers_slice_of_stacked_weights_reads_one_layer():
    line = "ROOT %f = bf16[1,8,8]{2,1,0:S(1)} fusion(%stack, %i), calls=%fused_slice"
    cost = costs.read(program("%stack = bf16[40,8,8]{2,1,0} parameter(0)", "%i = s32[] parameter(1)", line), V6E)
    assert cost.hbm_bytes == 8 * 8 * 2 + 4


KERNEL = (
    'ROOT %splash.1 = bf16[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/shard_map/splash_attention/pallas_call"}'
)


def test_a_kernels_cycles_come_from_whoever_knows_them():
    cost = costs.read(program(X, KERNEL), V6E, lambda kernel: {"splash_attention": 123}[kernel.kernel_name])
    assert cost.cycles == 123
    assert not cost.unknown_kernels
    assert not cost.kernels_at_peak


def test_a_kernel_without_cycles_counts_its_own_flop_at_the_peak_and_is_named():
    estimate = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"5242880","transcendentals":"1"}}}'
    cost = costs.read(program(X, KERNEL + estimate), V6E)
    assert cost.cycles == 5_242_880 / 524_288
    assert dict(cost.kernels_at_peak) == {"splash_attention": 1}


def test_a_kernel_nobody_knows_anything_of_counts_nothing_and_is_named():
    cost = costs.read(program(X, KERNEL), V6E)
    assert cost.cycles == 0
    assert dict(cost.unknown_kernels) == {"splash_attention": 1}


def test_collectives_of_one_chip_take_no_time():
    assert collective_seconds("all-reduce", 10**9, (), V6E) == 0


def test_an_all_to_all_is_held_up_by_the_cut_through_the_slice():
    # 8 GB: half the chips send half of 1 GB each over two links of 90 GB/s.
    assert collective_seconds("all-to-all", 10**9, (2, 4), V6E) == pytest.approx(4 * 0.5e9 / (2 * 90e9), rel=1e-2)


def test_a_reduce_scatter_moves_its_operand_which_is_the_larger():
    line = "ROOT %g = bf16[1000000,8]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}"
    cost = costs.read(program(X, line), V6E)
    assert cost.collective_bytes == 8 * 16_000_000
    assert cost.cycles == pytest.approx(collective_seconds("reduce-scatter", 128_000_000, (2, 4), V6E) * CLOCK)


SENT = 16_000_000 / V6E.generation.link_bandwidth * CLOCK
HOP = HOP_SECONDS * CLOCK
DONE = "ROOT %d = bf16[1000000,8]{1,0} collective-permute-done(%s)"


def permutation(name: str, pairs: str) -> str:
    return f"%{name} = (bf16[8,8], bf16[1000000,8]{{1,0}}) collective-permute-start(%x), source_target_pairs={pairs}"


def cost_of_two(first: str, second: str) -> costs.Cost:
    lines = (
        permutation("s1", first),
        permutation("s2", second),
        "%d1 = bf16[1000000,8]{1,0} collective-permute-done(%s1)",
        "ROOT %d2 = bf16[1000000,8]{1,0} collective-permute-done(%s2)",
    )
    return costs.read(program(X, *lines), V6E)


# Devices 0 and 1 are neighbours along the first axis, 0 and 2 along the second; 3 is next to both.
@pytest.mark.parametrize(
    ("second", "times", "hops"),
    [
        ("{{0,1},{1,0}}", 2, 1),  # the same links
        ("{{0,2},{2,0}}", 1, 1),
        ("{{2,3},{3,2}}", 1, 1),
        ("{{0,3},{3,0}}", 2, 2),  # the same first, then another
    ],
)
def test_permutations_that_pass_a_link_in_the_same_direction_follow_one_another(second, times, hops):
    assert cost_of_two("{{0,1},{1,0}}", second).cycles == pytest.approx(times * SENT + hops * HOP)


def test_the_two_directions_of_a_link_are_two_links():
    assert cost_of_two("{{0,1}}", "{{1,0}}").cycles == pytest.approx(SENT + HOP)


def test_transfers_of_one_permutation_share_the_links_that_they_all_pass():
    # Along a line of four: 0 to 4 and 2 to 6 are two hops each, the middle one of which both take.
    cost = costs.read(program(X, permutation("s", "{{0,4},{2,6}}"), DONE), V6E)
    assert cost.cycles == pytest.approx(2 * SENT + 2 * HOP)


@pytest.mark.parametrize(("devices", "hops"), [((0, 1, 2, 3, 4, 5, 6, 7), 2), ((0, 1, 3, 2, 4, 5, 6, 7), 1)])
def test_where_a_programs_devices_lie_is_what_its_mesh_says(devices, hops):
    cost = costs.read(program(X, permutation("s", "{{1,2}}"), DONE), V6E, devices=devices)
    assert cost.cycles == pytest.approx(SENT + hops * HOP)


def test_a_collective_waits_for_the_permutation_on_its_links():
    gather = "ROOT %g = bf16[1000000,8]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}"
    alone = costs.read(program(X, gather), V6E).cycles
    assert costs.read(program(X, permutation("s", "{{0,1}}"), gather), V6E).cycles == pytest.approx(alone + SENT)


def test_an_update_in_place_moves_its_part_through_hbm_and_back():
    stack, part, i = (
        "%w = bf16[40,1000,8]{2,1,0} parameter(1)",
        "%p = bf16[1,1000,8]{2,1,0} parameter(2)",
        "%i = s32[] parameter(3)",
    )
    line = "ROOT %u = bf16[40,1000,8]{2,1,0} dynamic-update-slice(%w, %p, %i, %i, %i)"
    cost = costs.read(program(X, stack, part, i, line), V6E)
    assert cost.by_category()["relayout"] == pytest.approx(2 * 16_000 / V6E.generation.hbm_bandwidth * CLOCK)
    on_chip = line.replace("{2,1,0} dynamic", "{2,1,0:S(1)} dynamic")
    assert costs.read(program(X, stack, part, i, on_chip), V6E).cycles == 0


def test_a_reshape_without_cycles_is_a_copy_through_hbm():
    cost = costs.read(program(X, "ROOT %r = bf16[1000000,8]{1,0} reshape(%x)"), V6E)
    assert cost.by_category()["relayout"] == pytest.approx(2 * 16_000_000 / V6E.generation.hbm_bandwidth * CLOCK)


def test_a_kernel_that_normalises_is_no_matmul():
    line = KERNEL.replace("splash_attention", "rms_norm_width_rotary").replace("splash.1", "norm.1")
    cost = costs.read(program(X, line), V6E, lambda kernel: 123)
    assert cost.by_category()["elementwise"] == 123


def test_an_all_to_all_within_squares_passes_more_links_than_along_a_line():
    square, line = (collective_seconds("all-to-all", 10**9, grid, V6E) for grid in ((2, 2), (4,)))
    assert line == pytest.approx(2 * square, rel=1e-2)


def test_an_all_reduce_takes_twice_an_all_gather():
    gather, reduce = (collective_seconds(kind, 10**9, (2, 4), V6E) for kind in ("all-gather", "all-reduce"))
    assert reduce == pytest.approx(2 * gather)


FRAMES = """
FileNames
1 "/env/diffusers/models/transformers/transformer_wan.py"
2 "/repo/comfyui_tpu/ops/attention.py"
3 "/env/torchax/tensor.py"

FunctionNames
1 "WanTransformerBlock.forward"
2 "_attend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=488}
2 {file_name_id=2 function_name_id=2 line=77}
3 {file_name_id=3 function_name_id=2 line=5}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

"""


@pytest.mark.parametrize(
    ("frame", "module"),
    [
        (2, "attention.py:77 in WanTransformerBlock.forward (transformer_wan.py:488)"),
        (3, "WanTransformerBlock.forward (transformer_wan.py:488)"),
        (9, "linear/dot_general"),
    ],
)
def test_an_operation_is_named_after_the_models_line_it_came_from(frame, module):
    metadata = f'metadata={{op_name="jit(f)/linear/dot_general" stack_frame_id={frame}}}'
    line = f"ROOT %m = bf16[8,8]{{1,0}} fusion(%x, %x), calls=%fused_matmul, {metadata}, {cycles(1)}"
    (operation,) = costs.read(program(X, line, before=FRAMES), V6E).operations
    assert operation.module == module
    assert operation.category == ("attention" if frame == 2 else "matmul")
