"""The reader of HLO text, on lines as the TPU compiler writes them."""

import pytest

from comfyui_tpu.plan import hlo

MODULE = """HloModule jit_function, is_scheduled=true, num_partitions=8

FileNames
1 "/env/site-packages/diffusers/models/transformers/transformer_wan.py"
2 "/repo/comfyui_tpu/ops/attention.py"

FunctionNames
1 "WanTransformerBlock.forward"
2 "_attend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=488 end_line=488 column=30 end_column=30}
2 {file_name_id=2 function_name_id=2 line=77 end_line=77 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(40)
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%p)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%x)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(function)/while" stack_frame_id=2}
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def instruction(line: str) -> hlo.Instruction:
    found = hlo.parse_instruction(line)
    assert found is not None
    return found


def test_an_instruction_has_its_name_opcode_operands_and_cycles():
    found = instruction(
        "  ROOT %fusion.7 = (f32[5,256]{1,0:T(8,128)S(1)}, bf16[5,256,128]{2,1,0:T(8,128)(2,1)}) fusion(%a.1, %b), "
        'kind=kOutput, calls=%fused.2, backend_config={"window_config":{"estimated_cycles":"136276"}}'
    )
    assert (found.name, found.opcode, found.operands) == ("fusion.7", "fusion", ("a.1", "b"))
    assert found.root
    assert found.estimated_cycles == 136276
    assert found.called("calls") == ("fused.2",)


def test_bytes_count_every_array_of_a_tuple_and_can_leave_out_vector_memory():
    found = instruction("  %f = (f32[5,256]{1,0:T(8,128)S(1)}, bf16[5,256,128]{2,1,0}, pred[8]{0}) fusion(%a)")
    assert found.bytes() == 5 * 256 * 4 + 5 * 256 * 128 * 2 + 8
    assert found.bytes(hbm_only=True) == 5 * 256 * 128 * 2 + 8
    assert found.largest_array() == 5 * 256 * 128 * 2


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_a_collectives_groups_are_read_in_every_notation(groups, first):
    assert instruction(f"  %g = bf16[8]{{0}} all-gather(%x), {groups}, dimensions={{0}}").group(8) == first


def test_a_line_that_is_no_instruction_is_none():
    assert hlo.parse_instruction("}") is None
    assert hlo.parse_instruction("FileNames") is None


def test_a_loops_length_is_the_constant_its_counter_is_compared_with():
    module = hlo.parse(MODULE)
    loop = next(i for i in module.computations["main"] if i.opcode == "while")
    assert module.trip_count(loop) == 40
    assert loop.called("body") == ("body",)


def test_a_loops_length_is_unknown_when_it_is_compared_with_no_constant():
    module = hlo.parse(MODULE.replace("constant(40)", "parameter(1)"))
    loop = next(i for i in module.computations["main"] if i.opcode == "while")
    assert module.trip_count(loop) is None


def test_an_instruction_knows_the_lines_it_came_from_innermost_first():
    module = hlo.parse(MODULE)
    loop = next(i for i in module.computations["main"] if i.opcode == "while")
    assert [(file.rsplit("/", 1)[-1], function, line) for file, function, line in module.source(loop)] == [
        ("attention.py", "_attend", 77),
        ("transformer_wan.py", "WanTransformerBlock.forward", 488),
    ]


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing here")
