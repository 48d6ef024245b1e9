"""Attention over a mesh of virtual devices against float64 on one, and what the TPU compiler makes of it."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.ops import sharded_attention
from comfyui_tpu.ops.sharded_attention import attend, attend_jointly, local_attention, plain, ring_size
from comfyui_tpu.ops.splash import splash_attention
from comfyui_tpu.plan import hlo

BOUND = 2e-5  # numerics.md: of the largest value, float32


def mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("chips",))


def problem(heads, queries, keys, batch=1, width=16, seed=0):
    generator = np.random.default_rng([seed, heads, queries, keys])
    return [generator.standard_normal((batch, n, heads, width), dtype=np.float32) for n in (queries, keys, keys)]


def reference(q, k, v):
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def check(inputs, devices, bound=BOUND, **options):
    ours = jax.jit(functools.partial(attend, mesh=mesh(devices), **options))(*inputs)
    expected = reference(*inputs)
    assert ours.shape == expected.shape
    assert np.abs(np.asarray(ours) - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("heads", [1, 5, 6, 8, 12])
def test_any_number_of_heads_over_any_number_of_devices(heads, devices):
    check(problem(heads, 101, 101), devices)


@pytest.mark.parametrize("options", [{"ring_chips": 1}, {"ring_chips": 2}, {"strategy": "ring"}], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (7, 300), (64, 64), (129, 129)],
    ids=str,
)
def test_any_length_over_eight_devices(queries, keys, options):
    check(problem(5, queries, keys), 8, **options)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_batches_devices_and_rings(seed):
    draw = np.random.default_rng(seed)
    heads, queries, keys, batch, width = (int(n) for n in draw.integers(1, (14, 200, 200, 4, 70)))
    devices = int(draw.choice([2, 3, 4, 6, 8]))
    ring = int(draw.choice([n for n in (1, 2, 3, 4, 6, 8) if devices % n == 0]))
    check(problem(heads, queries, keys, batch, width), devices, ring_chips=ring, smooth_keys=bool(seed % 2))


@pytest.mark.parametrize(("queries", "keys"), [(129, 77), (1000, 3), (5, 4)], ids=str)
def test_short_contexts_stay_whole(queries, keys):
    check(problem(5, queries, keys), 8)


def test_short_contexts_that_are_whole_already_move_nothing():
    inputs = problem(5, 129, 77)
    text = jax.jit(functools.partial(attend, mesh=mesh(8))).lower(*inputs).compile().as_text()
    moved = set(re.findall(r"all-to-all|collective-permute|all-reduce|reduce-scatter", text))
    assert not moved


RINGS = pytest.mark.parametrize("ring", [1, 2, 4], ids=["exchange", "both", "ring"])  # of four devices


@RINGS
def test_a_padded_key_has_weight_zero_even_where_it_would_win(ring):
    q, k, v = problem(8, 57, 57, width=64)
    q, k = np.abs(q) + 1, -np.abs(k) - 1  # every real logit is below -10; a key of zeros would have 0
    assert np.einsum("bqhd,bkhd->bhqk", q, k).max() < -80
    check((q, k, v + 5), 4, ring_chips=ring)


@RINGS
@pytest.mark.parametrize("winner", [0, 56], ids=["first-key", "last-key"])
def test_one_dominant_key_on_one_device(ring, winner):
    q, k, v = problem(8, 57, 57)
    k[:, winner] = 12 * q.mean(1) + 3
    check((q, k, v), 4, ring_chips=ring)


@RINGS
def test_keys_that_are_all_the_same_average_the_values(ring):
    q, k, v = problem(8, 57, 57)
    check((q, np.broadcast_to(k[:, :1], k.shape) * 30, v), 4, ring_chips=ring)


@RINGS
def test_huge_logits_pick_the_largest_key_without_overflow(ring):
    """A float32 logarithm of 1e8 keeps no fraction, so the winner is checked and not the weights of a merge."""
    q, k, v = problem(8, 57, 57)
    index = np.arange(57)
    q, k = (np.eye(57, dtype=np.float32)[None, order, None] * 1e4 for order in (index, index[::-1]))
    q, k = (np.broadcast_to(x, (1, 57, 8, 57)) for x in (q, k))
    ours = jax.jit(functools.partial(attend, mesh=mesh(4), ring_chips=ring))(q, k, v)
    np.testing.assert_allclose(ours, v[:, index[::-1]], rtol=1e-6)


@RINGS
def test_smoothing_subtracts_the_same_mean_on_every_device(ring):
    """With a mean for each device, the shares of the parts would be wrong."""
    q, k, v = problem(8, 57, 57)
    check((q, k + 30, v), 4, ring_chips=ring, smooth_keys=True)


@RINGS
def test_the_kernels_partial_results_merge_as_well(ring):
    """In Pallas' interpreter; the bound is the kernel's own (numerics.md)."""
    kernel = functools.partial(splash_attention, interpret=True)
    check(problem(4, 299, 299, width=64), 4, bound=2e-3, ring_chips=ring, local=kernel, smooth_keys=True)


@pytest.mark.parametrize("tokens", [1, 9, 57, 64, 101])
@pytest.mark.parametrize("ring", [1, 2, 4, 8])
def test_a_local_attention_is_told_of_every_key_once_and_of_no_padding(tokens, ring):
    seen = []

    def spy(query, key, value, *, keys, **options):
        seen.append(keys)
        return plain(query, key, value, keys=keys, **options)

    inputs = problem(8, tokens, tokens)
    jax.eval_shape(functools.partial(attend, mesh=mesh(8), ring_chips=ring, local=spy), *inputs)
    assert sum(seen) == tokens


@pytest.mark.parametrize(
    ("heads", "devices", "ring"),
    [
        (40, 8, 1),
        (48, 8, 1),
        (12, 8, 2),
        (24, 8, 1),
        (5, 8, 8),
        (6, 4, 2),
        (1, 8, 8),
        (30, 8, 1),
        (14, 8, 4),
        (7, 1, 1),
    ],
)
def test_a_ring_is_used_where_zero_heads_would_waste_more(heads, devices, ring):
    assert ring_size(heads, devices) == ring


def test_two_guidance_halves_share_the_devices_as_twice_the_heads():
    """12 heads on 8 devices need a ring of two; 2 × 12 do not."""
    text = jax.jit(functools.partial(attend, mesh=mesh(8))).lower(*problem(12, 64, 64, batch=2)).compile().as_text()
    # All of them exchange heads, each with seven others, and nothing goes round.
    assert len(permutations(text)) == 4 * 7
    check(problem(12, 61, 61, batch=2), 8)


def permutations(text: str) -> list[tuple[tuple[int, int], ...]]:
    """Sources and targets of each permutation in a program."""
    instructions = itertools.chain(*hlo.parse(text).computations.values())
    return [i.pairs() for i in instructions if i.opcode.removesuffix("-start") == "collective-permute"]


def grid(branches: int, chips: int, order=("branch", "chips")) -> Mesh:
    devices = np.array(jax.devices()[: branches * chips])
    sizes = {"branch": branches, "chips": chips}
    return Mesh(devices.reshape([sizes[name] for name in order]), order)


@pytest.mark.parametrize("order", [("branch", "chips"), ("chips", "branch")], ids=str)
@pytest.mark.parametrize("options", [{"ring_chips": 1}, {"ring_chips": 2}, {"strategy": "ring"}], ids=str)
def test_a_batch_over_some_axes_is_attended_to_over_the_others(options, order):
    options = {"mesh": grid(2, 4, order), "batch_axes": ("branch",), "smooth_keys": True, **options}
    for queries, keys in ((101, 101), (129, 77)):
        inputs = problem(5, queries, keys, batch=2)
        ours = jax.jit(functools.partial(attend, **options))(*inputs)
        np.testing.assert_allclose(ours, reference(*inputs), atol=BOUND)


def test_guidance_halves_on_their_own_chips_exchange_nothing_with_each_other():
    inputs = problem(8, 64, 64, batch=2)
    halves = functools.partial(attend, mesh=grid(2, 4), batch_axes=("branch",))
    text = jax.jit(halves).lower(*inputs).compile().as_text()
    assert len(permutations(text)) == 4 * 3
    assert all(source // 4 == target // 4 for pairs in permutations(text) for source, target in pairs)
    assert not re.findall(r"all-to-all|all-gather|all-reduce|reduce-scatter", text)


@pytest.mark.parametrize(("heads", "devices"), [(20, 4), (12, 2), (7, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"smooth_keys": True}, {"ring_chips": 2}], ids=str)
def test_heads_in_groups_attend_as_all_at_once(heads, devices, options, monkeypatch):
    monkeypatch.setattr(sharded_attention, "GROUPED_MIN_TOKENS", 0)
    monkeypatch.setattr(sharded_attention, "LANES", 1)  # the tests' heads are small
    check(problem(heads, 101, 101), devices, **options)


def test_heads_are_grouped_where_there_is_time_to_send_them_and_lanes_are_whole():
    assert sharded_attention._groups(10, 75_600, 128) == [range(n, n + 2) for n in range(0, 10, 2)]
    assert sharded_attention._groups(5, 75_600, 128) == [range(2), range(2, 5)]
    assert sharded_attention._groups(3, 75_600, 128) == [range(3)]
    assert sharded_attention._groups(12, 39_826, 64) == [range(12)]
    assert sharded_attention._groups(10, 4_608, 128) == [range(10)]


@pytest.mark.parametrize("heads", [8, 5, 1])
@pytest.mark.parametrize(("queries", "keys"), [(101, 101), (129, 77)], ids=str)
def test_own_heads_attend_to_all_tokens_and_nothing_moves(heads, queries, keys):
    inputs = problem(heads, queries, keys, batch=2)
    mine = functools.partial(attend, strategy="own heads", mesh=grid(2, 4), batch_axes=("branch",))
    np.testing.assert_allclose(jax.jit(mine)(*inputs), reference(*inputs), atol=BOUND)
    check(inputs, 8, strategy="own heads")
    if heads == 8:
        split = NamedSharding(mesh(8), PartitionSpec(None, None, "chips", None))
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in inputs]
        run = jax.jit(functools.partial(attend, strategy="own heads", mesh=mesh(8)), out_shardings=split)
        text = run.lower(*placed).compile().as_text()
        assert not re.findall(r"all-to-all|all-gather|collective-permute|all-reduce|reduce-scatter", text)


@pytest.mark.parametrize(
    "options", [{"ring_chips": 1}, {"ring_chips": 2}, {"strategy": "ring"}, {"strategy": "own heads"}], ids=str
)
@pytest.mark.parametrize("real", [96, 61, 9, 1])
def test_tokens_behind_the_real_ones_do_not_count(real, options):
    """They would take all the weight."""
    q, k, v = problem(8, 96, 96)
    q, k = np.abs(q), -np.abs(k)
    k[:, real:], v[:, real:] = 40, 40
    ours = jax.jit(functools.partial(attend, mesh=mesh(8), keys=real, smooth_keys=True, **options))(q, k, v)
    expected = reference(q[:, :real], k[:, :real], v[:, :real])
    assert np.abs(np.asarray(ours)[:, :real] - expected).max() <= BOUND * np.abs(expected).max()


def test_batches_and_meshes_that_cannot_be_split_are_named():
    with pytest.raises(ValueError, match=r"divide the batch, 3; got \('branch',\)"):
        attend(*problem(8, 16, 16, batch=3), mesh=grid(2, 4), batch_axes=("branch",))
    with pytest.raises(ValueError, match=r"must be axes of the mesh.*got \('rows',\)"):
        attend(*problem(8, 16, 16, batch=2), mesh=grid(2, 4), batch_axes=("rows",))
    cut = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("x", "branch", "y"))
    with pytest.raises(ValueError, match="must be neighbours"):
        attend(*problem(8, 16, 16, batch=2), mesh=cut, batch_axes=("branch",))


def test_the_kernel_is_chosen_on_a_tpu_where_it_is_long_enough():
    choose = functools.partial(local_attention, head_dim=128, dtype=jnp.bfloat16)
    assert choose("tpu", 2048, 2048).func.__name__ == "splash_attention"
    assert choose("tpu", 9450, 512).func.__name__ == "splash_attention"
    assert choose("cpu", 75600, 75600) is plain
    assert choose("tpu", 2047, 2048) is plain
    assert choose("tpu", 75600, 255) is plain
    assert local_attention("tpu", 14400, 14400, 384, jnp.bfloat16) is plain
    assert local_attention("tpu", 14400, 14400, 64, jnp.float16) is plain


def test_fewer_key_heads_are_refused_and_not_filled_up():
    q, k, v = problem(8, 16, 16)
    with pytest.raises(ValueError, match=r"got \(1, 16, 8, 16\), \(1, 16, 6, 16\)"):
        attend(q, k[:, :, :6], v[:, :, :6], mesh=mesh(8))


def test_impossible_rings_are_named():
    with pytest.raises(ValueError, match="divide the number of devices, 8; got 3"):
        attend(*problem(8, 16, 16), mesh=mesh(8), ring_chips=3)
    with pytest.raises(ValueError, match="'heads', 'ring' or 'own heads'; got 'tokens'"):
        attend(*problem(8, 16, 16), mesh=mesh(8), strategy="tokens")


@functools.cache
def tpus() -> Mesh:
    """Eight chips of v6e; described, they are not there."""
    described = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4")
    return Mesh(np.array(described.devices), ("chips",))


MOVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter")
TOKENS = 2043  # 5 fewer than 8 × 256: tokens have to be padded without being moved


def collectives(heads: int, **options) -> tuple[int, list[tuple[str, int]]]:
    """How many kernels, and (opcode, bytes per device) of the collectives beside them, in a scanned layer for TPUs."""
    split = NamedSharding(tpus(), PartitionSpec(None, "chips", None, None))

    def local(q, k, v, **options):
        """The kernel at lengths too short to choose it for: they compile quickly."""
        kernel = functools.partial(splash_attention, device_kind=tpus().devices[0].device_kind)
        return (kernel if k.shape[1] >= 256 else plain)(q, k, v, **options)

    def layer(x, weights):
        x = jax.lax.with_sharding_constraint(x, split)
        out = attend(*(x @ weights[i] for i in range(3)), mesh=tpus(), local=local, **options)
        return jax.lax.with_sharding_constraint(out @ weights[3], split), None

    whole = NamedSharding(tpus(), PartitionSpec())
    x = jax.ShapeDtypeStruct((1, TOKENS, heads, 64), jnp.bfloat16, sharding=whole)
    weights = jax.ShapeDtypeStruct((2, 4, 64, 64), jnp.bfloat16, sharding=whole)
    module = hlo.parse(jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(x, weights).compile().as_text())
    kernels = lambda computation: sum(i.custom_call_target == "tpu_custom_call" for i in computation)  # noqa: E731
    (body,) = (computation for computation in module.computations.values() if kernels(computation))
    moved = [i for i in body if i.opcode.removesuffix("-start") in MOVES]
    return kernels(body), sorted((i.opcode.removesuffix("-start"), i.largest_array()) for i in moved)


def test_one_tpu_runs_the_kernel_itself():
    x = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(functools.partial(attend, mesh=Mesh(tpus().devices[:1], ("chips",))))(x, x, x))
    assert program.count("pallas_call") == 1
    assert "ppermute" not in program


def test_on_tpus_heads_are_exchanged_and_nothing_is_gathered():
    heads, shard = 8, 256 * 8 * 64 * 2
    assert collectives(heads) == (1, [("collective-permute", shard // 8)] * 4 * 7)


def test_on_tpus_keys_go_round_the_ring_and_only_what_the_last_group_lacks_is_gathered():
    heads, shard = 4, 256 * 4 * 64 * 2
    keys, rest = 1024 * 64 * 2, 2 * 5 * 64 * 2  # of the one head that a device has after the exchange
    exchanged = [("collective-permute", shard // 4)] * 4 * 3
    passed, gathered = [("collective-permute", keys)] * 2, rest
    assert collectives(heads) == (2, sorted([*exchanged, *passed, *[("all-gather", gathered)] * 2]))


@pytest.mark.parametrize("options", [{"ring_chips": n} for n in (1, 2, 4, 8)] + [{"strategy": "own heads"}], ids=str)
@pytest.mark.parametrize("tokens", [(96, 16), (101, 26), (97, 3), (16, 129), (33, 8, 30), (3, 2)], ids=str)
def test_parts_attend_to_each_other_as_if_they_were_joined(tokens, options):
    parts = [problem(8, n, n, batch=2, seed=n) for n in tokens]
    run = functools.partial(attend_jointly, mesh=mesh(8), smooth_keys=True, **options)
    ours = jax.jit(run)(parts)
    expected = reference(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))
    assert [x.shape[1] for x in ours] == list(tokens)
    assert np.abs(np.concatenate(ours, axis=1) - expected).max() <= BOUND * np.abs(expected).max()


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_parts_padding_is_never_a_key(ring):
    """Parts of 13 and 6 tokens over 4 devices: padded to 16 and 8, with keys that would win."""
    parts = [problem(8, n, n, width=64, seed=n) for n in (13, 6)]
    parts = [(np.abs(q) + 1, -np.abs(k) - 1, v + 5) for q, k, v in parts]
    ours = jax.jit(functools.partial(attend_jointly, mesh=mesh(4), ring_chips=ring))(parts)
    expected = reference(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))
    assert np.abs(np.concatenate(ours, axis=1) - expected).max() <= BOUND * np.abs(expected).max()


def test_parts_of_short_contexts_are_joined():
    parts = [problem(4, 40, 8, seed=1), problem(4, 9, 3, seed=2)]
    ours = attend_jointly(parts, mesh=mesh(4))
    expected = reference(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))
    assert np.abs(np.concatenate(ours, axis=1) - expected).max() <= BOUND * np.abs(expected).max()


def test_parts_of_different_heads_are_refused():
    with pytest.raises(ValueError, match="alike but for their tokens"):
        attend_jointly([problem(4, 8, 8), problem(5, 8, 8)], mesh=mesh(2))
