"""Exact full attention over a mesh: heads exchanged for tokens, a ring over keys, or both; short contexts stay whole.

Written with ``shard_map``, so that the program of each device is explicit and a Pallas kernel, which XLA cannot
partition, can stand in it. Arrays are token-major, ``[B, S, H, D]``: a projection's output as it is, of which the
exchange takes lanes and puts tokens behind tokens. Lengths that do not divide are padded for the ``shard_map`` alone:
a local attention is told how many of its keys are real, which is known while tracing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops.attention import attention, attention_with_lse, check_real_keys
from comfyui_tpu.ops.padding import pad_to_multiple
from comfyui_tpu.ops.row_kernels import LANES
from comfyui_tpu.ops.splash_softmax import PACKED_ROWS

Strategy = Literal["heads", "ring", "own heads"]
LocalAttention = Callable[..., "jax.Array | tuple[jax.Array, jax.Array]"]

# Below so many logits a head XLA's own attention wins, which then stays in vector memory: by the compiler's estimates
# for v6e and v5e (docs/attention.md), the kernel wins from here on with all that is done around it.
KERNEL_MIN_LOGITS = 2**22
# A tile has no fewer keys; with less, most of it would be padding.
KERNEL_MIN_KEYS = 256
KERNEL_MAX_HEAD_DIM = 128

# Heads that a device attends to in one call, where it has enough of them and enough tokens: meanwhile those before them
# travel home and the next ones arrive. By the compiler's estimates for v6e, 75,600 tokens and 10 heads of 128: with
# five calls of two heads 0.1 ms of transfers are waited for in a layer, with one call of ten 1.2 ms.
GROUPED_HEADS = 2
GROUPED_MIN_TOKENS = 2**14

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
    batch_axes: tuple[str, ...] = (),
    keys: int | None = None,
    scale: float | None = None,
    smooth_keys: bool = False,
    local: LocalAttention | None = None,
) -> jax.Array:
    """softmax(scale · Q·Kᵀ)·V, its work spread over all devices of ``mesh``, token axes split along them in order.

    Contexts shorter than the queries (cross-attention) stay whole on every device and the queries are split; otherwise
    heads are exchanged for tokens, and keys go round a ring where heads are too few.

    Args:
        query: ``[B, Sq, H, D]``.
        key: ``[B, Sk, H, D]``.
        value: ``[B, Sk, H, Dv]``.
        mesh: devices in the order in which they hold tokens; may be of any shape, and may be only described.
        strategy: ``"heads"``: a ring of as few devices as waste least (:func:`ring_size`), unless ``ring_chips`` says
            how many; ``"ring"``: of all; ``"own heads"``: heads are split over the devices already, each of which
            has all tokens of its own (tensor parallelism), and nothing moves.
        ring_chips: with ``"heads"``, over how many devices keys go round; must divide the number of devices.
        batch_axes: axes of ``mesh`` that the batch is split over (guidance halves); all of the above is about the
            devices of the other axes, which must be neighbours in ``mesh``.
        keys: how many keys are real; those behind them are padding, which may hold any finite numbers. All when None.
        scale: factor on the logits; ``1/sqrt(D)`` when None.
        smooth_keys: subtract the mean key first (see :func:`~comfyui_tpu.ops.attention.attention`).
        local: what computes on one device, with the signature of :func:`plain`; None chooses by platform and lengths.

    Returns:
        ``[B, Sq, H, Dv]`` in the query's dtype, split over the devices as the query is: tokens, or with ``"own heads"``
        heads.

    Raises:
        ValueError: shapes do not belong together, ``ring_chips`` does not divide the number of devices, the strategy
            is unknown, or the batch or the mesh cannot be split along ``batch_axes``.
    """
    options = {"strategy": strategy, "ring_chips": ring_chips, "batch_axes": batch_axes, "keys": keys, "scale": scale}
    parts = [(query, key, value)]
    (out,) = attend_jointly(parts, mesh=mesh, smooth_keys=smooth_keys, local=local, **options)
    return out


def attend_jointly(
    parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    *,
    mesh: Mesh,
    strategy: Strategy = "heads",
    ring_chips: int | None = None,
    batch_axes: tuple[str, ...] = (),
    keys: int | None = None,
    scale: float | None = None,
    smooth_keys: bool = False,
    local: LocalAttention | None = None,
) -> list[jax.Array]:
    """:func:`attend` for tokens that lie in several arrays, a video's and its text's: all attend to all.

    Were they joined before, their tokens would have to be spread over the devices anew, and once more after.

    Args:
        parts: query, key and value of each, alike but for their numbers of tokens.
        keys: how many keys are real of those of all parts, one part behind the other.

    Returns:
        For each part what :func:`attend` returns.
    """
    for part in parts:
        _check(*part)
    if len({(*(x.shape[:1] + x.shape[2:] for x in part),) for part in parts}) != 1:
        raise ValueError(f"expected parts alike but for their tokens; got {[[x.shape for x in p] for p in parts]}")
    total = sum(key.shape[1] for _, key, _ in parts)
    check_real_keys(keys, total)
    keys = total if keys is None else keys
    query = parts[0][0]
    devices = _Devices.of(mesh, batch_axes, query.shape[0])
    local = local or functools.partial(_attend_locally, mesh.devices.flat[0])
    local = functools.partial(local, scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    ring = _ring_chips(strategy, ring_chips, query.shape[0] // devices.batch * query.shape[2], devices.others)
    exchanges = strategy != "own heads" and devices.others > 1 and total >= sum(q.shape[1] for q, _, _ in parts)
    if exchanges and (len(parts) == 1 or _padded_at_the_end(parts, devices.others, ring)):
        return _with_exchange(parts, devices.in_rings(ring), keys, local, smooth_keys)
    cuts = list(itertools.accumulate(q.shape[1] for q, _, _ in parts[:-1]))
    query, key, value = (_joined(each) for each in zip(*parts, strict=True))
    if exchanges:
        (out,) = _with_exchange([(query, key, value)], devices.in_rings(ring), keys, local, smooth_keys)
    else:
        whole = functools.partial(local, keys=keys, smooth_keys=smooth_keys)
        run = _with_own_heads if strategy == "own heads" else _with_whole_keys
        out = run(query, key, value, devices, whole)
    return jnp.split(out, cuts, axis=1) if cuts else [out]


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _padded_at_the_end(parts: Sequence[tuple[jax.Array, ...]], devices: int, ring: int) -> bool:
    """Whether no group of the ring but the last has padding, with each part's tokens spread over all devices."""
    return all(
        -tokens % devices <= -(-tokens // devices) * (devices // ring)
        for tokens in (x.shape[1] for part in parts for x in part)
    )


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    agree = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
    if not (agree and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])):
        raise ValueError(
            "attend expects query [B, Sq, H, D], key [B, Sk, H, D] and value [B, Sk, H, Dv]; "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )


