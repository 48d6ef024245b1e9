"""Both branches of guidance in one call: the second call finds its own result waiting, and nobody else's."""

import torch

from comfyui_tpu.models.guidance import Branches

PROMPT, NEGATIVE = torch.ones(1, 4, 2), torch.zeros(1, 4, 2)
LATENTS, TIME = torch.zeros(1, 3), torch.tensor([5])


def kept():
    branches = Branches(NEGATIVE)
    first = branches.keep(LATENTS, TIME, torch.tensor([[1.0], [2.0]]))
    assert first.tolist() == [[1.0]]
    return branches


def test_the_second_call_of_a_step_gets_the_second_result_once():
    branches = kept()
    assert branches.waiting(LATENTS, TIME, NEGATIVE).tolist() == [[2.0]]
    assert branches.waiting(LATENTS, TIME, NEGATIVE) is None


def test_a_call_with_other_latents_time_or_text_gets_nothing():
    assert kept().waiting(LATENTS.clone(), TIME, NEGATIVE) is None
    assert kept().waiting(LATENTS, TIME + 1, NEGATIVE) is None
    assert kept().waiting(LATENTS, TIME, PROMPT) is None


def test_texts_are_joined_in_the_callers_dtype_and_only_where_their_shapes_agree():
    joined = Branches(NEGATIVE).joined(PROMPT.bfloat16())
    assert joined.dtype == torch.bfloat16
    assert torch.equal(joined, torch.cat([PROMPT, NEGATIVE]).bfloat16())
    assert Branches(NEGATIVE).joined(torch.ones(2, 4, 2)) is None
