"""Exact full attention over a mesh: all-to-all over heads, a ring over keys, or both; gathered keys for short contexts.

Written with ``shard_map``, so that the program of each device is explicit and a Pallas kernel, which XLA cannot
partition, can stand in it. Lengths that do not divide are padded for the ``shard_map`` alone: no padded key reaches a
local attention, because every cut below has a length that is known while tracing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops.attention import attention, attention_with_lse, check_shapes

Strategy = Literal["heads", "ring"]
LocalAttention = Callable[..., "jax.Array | tuple[jax.Array, jax.Array]"]

# Below so many logits a head XLA's own attention wins, which then stays in vector memory: by the compiler's estimates
# for v6e and v5e (docs/attention.md), the kernel wins from here on with all that is done around it.
KERNEL_MIN_LOGITS = 2**22
# A tile has no fewer keys; with less, most of it would be padding.
KERNEL_MIN_KEYS = 256
KERNEL_MAX_HEAD_DIM = 128

# What each further step round a ring costs, as a share of the attention itself: statistics of its keys, its partial
# result in HBM, the merge. A ring is worth it where zero heads would waste more.
RING_STEP_OVERHEAD = 0.03  # compiler estimate: 75,600 tokens, 5 heads of 128 round 8 chips of v6e


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mesh: Mesh,
    strategy: Strategy = "heads",
    ring_chips: int | None = None,
    scale: float | None = None,
    smooth_keys: bool = False,
    local: LocalAttention | None = None,
) -> jax.Array:
    """softmax(scale · Q·Kᵀ)·V, its work spread over all devices of ``mesh``, token axes split along them in order.

    Contexts shorter than the queries (cross-attention) stay whole on every device and the queries are split; otherwise
    heads are exchanged for tokens, and keys go round a ring where heads are too few.

    Args:
        query: ``[B, H, Sq, D]``.
        key: ``[B, H, Sk, D]``.
        value: ``[B, H, Sk, Dv]``.
        mesh: devices in the order in which they hold tokens; may be of any shape, and may be only described.
        strategy: ``"heads"``: a ring of as few devices as waste least (:func:`ring_size`), unless ``ring_chips`` says
            how many; ``"ring"``: of all.
        ring_chips: over how many devices keys go round; must divide the number of devices.
        scale: factor on the logits; ``1/sqrt(D)`` when None.
        smooth_keys: subtract the mean key first (see :func:`~comfyui_tpu.ops.attention.attention`).
        local: what computes on one device, with the signature of :func:`plain`; None chooses by platform and lengths.

    Returns:
        ``[B, H, Sq, Dv]`` in the query's dtype, tokens split over the devices.

    Raises:
        ValueError: shapes do not belong together, ``ring_chips`` does not divide the number of devices, or the strategy
            is unknown.
    """
    check_shapes(query, key, value)
    local = local or functools.partial(_attend_locally, mesh.devices.flat[0])
    local = functools.partial(local, scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    # A batch is more heads: two CFG halves of 12 heads divide by 8 together.
    folded = [x.reshape(1, -1, *x.shape[2:]) for x in (query, key, value)]
    if mesh.size == 1 or key.shape[2] < query.shape[2]:
        out = _with_whole_keys(*folded, mesh, functools.partial(local, smooth_keys=smooth_keys))
    else:
        ring = _ring_chips(strategy, ring_chips, folded[0].shape[1], mesh.size)
        out = _with_exchange(*folded, mesh, ring, local, smooth_keys)
    return out.reshape(*query.shape[:3], value.shape[3])


def ring_size(problems: int, devices: int) -> int:
    """Over how many of ``devices`` keys should go round, for ``problems`` (batch × heads): the least waste.

    The other ``devices / ring`` exchange heads, filled up with zero heads to a multiple of their number.
    """

    def work(ring: int) -> float:
        exchange = devices // ring
        return math.ceil(problems / exchange) * exchange / problems * (1 + RING_STEP_OVERHEAD * (ring - 1))

    return min((ring for ring in range(1, devices + 1) if devices % ring == 0), key=work)


def _ring_chips(strategy: str, ring_chips: int | None, problems: int, devices: int) -> int:
    if strategy not in ("heads", "ring"):
        raise ValueError(f"strategy must be 'heads' or 'ring'; got {strategy!r}")
    if strategy == "ring":
        return devices
    chosen = ring_size(problems, devices) if ring_chips is None else ring_chips
    if chosen < 1 or devices % chosen:
        raise ValueError(f"ring_chips must divide the number of devices, {devices}; got {chosen}")
    return chosen


def local_attention(
    platform: str, queries: int, keys: int, head_dim: int, dtype: jnp.dtype, device_kind: str | None = None
) -> LocalAttention:
    """What computes attention fastest on one device of ``platform``, for these lengths: the kernel, or plain JAX.

    ``device_kind`` is JAX's name of the device, which the kernel's tile sizes depend on.
    """
    long_enough = queries * keys >= KERNEL_MIN_LOGITS and keys >= KERNEL_MIN_KEYS
    floats = dtype in (jnp.bfloat16, jnp.float32)
    if platform != "tpu" or not long_enough or head_dim > KERNEL_MAX_HEAD_DIM or not floats:
        return plain
    from comfyui_tpu.ops.splash import splash_attention

    return functools.partial(splash_attention, device_kind=device_kind)


def plain(query, key, value, *, scale=None, smooth_keys=False, return_lse=False):
    """Plain JAX with the kernel's signature: ``[B, H, Sq, D]``, and with ``return_lse`` also ``[B, H, Sq]`` float32.

    The latter is log2 of each row's sum of exp2 of base-2 logits: what merges results of different keys.
    """
    function = attention_with_lse if return_lse else attention
    return function(query, key, value, scale=scale, smooth_keys=smooth_keys)


def _attend_locally(device: jax.Device, query, key, value, **options):
    lengths = (query.shape[2], key.shape[2], query.shape[3])
    chosen = local_attention(device.platform, *lengths, query.dtype, device.device_kind)
    if value.shape != key.shape:
        chosen = plain
    return chosen(query, key, value, **options)


def _with_whole_keys(query, key, value, mesh, local):
    """Queries split by tokens, keys and values whole on every device: nothing moves if they are there already."""
    tokens, whole = _split_tokens(mesh.axis_names), PartitionSpec()
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, whole, whole), out_specs=tokens, check_vma=False)
    return run(_pad_tokens(query, mesh.size), key, value)[:, :, : query.shape[2]]


def _with_exchange(query, key, value, mesh, ring, local, smooth_keys):
    """Heads exchanged for tokens within groups of neighbours, keys passed round the ``ring`` groups."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    # The same devices in the same order, so that tokens lie where the caller's mesh has them.
    grouped = Mesh(mesh.devices.reshape(ring, -1), ("ring", "heads"))
    exchange = grouped.shape["heads"]

    def on_one_device(*shards):
        q, k, v = (_tokens_for_heads(x, exchange) for x in shards)
        if ring == 1:
            out = local(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], smooth_keys=smooth_keys)
            out = _pad(out, 2, q.shape[2] - queries)
        else:
            k = _minus_mean(k, keys) if smooth_keys else k
            out = _round_the_ring(q, k, v, keys, ring, functools.partial(local, return_lse=True))
        return _heads_for_tokens(out, exchange)[:, :heads]

    tokens = _split_tokens(grouped.axis_names)
    run = jax.shard_map(on_one_device, mesh=grouped, in_specs=(tokens,) * 3, out_specs=tokens, check_vma=False)
    return run(*(_pad_tokens(x, mesh.size) for x in (query, key, value)))[:, :, :queries]