@dataclass(frozen=True)
class _Devices:
    """A mesh, by what is split over its axes: the batch, and whatever a strategy splits over the ``other`` ones."""

    mesh: Mesh
    batch_axes: tuple[str, ...]

    @staticmethod
    def of(mesh: Mesh, batch_axes: tuple[str, ...], batch: int) -> _Devices:
        devices = _Devices(mesh, tuple(batch_axes))
        if set(batch_axes) - set(mesh.axis_names) or (batch_axes and batch % devices.batch):
            raise ValueError(
                f"batch_axes must be axes of the mesh, {dict(mesh.shape)}, whose sizes divide the batch, {batch}; "
                f"got {batch_axes}"
            )
        return devices

    @property
    def other_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.batch_axes)

    @property
    def batch(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def others(self) -> int:
        return self.mesh.size // self.batch

    def spec(self, axis: int | None = None) -> PartitionSpec:
        """The batch split, and ``axis`` split over the other devices."""
        rest = [self.other_axes if each == axis else None for each in (1, 2, 3)]
        return PartitionSpec(self.batch_axes or None, *rest)

    def in_rings(self, ring: int) -> _Devices:
        """The same devices in the same order, so that tokens lie where the caller's mesh has them: ``ring`` groups of
        neighbours, mesh axes ``"ring"`` and ``"heads"`` in place of the other axes."""
        names = self.mesh.axis_names
        first = next((at for at, name in enumerate(names) if name not in self.batch_axes), len(names))
        behind = names[first + len(self.other_axes) :]
        if set(names[:first] + behind) != set(self.batch_axes):
            raise ValueError(
                f"the axes of the mesh, {dict(self.mesh.shape)}, that are not batch_axes must be neighbours; "
                f"got {self.batch_axes}"
            )
        # Names of their own: the caller's may be any.
        before, after = ([f"batch {name}" for name in part] for part in (names[:first], behind))
        sizes = [self.mesh.shape[name] for name in names]
        sizes = [*sizes[:first], ring, self.others // ring, *sizes[len(names) - len(behind) :]]
        grouped = Mesh(self.mesh.devices.reshape(sizes), (*before, "ring", "heads", *after))
        return _Devices(grouped, tuple(f"batch {name}" for name in self.batch_axes))


def ring_size(problems: int, devices: int) -> int:
    """Over how many of ``devices`` keys should go round, for ``problems`` (batch × heads): the least waste.

    The other ``devices / ring`` exchange heads, filled up with zero heads to a multiple of their number.
    """

    def work(ring: int) -> float:
        exchange = devices // ring
        return math.ceil(problems / exchange) * exchange / problems * (1 + RING_STEP_OVERHEAD * (ring - 1))

    return min((ring for ring in range(1, devices + 1) if devices % ring == 0), key=work)


def _ring_chips(strategy: str, ring_chips: int | None, problems: int, devices: int) -> int:
    if strategy not in ("heads", "ring", "own heads"):
        raise ValueError(f"strategy must be 'heads', 'ring' or 'own heads'; got {strategy!r}")
    if strategy != "heads":
        return devices if strategy == "ring" else 1
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


def plain(query, key, value, *, keys=None, scale=None, smooth_keys=False, return_lse=False):
    """Plain JAX with the kernel's signature: ``[B, Sq, H, D]``, and with ``return_lse`` also ``[B, H, Sq]`` float32.

    The latter is log2 of each row's sum of exp2 of base-2 logits: what merges results of different keys.
    """
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key[:, :keys], value[:, :keys]))
    if not return_lse:
        return jnp.swapaxes(attention(query, key, value, scale=scale, smooth_keys=smooth_keys), 1, 2)
    out, lse = attention_with_lse(query, key, value, scale=scale, smooth_keys=smooth_keys)
    return jnp.swapaxes(out, 1, 2), lse


