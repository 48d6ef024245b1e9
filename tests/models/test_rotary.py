"""Rotation of pairs, against Diffusers' own."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from comfyui_tpu.models.rotary import rotate_pairs
from comfyui_tpu.runtime import bridge


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 17, 64, generator=generator).to(dtype)
    angles = torch.randn(17, 32, generator=generator).repeat_interleave(2, dim=-1)
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_turn_as_in_diffusers(dtype):
    x, cosines, sines = problem(dtype)
    rotated = rotate_pairs(x, cosines, sines)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, apply_rotary_emb(x, (cosines, sines)), rtol=0, atol=0)


def test_no_angle_changes_nothing():
    x, cosines, sines = problem(torch.bfloat16)
    assert torch.equal(rotate_pairs(x, torch.ones_like(cosines), torch.zeros_like(sines)), x)


def test_bfloat16_pairs_turn_in_a_trace_too():
    x, cosines, sines = problem(torch.bfloat16)
    with bridge.environment() as env:
        traced = rotate_pairs(*env.to_xla((x, cosines, sines)))
    assert torch.equal(bridge.to_torch(traced.jax()), rotate_pairs(x, cosines, sines))
