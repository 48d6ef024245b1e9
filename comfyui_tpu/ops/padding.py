"""Zeros behind an axis; nothing at all where none are missing."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pad(x: jax.Array, axis: int, amount: int) -> jax.Array:
    """``x`` with ``amount`` zeros behind ``axis``."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths) if amount else x


def pad_to_multiple(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    return pad(x, axis, -x.shape[axis] % multiple)
