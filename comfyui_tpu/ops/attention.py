"""Exact scaled dot-product attention in plain JAX.

The logits of a video (75,600 tokens) do not fit in any memory, so long queries are processed in blocks: each block sees
all keys, hence every row's softmax is the ordinary one and no running statistics are needed.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Bytes of float32 logits that one block may occupy on a device. Larger blocks feed the matrix unit better; this
# keeps a block far below the smallest HBM (16 GiB on v5e) beside the model's weights.
LOGITS_BUDGET_BYTES = 512 * 2**20


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
    smooth_keys: bool = False,
    logits_budget: int = LOGITS_BUDGET_BYTES,
) -> jax.Array:
    """softmax(scale · Q·Kᵀ + mask)·V with float32 logits, softmax and accumulation.

    Args:
        query: ``[B, H, Sq, D]``.
        key: ``[B, H, Sk, D]``.
        value: ``[B, H, Sk, Dv]``.
        mask: broadcastable to ``[B, H, Sq, Sk]``; boolean (True = attend; a row without any gives zeros) or
            additive.
        scale: factor on the logits; ``1/sqrt(D)`` when None.
        smooth_keys: subtract the mean key first. Every logit of a row moves by the same amount, which a softmax
            ignores, so the result is the same in exact arithmetic and kinder to low precision.
        logits_budget: bytes of float32 logits per device above which queries are processed in blocks.

    Returns:
        ``[B, H, Sq, Dv]`` in the query's dtype.
    """
    check_shapes(query, key, value)
    key = smoothed(key) if smooth_keys else key
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    block = _query_block(query.shape, key.shape[2], logits_budget)
    if block >= query.shape[2]:
        return _attend(query, key, value, mask, scale)
    return _attend_in_blocks(query, key, value, mask, scale, block)


def attention_with_lse(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    smooth_keys: bool = False,
    logits_budget: int = LOGITS_BUDGET_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """:func:`attention` without a mask, and what is needed to merge it with attention to other keys.

    Returns:
        ``[B, H, Sq, Dv]`` in the query's dtype, and ``[B, H, Sq]`` float32: log2 of each row's sum of exp2 of its
        base-2 logits (logit · log2 e), of the smoothed keys if they are smoothed.
    """
    check_shapes(query, key, value)
    key = smoothed(key) if smooth_keys else key
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    block = _query_block(query.shape, key.shape[2], logits_budget)
    if block >= query.shape[2]:
        return _attend_with_lse(query, key, value, scale)
    stacked = _query_blocks(query, block)
    out, lse = jax.lax.map(lambda q: _attend_with_lse(q, key, value, scale), stacked)
    return _join_blocks(out, query.shape[2]), _join_blocks(lse, query.shape[2])


def check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raise ValueError with all three shapes unless they belong together."""
    agree = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
    if not (agree and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]):
        raise ValueError(
            "attention expects query [B, H, Sq, D], key [B, H, Sk, D] and value [B, H, Sk, Dv]; "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )


def smoothed(key: jax.Array) -> jax.Array:
    """Keys ``[B, H, S, D]`` without their mean key, which moves every logit of a row by the same amount."""
    return (key - jnp.mean(key, axis=2, keepdims=True, dtype=jnp.float32)).astype(key.dtype)


def _query_block(query_shape: tuple[int, ...], keys: int, budget: int) -> int:
    """How many query rows fit the logits budget: a multiple of 128 (a lane row) where possible, at least 1."""
    batch, heads, rows, _ = query_shape
    fitting = max(1, budget // (4 * batch * heads * keys))
    if fitting >= rows:
        return rows
    return fitting // 128 * 128 or fitting


def _attend(query, key, value, mask, scale):
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        # A finite lowest value, not -inf: a row that is masked whole then has no NaN.
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(mask, logits, lowest) if mask.dtype == jnp.bool_ else logits + mask
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None and mask.dtype == jnp.bool_:
        # As in torch: a row that may attend to nothing (the padding before a prompt) gives zeros, not an average.
        weights = jnp.where(mask, weights, 0)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype)


def _attend_with_lse(query, key, value, scale):
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / total).astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    lse = largest * math.log2(math.e) + jnp.log2(total)
    return out.astype(query.dtype), lse[..., 0]


def _query_blocks(query, block):
    """``[B, H, S, D]`` → ``[blocks, B, H, block, D]``; only queries are padded, :func:`_join_blocks` cuts them off."""
    batch, heads, rows, width = query.shape
    blocks = math.ceil(rows / block)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, blocks * block - rows), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, heads, blocks, block, width), 2, 0)


def _join_blocks(blocks, rows):
    """``[blocks, B, H, block, ...]`` → ``[B, H, rows, ...]``."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])[:, :, :rows]


def _attend_in_blocks(query, key, value, mask, scale, block):
    rows = query.shape[2]
    stacked = _query_blocks(query, block)
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        out = jax.lax.map(lambda q: _attend(q, key, value, mask, scale), stacked)
    else:
        blocks = stacked.shape[0]
        mask_padding = [(0, 0)] * (mask.ndim - 2) + [(0, blocks * block - rows), (0, 0)]
        row_blocks = jnp.pad(mask, mask_padding).reshape(*mask.shape[:-2], blocks, block, mask.shape[-1])
        row_blocks = jnp.moveaxis(row_blocks, -3, 0)
        out = jax.lax.map(lambda qm: _attend(qm[0], key, value, qm[1], scale), (stacked, row_blocks))
    return _join_blocks(out, rows)


def check_real_keys(keys: int | None, given: int) -> None:
    """ValueError unless ``keys`` of the ``given`` ones can be real and the rest padding; None: all are real."""
    if keys is not None and not 0 < keys <= given:
        raise ValueError(f"keys, how many are real, must be 1 to {given}, which are given; got {keys}")