def _split_tokens(axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(None, None, axes, None)


def _pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    return _pad(x, 2, -x.shape[2] % multiple)


def _pad(x: jax.Array, axis: int, amount: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths) if amount else x


def _minus_mean(key, keys):
    """One mean of all ``keys`` round the ring, or parts could not be merged; their padding is zeros and adds none."""
    total = jax.lax.psum(jnp.sum(key, axis=2, keepdims=True, dtype=jnp.float32), "ring")
    return (key - total / keys).astype(key.dtype)


def _tokens_for_heads(x, exchange):
    """All heads of one shard of tokens → some heads of the group's tokens; zero heads fill up what does not divide.

    What is exchanged is the leading axis, in both directions: XLA then copies the array once, on the side where heads
    have to come before the devices.
    """
    if exchange == 1:
        return x
    x = _pad(x, 1, -x.shape[1] % exchange)
    shards = _exchange(x.reshape(exchange, -1, *x.shape[2:]))
    return jnp.swapaxes(shards, 0, 1).reshape(1, shards.shape[1], -1, shards.shape[3])


def _heads_for_tokens(x, exchange):
    """The way back, zero heads still at the end."""
    if exchange == 1:
        return x
    heads = _exchange(jnp.swapaxes(x.reshape(x.shape[1], exchange, -1, x.shape[3]), 0, 1))
    return heads.reshape(1, -1, *heads.shape[2:])


def _exchange(x):
    return jax.lax.all_to_all(x, "heads", split_axis=0, concat_axis=0, tiled=True)


def _round_the_ring(query, key, value, keys, ring, local):
    """Attend to each group's keys in turn and merge; ``keys`` in all, of which the last groups hold fewer.

    Every group takes part with as many keys as the last one has, so that one length, known while tracing, fits all
    without masks or branches. The few that the others have more (fewer than there are devices, for each) are gathered
    and attended to once. Where the last group has none, that is all there is to do: everything is gathered.
    """
    common = max(0, keys - (ring - 1) * key.shape[2])
    partials = []
    if rest := keys - ring * common:
        gather = lambda x: jax.lax.all_gather(x[:, :, common:], "ring", axis=2, tiled=True)[:, :, :rest]  # noqa: E731
        partials.append(local(query, gather(key), gather(value)))
    shard = (key[:, :, :common], value[:, :, :common])
    for step in range(ring if common else 0):
        # Sent on before it is used, so that the transfer runs beside the computation; and not sent on further before
        # that is done, or XLA moves all transfers to the front and keeps every shard.
        following = jax.lax.ppermute(shard, "ring", _neighbours(ring)) if step < ring - 1 else ()
        partial, shard = jax.lax.optimization_barrier((local(query, *shard), following))
        partials.append(partial)
    return _merge(partials).astype(query.dtype)


def _neighbours(ring: int) -> list[tuple[int, int]]:
    return [(device, (device + 1) % ring) for device in range(ring)]


def _merge(partials) -> jax.Array:
    """Attention to all keys from ``(out, lse)`` for parts of them: each weighted with its share of the softmax sum."""
    largest = functools.reduce(jnp.maximum, (lse for _, lse in partials))
    weights = [jnp.exp2(lse - largest)[..., None] for _, lse in partials]
    total = functools.reduce(jnp.add, weights)
    return functools.reduce(jnp.add, (weight / total * out for weight, (out, _) in zip(weights, partials, strict=True)))
