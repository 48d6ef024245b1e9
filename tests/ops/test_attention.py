"""Plain attention against torch's own operator, in one piece and in blocks of queries."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from comfyui_tpu.ops.attention import attention, attention_with_lse


def problem(batch=2, heads=3, queries=37, keys=53, width=16, seed=0):
    generator = np.random.default_rng(seed)
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width))
    return [generator.standard_normal(shape, dtype=np.float32) for shape in shapes]


def reference(q, k, v, mask=None, scale=None):
    q, k, v = (torch.from_numpy(x).double() for x in (q, k, v))
    mask = None if mask is None else torch.from_numpy(mask)
    mask = mask.double() if mask is not None and mask.dtype.is_floating_point else mask
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).numpy()


WHOLE, BLOCKS = 2**30, 4 * 6 * 53 * 5  # the second fits five query rows, which 37 is no multiple of


@pytest.mark.parametrize("budget", [WHOLE, BLOCKS, 1], ids=["whole", "blocks-of-5", "row-by-row"])
def test_ragged_lengths_are_exact(budget):
    q, k, v = problem()
    np.testing.assert_allclose(attention(q, k, v, logits_budget=budget), reference(q, k, v), atol=2e-6)


@pytest.mark.parametrize("budget", [WHOLE, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("shape", [(2, 3, 37, 53), (1, 1, 37, 53), (2, 1, 1, 53)], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_masks_of_every_broadcast_shape(shape, additive, budget):
    q, k, v = problem()
    allowed = np.random.default_rng(1).random(shape) < 0.7
    mask = np.where(allowed, 0, -1e4).astype(np.float32) if additive else allowed
    ours = attention(q, k, v, mask=jnp.asarray(mask), logits_budget=budget)
    np.testing.assert_allclose(ours, reference(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("budget", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_a_row_that_may_attend_to_nothing_gives_zeros_as_in_torch(budget):
    q, k, v = problem()
    allowed = np.tril(np.ones((37, 53), bool), 16)
    allowed[:, :20] = False  # padding in front: the first rows see nothing
    assert not allowed[3].any()
    ours = attention(q, k, v, mask=jnp.asarray(allowed[None, None]), logits_budget=budget)
    np.testing.assert_allclose(ours, reference(q, k, v, allowed[None, None]), atol=2e-6)
    assert not np.asarray(ours)[:, :, :4].any()


@pytest.mark.parametrize("budget", [WHOLE, BLOCKS, 1], ids=["whole", "blocks-of-5", "row-by-row"])
def test_the_logarithm_of_each_rows_sum_is_to_base_two(budget):
    q, k, v = problem()
    out, lse = attention_with_lse(q, k, v, scale=0.5, logits_budget=budget)
    logits = (q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3)) * 0.5
    np.testing.assert_allclose(lse, np.log2(np.exp(logits).sum(-1)), rtol=2e-6)
    np.testing.assert_allclose(out, reference(q, k, v, scale=0.5), atol=2e-6)
    assert (out.dtype, lse.dtype, lse.shape) == (jnp.float32, jnp.float32, (2, 3, 37))
    smooth = attention_with_lse(q, k, v, scale=0.5, smooth_keys=True, logits_budget=budget)
    means = (q * k.mean(2, keepdims=True)).sum(-1) * 0.5
    np.testing.assert_allclose(smooth[1], lse - means * np.log2(np.e), atol=1e-5)


def test_a_given_scale_replaces_the_default():
    q, k, v = problem()
    np.testing.assert_allclose(attention(q, k, v, scale=1.0), reference(q, k, v, scale=1.0), atol=2e-6)


def test_smoothing_keys_helps_bfloat16_when_keys_share_an_offset():
    q, k, v = problem(keys=256)
    k = k + 30.0  # an offset that carries no information and eats the mantissa
    exact = reference(q, k, v)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    errors = {flag: np.abs(np.asarray(attention(*low, smooth_keys=flag), np.float32) - exact).max() for flag in (0, 1)}
    full = np.abs(np.asarray(attention(q, k, v, smooth_keys=True)) - exact).max()
    assert full <= 2e-5
    assert errors[1] <= errors[0]


def test_huge_logits_do_not_overflow():
    q, k, v = problem()
    assert np.isfinite(np.asarray(attention(q * 1e4, k * 1e4, v))).all()


def test_shapes_that_do_not_belong_together_are_named():
    q, k, v = problem()
    with pytest.raises(ValueError, match=r"query \[B, H, Sq, D\].*got \(2, 3, 37, 8\)"):
        attention(q[..., :8], k, v)