def _attend_locally(device: jax.Device, query, key, value, *, keys, **options):
    chosen = local_attention(device.platform, query.shape[1], keys, query.shape[3], query.dtype, device.device_kind)
    if value.shape != key.shape:
        chosen = plain
    return chosen(query, key, value, keys=keys, **options)


def _with_own_heads(query, key, value, devices, local):
    """Heads split over the devices, filled up with zero heads where they do not divide: nothing moves."""
    heads, split = query.shape[2], devices.spec(axis=2)
    run = jax.shard_map(local, mesh=devices.mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    return run(*(pad_to_multiple(x, 2, devices.others) for x in (query, key, value)))[:, :, :heads]


def _with_whole_keys(query, key, value, devices, local):
    """Queries split by tokens, keys and values whole on every device: nothing moves if they are there already."""
    tokens, whole = devices.spec(axis=1), devices.spec()
    run = jax.shard_map(local, mesh=devices.mesh, in_specs=(tokens, whole, whole), out_specs=tokens, check_vma=False)
    return run(pad_to_multiple(query, 1, devices.others), key, value)[:, : query.shape[1]]


def _with_exchange(parts, devices, keys, local, smooth_keys):
    """Heads exchanged for tokens within groups of neighbours, keys passed round the ``ring`` groups.

    In its group each part follows the one before it, over whose padding it is written: only the end is padded.
    """
    ring, exchange = devices.mesh.shape["ring"], devices.mesh.shape["heads"]
    lengths = [[x.shape[1] for x in each] for each in zip(*parts, strict=True)]

    def on_one_device(*parts):
        batch, _, heads, _ = parts[0][0].shape
        shards = [
            [pad_to_multiple(_batch_into_heads(x), 2, exchange) for x in each] for each in zip(*parts, strict=True)
        ]
        starts = [_starts(real, each, ring, exchange) for real, each in zip(lengths, shards, strict=True)]
        spare = [sum(-length % devices.others for length in each[:-1]) for each in lengths]
        own, sizes = shards[0][0].shape[2] // exchange, [each[0].shape[3] for each in shards]
        if exchange == 1 and len(parts) == 1:
            return [_batch_from_heads(attended(*(each[0] for each in shards)), batch, heads)]
        shards = [[x.reshape(x.shape[1], -1) for x in each] for each in shards]
        outs = [jax.lax.empty((len(q), v.shape[1]), q.dtype) for q, v in zip(shards[0], shards[2], strict=True)]
        # Keys and values that fill no whole number of packed rows are copied by the kernel: 0.1 s a step of Wan 14B at
        # 75,348 tokens, by the same estimates. Not round a ring, where those of the next device follow.
        multiples = [1, PACKED_ROWS, PACKED_ROWS] if ring == 1 else [1, 1, 1]
        for some in _groups(own, sum(map(len, shards[0])) * exchange, math.gcd(*sizes)):
            lanes = [range(some.start * size, some.stop * size) for size in sizes]
            each = zip(shards, starts, lanes, spare, multiples, strict=True)
            arrived = [_tokens_for_lanes(x, start, exchange, *rest) for x, start, *rest in each]
            if len(some) < own:
                # Nothing of the next heads is sent before these have arrived, or these would arrive later.
                arrived, shards = jax.lax.optimization_barrier((arrived, shards))
            made = attended(*(x.reshape(1, len(x), -1, size) for x, size in zip(arrived, sizes, strict=True)))
            made = made.reshape(made.shape[1], -1)
            outs = [
                _lanes_for_tokens(made, start, exchange, lanes[2], out)
                for start, out in zip(starts[0], outs, strict=True)
            ]
        return [_batch_from_heads(out.reshape(1, len(out), -1, sizes[2]), batch, heads) for out in outs]

    def attended(q, k, v):
        if ring == 1:
            return local(q, k, v, keys=keys, smooth_keys=smooth_keys)
        k = _minus_mean(k, keys) if smooth_keys else k
        return _round_the_ring(q, k, v, keys, ring, functools.partial(local, return_lse=True))

    tokens = devices.spec(axis=1)
    padded = [tuple(pad_to_multiple(x, 1, devices.others) for x in part) for part in parts]
    run = jax.shard_map(on_one_device, mesh=devices.mesh, in_specs=tokens, out_specs=tokens, check_vma=False)
    return [out[:, :length] for out, length in zip(run(*padded), lengths[0], strict=True)]


def _starts(lengths, shards, ring, exchange):
    """Where each part begins among a group's tokens: behind the real ones of those before it, of ``lengths`` in all."""
    starts = [0]
    for length, shard in itertools.islice(zip(lengths, shards, strict=True), len(shards) - 1):
        tokens = exchange * shard.shape[1]
        real = min(length, tokens) if ring == 1 else jnp.minimum(length - jax.lax.axis_index("ring") * tokens, tokens)
        starts.append(starts[-1] + real)
    return starts


def _batch_into_heads(x):
    """A batch is more heads: two guidance halves of 12 heads divide by 8 together. ``[B, S, H, D]`` → ``[1, S, …]``."""
    return jnp.moveaxis(x, 0, 1).reshape(1, x.shape[1], -1, x.shape[3])


def _batch_from_heads(x, batch, heads):
    """The way back; zero heads at the end are cut off."""
    x = x[0, :, : batch * heads]
    return jnp.moveaxis(x.reshape(x.shape[0], batch, heads, x.shape[2]), 1, 0)


def _minus_mean(key, keys):
    """One mean of all ``keys`` round the ring, or parts could not be merged; what is behind them does not count."""
    shard = jax.lax.axis_index("ring") * key.shape[1]
    real = shard + jnp.arange(key.shape[1]) < keys
    total = jnp.sum(key, axis=1, keepdims=True, dtype=jnp.float32, where=real[None, :, None, None])
    return (key - jax.lax.psum(total, "ring") / keys).astype(key.dtype)


def _groups(heads: int, tokens: int, head_dim: int) -> list[range]:
    """Heads of one device in groups that are attended to one after the other, so that transfers run beside it.

    Not where heads share lanes, which would be cut apart.
    """
    if tokens < GROUPED_MIN_TOKENS or head_dim % LANES:
        return [range(heads)]
    count = max(1, heads // GROUPED_HEADS)
    starts = [heads * number // count for number in range(count + 1)]
    return [range(*ends) for ends in itertools.pairwise(starts)]


def _tokens_for_lanes(parts, starts, exchange, lanes, spare, multiple):
    """One device's tokens, ``[S, lanes of all heads]`` in each part → the group's, ``lanes`` of those of this device.

    Zeros fill the ``spare`` rows that parts leave which begin before the end of another, and up to a ``multiple``.
    """
    own, rows = parts[0].shape[1] // exchange, sum(exchange * len(part) for part in parts)
    rest = -rows % multiple
    out = jax.lax.empty((rows + rest, len(lanes)), parts[0].dtype)
    if rest + spare:
        zeros = jnp.zeros((rest + spare, len(lanes)), out.dtype)
        out = jax.lax.dynamic_update_slice_in_dim(out, zeros, rows - spare, axis=0)
    for part, start in zip(parts, starts, strict=True):
        # The case of a negative start, which JAX provides for, would hide from XLA that these begin at whole tiles.
        # (Where results are put, saying so costs more than it saves: XLA then no longer sends beside the attention.)
        cut = lambda device, x=part: jax.lax.dynamic_slice_in_dim(  # noqa: E731
            x, device * own + lanes.start, len(lanes), axis=1, allow_negative_indices=False
        )
        put = lambda out, x, device, row=start: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            out, x, row + device * len(x), axis=0
        )
        out = _exchanged(exchange, cut, put, out)
    return out


def _lanes_for_tokens(x, start, exchange, lanes, out):
    """The way back for one part, into ``out`` ``[S, lanes of all heads]``."""
    tokens, own = len(out), out.shape[1] // exchange
    cut = lambda device: jax.lax.dynamic_slice_in_dim(x, start + device * tokens, tokens, axis=0)  # noqa: E731
    put = lambda out, part, device: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
        out, part, device * own + lanes.start, axis=1
    )
    return _exchanged(exchange, cut, put, out)


def _exchanged(devices, cut, put, out):
    """What an all-to-all does, one permutation for each distance within the group.

    Each takes its part out of the array and puts it where it belongs. XLA runs permutations beside the computation,
    which it does not do with an all-to-all; and an all-to-all wants its parts along an axis of their own, which lanes
    have to be copied for.

    Args:
        cut: device → the part for it.
        put: array, part, device that it came from → the array with that part.
        out: the array to fill.
    """
    here = jax.lax.axis_index("heads")
    for distance in range(devices):
        part = cut(jax.lax.rem(here + distance, devices))
        if distance:
            part = jax.lax.ppermute(part, "heads", [(i, (i + distance) % devices) for i in range(devices)])
        out = put(out, part, jax.lax.rem(here + devices - distance, devices))
    return out


def _round_the_ring(query, key, value, keys, ring, local):
    """Attend to each group's keys in turn and merge; ``keys`` in all, of which the last groups hold fewer.

    Every group takes part with as many keys as the last one has, so that one length, known while tracing, fits all
    without masks or branches. The few that the others have more (fewer than there are devices, for each) are gathered
    and attended to once. Where the last group has none, that is all there is to do: everything is gathered.
    """
    common = max(0, keys - (ring - 1) * key.shape[1])
    partials = []
    if rest := keys - ring * common:
        gather = lambda x: jax.lax.all_gather(x[:, common:], "ring", axis=1, tiled=True)  # noqa: E731
        partials.append(local(query, gather(key), gather(value), keys=rest))
    shard = (key, value)
    for step in range(ring if common else 0):
        # Sent on before it is used, so that the transfer runs beside the computation; and not sent on further before
        # that is done, or XLA moves all transfers to the front and keeps every shard.
        following = jax.lax.ppermute(shard, "ring", _neighbours(ring)) if step < ring - 1 else ()
        partial, shard = jax.lax.optimization_barrier((local(query, *shard, keys=common), following))
        partials.append(partial)
    return _merge(partials).astype(query.dtype)


def _neighbours(ring: int) -> list[tuple[int, int]]:
    return [(device, (device + 1) % ring) for device in range(ring)]


def _merge(partials) -> jax.Array:
    """Attention to all keys from ``(out, lse)`` for parts of them: each weighted with its share of the softmax sum."""
    largest = functools.reduce(jnp.maximum, (lse for _, lse in partials))
    weights = [jnp.swapaxes(jnp.exp2(lse - largest), 1, 2)[..., None] for _, lse in partials]
    total = functools.reduce(jnp.add, weights)
    return functools.reduce(jnp.add, (weight / total * out for weight, (out, _) in zip(weights, partials, strict=True)))
