"""The two halves of a tensor-parallel pair of linear layers, tokens spread over the chips in between pairs.

Each chip keeps its part of the weights. The first layer's input is gathered (all tokens, to make this chip's features
of them), the second layer's partial sums are added up and scattered (all features, of this chip's tokens). Written with
``shard_map``: left to itself XLA's partitioner gathers the second layer's weight instead, which is far larger.

Where chips hold enough tokens the transfers run beside the products, shard by shard, in both directions of a ring of
the mesh's devices (each should be a neighbour of the next, see ``runtime.plan``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops.padding import pad_to_multiple

# With fewer tokens a shard, a product of one shard spends its time on reading the weights, once for every shard.
RING_MIN_TOKENS = 256


def linear(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``x · Wᵀ``: ``[..., C]`` and ``[N, C]`` → ``[..., N]``, in ``x``'s dtype unless another is given."""
    over = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, over, preferred_element_type=dtype or x.dtype)


def split_outputs(
    x: jax.Array, weights: Sequence[jax.Array], units: Sequence[int], *, mesh: Mesh
) -> list[list[jax.Array]]:
    """``x · Wᵀ`` for several weights split along their output features.

    Args:
        x: ``[B, S, C]``, tokens split over all devices of ``mesh``.
        weights: ``[N, C]`` each, split along ``N``; a device's rows are its part of each of ``units`` equal units.

    Returns:
        For each weight its units, ``[B, S, N / units]`` each, split along the last axis.
    """
    axes, tokens = mesh.axis_names, x.shape[1]

    def on_one_device(x, *parts):
        ring = _Ring(mesh) if x.shape[1] >= RING_MIN_TOKENS else None
        made = _round_the_ring(ring, x, parts) if ring else _all_at_once(axes, x, parts)
        return [jnp.split(y[:, :tokens], number, axis=-1) for y, number in zip(made, units, strict=True)]

    run = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axes), *[PartitionSpec(axes)] * len(weights)),
        out_specs=[[PartitionSpec(None, None, axes)] * number for number in units],
        check_vma=False,
    )
    return run(pad_to_multiple(x, 1, mesh.size), *weights)


def split_inputs(parts: Sequence[jax.Array], weight: jax.Array, *, mesh: Mesh) -> jax.Array:
    """``x · Wᵀ`` for a weight split along its input features, where ``x`` is ``parts`` side by side.

    Args:
        parts: ``[B, S, N]`` each, split along ``N``.
        weight: ``[C, sum of N]``, split along its last axis; a device's columns are its part of each of ``parts``.

    Returns:
        ``[B, S, C]``, tokens split over all devices of ``mesh``.
    """
    axes, tokens = mesh.axis_names, parts[0].shape[1]

    def on_one_device(weight, *parts):
        x = jnp.concatenate(parts, axis=-1)
        if x.shape[1] // mesh.size >= RING_MIN_TOKENS:
            return _summed_round_the_ring(_Ring(mesh), x, weight)
        return _summed_at_once(axes, linear(x, weight))

    run = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axes), *[PartitionSpec(None, None, axes)] * len(parts)),
        out_specs=PartitionSpec(None, axes),
        check_vma=False,
    )
    return run(weight, *(pad_to_multiple(part, 1, mesh.size) for part in parts))[:, :tokens]


class _Ring:
    """Seen from one device: its number in the ring, and what it hands to its neighbours."""

    def __init__(self, mesh: Mesh):
        self.axes, self.size = mesh.axis_names, mesh.size
        self.here = jax.lax.axis_index(self.axes)

    def passed(self, x: jax.Array, by: int) -> jax.Array:
        """Every device's ``x`` handed to the device ``by`` further on (1 or -1)."""
        pairs = [(device, (device + by) % self.size) for device in range(self.size)]
        return jax.lax.ppermute(x, self.axes, pairs)


def _all_at_once(axes: tuple[str, ...], x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    x = jax.lax.all_gather(x, axes, axis=1, tiled=True)
    return [linear(x, weight) for weight in weights]


def _round_the_ring(ring: _Ring, x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """Products of all shards of tokens: while one is multiplied the next arrives, from both sides."""
    size = x.shape[1]
    made = [jax.lax.empty((x.shape[0], ring.size * size, weight.shape[0]), x.dtype) for weight in weights]

    def multiplied(made, shard, owner):
        start = jax.lax.rem(owner + ring.size, ring.size) * size
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return [put(y, linear(shard, weight)) for y, weight in zip(made, weights, strict=True)]

    before, after = x, x  # of the device so far back in the ring, and so far on
    for step in range(ring.size // 2 + 1):
        last = 2 * step + 2 > ring.size
        following = (before, after) if last else (ring.passed(before, 1), ring.passed(after, -1))
        made = multiplied(made, before, ring.here - step)
        if 0 < step < ring.size - step:
            made = multiplied(made, after, ring.here + step)
        before, after = following
    return made


def _summed_at_once(axes: tuple[str, ...], partial: jax.Array) -> jax.Array:
    # Tokens in front: of a leading axis of one XLA makes an all-reduce instead, with twice the traffic.
    flat = jnp.swapaxes(partial, 0, 1).reshape(partial.shape[1], -1)
    mine = jax.lax.psum_scatter(flat, axes, scatter_dimension=0, tiled=True)
    return jnp.swapaxes(mine.reshape(-1, partial.shape[0], partial.shape[2]), 0, 1)


def _summed_round_the_ring(ring: _Ring, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Each shard's sum travels to its device and takes up every device's share on the way.

    Half of the features travel in each direction. Sums are rounded before they travel, which halves the bytes.
    """
    size = x.shape[1] // ring.size

    def share(half: jax.Array, owner) -> jax.Array:
        start = jax.lax.rem(owner + 2 * ring.size, ring.size) * size
        return linear(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), half, jnp.float32)

    halves, ways = jnp.array_split(weight, 2), (1, -1)
    sums: list[jax.Array | None] = [None, None]
    for step in range(ring.size):
        for at, (half, by) in enumerate(zip(halves, ways, strict=True)):
            # What starts here now arrives, so many steps on, at its owner.
            mine = share(half, ring.here + by * (ring.size - 1 - step))
            if step:
                mine += ring.passed(sums[at], by).astype(jnp.float32)
            sums[at] = mine.astype(x.dtype)
    return jnp.concatenate(sums, axis=-1)
