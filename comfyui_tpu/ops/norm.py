"""Normalisation with float32 statistics, whatever the dtype of the activations.

torch computes the statistics of bfloat16 norms in float32 internally; a plain trace would compute them in bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, axes: int, weight: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """``(x - mean) / sqrt(var + eps) · weight + bias`` over the last ``axes`` axes; result in ``x.dtype``.

    Mean and variance are taken about a centred value (two passes that XLA fuses), so a large common offset in ``x``
    does not cancel away the variance.
    """
    over = tuple(range(-axes, 0))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=over, keepdims=True)
    out = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=over, keepdims=True) + eps)
    return _affine(out, weight, bias).astype(x.dtype)


def group_norm(x: jax.Array, groups: int, weight: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """Each of ``groups`` groups of channels of ``x`` ``[B, C, *space]`` normalised over itself and all of space."""
    channels, space = x.shape[1], (1,) * (x.ndim - 2)
    # Space keeps its axes, so that a picture spread over chips by rows and columns stays so.
    wide = x.astype(jnp.float32).reshape(x.shape[0], groups, channels // groups, *x.shape[2:])
    over = tuple(range(2, wide.ndim))
    centred = wide - jnp.mean(wide, axis=over, keepdims=True)
    out = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=over, keepdims=True) + eps)
    weight, bias = (None if t is None else t.reshape(1, channels, *space) for t in (weight, bias))
    return _affine(out.reshape(x.shape), weight, bias).astype(x.dtype)


def rms_norm(x: jax.Array, axes: int, weight: jax.Array | None, eps: float | None) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last ``axes`` axes; ``eps`` defaults to the dtype's epsilon."""
    over = tuple(range(-axes, 0))
    wide = x.astype(jnp.float32)
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    out = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=over, keepdims=True) + eps)
    return _affine(out, weight, None).astype(x.dtype)


def _affine(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if weight is not None:
        x = x * weight.astype(jnp.float32)
    return x if bias is None else x + bias.astype(jnp.float32)
