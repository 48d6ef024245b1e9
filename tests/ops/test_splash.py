"""The attention kernel in Pallas' interpreter, against float64 softmax attention (bounds: numerics.md)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from comfyui_tpu.ops.splash import splash_attention
from comfyui_tpu.ops.splash_blocks import TABLE, Blocks, fit, generation_of
from comfyui_tpu.ops.splash_softmax import RunningSoftmax

BOUND = {jnp.float32: 2e-3, jnp.bfloat16: 2e-2}
SMALL = Blocks(queries=256, keys=512, columns=128, slice=128, ahead=2, behind=1)
kernel = functools.partial(splash_attention, interpret=True)


def problem(queries, keys, heads=2, width=64, batch=1, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, queries, heads, width), *[(batch, keys, heads, width)] * 2)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def reference(query, key, value, scale=None):
    """softmax(scale·Q·Kᵀ)·V and log2 Σ exp2 of base-2 logits, in float64 on the host."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    lse = (largest + np.log(total))[..., 0] / np.log(2)
    return np.einsum("bhqk,bkhd->bqhd", weights / total, v), lse


def check(inputs, bound=None, **options):
    out = np.asarray(kernel(*inputs, **options), np.float64)
    expected, _ = reference(*inputs, scale=options.get("scale"))
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= (bound or BOUND[inputs[0].dtype.type])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 300), (129, 129), (1000, 77), (2049, 4095)], ids=str)
def test_ragged_lengths_are_exact(lengths, dtype):
    check(problem(*lengths, dtype=dtype, heads=1), device_kind="TPU v6 lite")


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_scales_are_exact(seed):
    rng = np.random.default_rng(seed)
    queries, keys = (int(n) for n in rng.integers(1, 1100, 2))
    heads, batch, width = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.choice([8, 40, 64, 80, 128, 160]))
    dtype = [jnp.float32, jnp.bfloat16][seed % 2]
    inputs = problem(queries, keys, heads, width, batch, dtype, seed)
    kind = ["TPU v6 lite", "TPU v4", "TPU7x", "a later one"][seed % 4]
    check(inputs, device_kind=kind, scale=float(rng.uniform(0.02, 0.3)))


def test_a_key_beyond_the_end_has_weight_zero():
    """All real logits far below those that zero keys would have: any leak would take all the weight."""
    q, k, v = problem(130, 300)
    q, k = jnp.abs(q), -jnp.abs(k) * 4
    check((q, k, v), blocks=SMALL)


def test_queries_beyond_the_end_do_not_decide_for_the_others(monkeypatch):
    """The interpreter fills what lies beyond the end with NaN; the last block must stay on the bounded path."""
    monkeypatch.setattr(RunningSoftmax, "_online", lambda *tile: None)
    check(problem(300, 300), blocks=SMALL)


ADVERSARIAL = {
    "huge norms": lambda q, k, v: (q * 1000, k * 30, v),
    "an attention sink": lambda q, k, v: (q, k.at[:, 0].set(40 * jnp.sign(q[:, 0])), v),
    "constant keys": lambda q, k, v: (q * 50, jnp.broadcast_to(k[:, :1] * 50, k.shape), v),
    "keys far from the origin": lambda q, k, v: (q, k + 300, v),
    "one dominant key": lambda q, k, v: (q, k.at[:, 17].multiply(200), v),
    "all logits very negative": lambda q, k, v: (jnp.abs(q) * 30, -jnp.abs(k) * 30, v),
    "all logits very positive": lambda q, k, v: (jnp.abs(q) * 30, jnp.abs(k) * 30, v),
    "just inside the bound": lambda q, k, v: (q * 6.0, k, v),
    "just outside the bound": lambda q, k, v: (q * 9.5, k, v),
    "logits beyond float32's exponents": lambda q, k, v: (q * 1e5, k * 1e5, v),
    "zeros": lambda q, k, v: (q * 0, k * 0, v),
    "large values": lambda q, k, v: (q * 6.0, k, v * 1e10),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_logits_are_exact(case):
    q, k, v = ADVERSARIAL[case](*problem(200, 700, width=64))
    # Float32 logits of 1e10 round to 1e3: a reference in more precision would differ by right. Ask for what is left.
    if case == "logits beyond float32's exponents":
        out = np.asarray(kernel(q, k, v, blocks=SMALL))
        assert np.isfinite(out).all()
        assert np.abs(out).max() <= float(jnp.abs(v).max()) * (1 + 1e-5)
        return
    largest_logit = float(jnp.abs(jnp.einsum("bqhd,bkhd->bhqk", q, k)).max()) * 64**-0.5
    check((q, k, v), bound=max(2e-3, 4e-7 * largest_logit) * float(jnp.abs(v).max()), blocks=SMALL)


@pytest.mark.parametrize(("factor", "bounded"), [(6.0, True), (9.5, False), (1000.0, False)])
def test_the_bounded_softmax_is_taken_where_it_is_safe_and_only_there(factor, bounded, monkeypatch):
    q, k, v = problem(256, 512, heads=1)
    taken = []
    for name in ("_bounded", "_online"):
        real = getattr(RunningSoftmax, name)

        def counted(*tile, real=real, name=name):
            jax.debug.callback(lambda: taken.append(name))
            real(*tile)

        monkeypatch.setattr(RunningSoftmax, name, counted)
    jax.block_until_ready(kernel(q * factor, k, v, blocks=SMALL))
    jax.effects_barrier()
    assert set(taken) == {"_bounded" if bounded else "_online"}


@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5, 1e6])
def test_a_large_mean_key_that_the_queries_hardly_see_is_exact(offset):
    """q·k̄ nearly cancels, but not once the scaled queries are rounded: the shift must follow the rounding."""
    q, k, v = problem(256, 512, heads=1)
    q = q.at[..., 1].set(-q[..., 0] * (1 + 2**-7))
    k = k.at[..., :2].set(offset)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    # The logits' common part is offset·(q₀ + q₁); what is left of it in a row is the same for every key.
    check((q, k, v), blocks=SMALL)


def test_each_block_of_queries_decides_for_itself():
    q, k, v = problem(512, 600)
    check((q.at[:, 300:].multiply(1000), k, v), blocks=SMALL, bound=5e-3)


def test_not_a_number_stays_in_its_row_and_head():
    q, k, v = problem(300, 300)
    out = np.asarray(kernel(q.at[0, 5, 1, 3].set(jnp.nan), k, v, blocks=SMALL))
    assert np.isnan(out[0, 5, 1]).all()
    assert np.isfinite(np.delete(out[0, :, 1], 5, axis=0)).all()
    assert np.isfinite(out[0, :, 0]).all()


@pytest.mark.parametrize("factor", [1, 1000], ids=["bounded", "online"])
def test_log_sum_exp_merges_parts_of_the_keys(factor):
    q, k, v = problem(150, 700, heads=1)
    q = q * factor
    _, lse = kernel(q, k, v, blocks=SMALL, return_lse=True)
    expected, expected_lse = reference(q, k, v)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-4)
    parts = [kernel(q, k[:, part], v[:, part], blocks=SMALL, return_lse=True) for part in (slice(99), slice(99, None))]
    shares = jax.nn.softmax(jnp.stack([part[1] for part in parts]) * np.log(2), axis=0).swapaxes(2, 3)[..., None]
    merged = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
    np.testing.assert_allclose(merged, expected, atol=2e-3)


def test_smoothing_the_keys_changes_nothing_that_float32_can_see():
    q, k, v = problem(150, 300)
    np.testing.assert_allclose(kernel(q, k + 5, v, smooth_keys=True), kernel(q, k, v), atol=2e-4)


def test_smoothing_helps_bfloat16_keys_with_a_large_mean():
    q, k, v = problem(150, 300)
    shifted = (k + 30).astype(jnp.bfloat16)
    expected, _ = reference(q.astype(jnp.bfloat16), shifted, v.astype(jnp.bfloat16))
    error = [
        np.abs(
            np.asarray(kernel(*(x.astype(jnp.bfloat16) for x in (q, shifted, v)), smooth_keys=on), np.float64)
            - expected
        )
        for on in (False, True)
    ]
    assert error[1].max() <= 2e-2


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 8, 2, 64), (1, 8, 3, 64), (1, 8, 3, 64)),
        ((1, 8, 2, 64), (1, 8, 2, 32), (1, 8, 2, 32)),
        ((1, 8, 2, 64), (1, 0, 2, 64), (1, 0, 2, 64)),
        ((2, 8, 64), (2, 8, 64), (2, 8, 64)),
    ],
    ids=["heads", "head_dim", "no keys", "three axes"],
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"expects query .* got"):
        kernel(*(jnp.zeros(shape) for shape in shapes))


def test_dtypes_that_do_not_fit_are_named():
    q, k, v = problem(8, 8)
    with pytest.raises(ValueError, match="float32, bfloat16 and float32"):
        kernel(q, k.astype(jnp.bfloat16), v)


@pytest.mark.parametrize("generation", [*TABLE, "v9"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1024, 512), (4608, 4608), (9450, 9450), (39826, 39826), (75600, 75600)], ids=str
)
def test_a_tile_wastes_little(generation, head_dim, lengths):
    blocks = fit(generation, *lengths, head_dim)
    for length, size, step in ((lengths[0], blocks.queries, 512), (lengths[1], blocks.keys, 512)):
        padded = -(-length // size) * size
        assert padded < max(length * 1.1, length + step)


def test_more_vector_memory_is_asked_for_where_there_is_more_and_sequences_are_long():
    asked = {name: fit(name, 75600, 75600, 128).vmem_mib for name in TABLE}
    assert asked == {"v4": None, "v5e": None, "v5p": None, "v6e": 56, "v7x": None}
    assert [fit("v6e", *lengths, 128).vmem_mib for lengths in ((9450, 9450), (75600, 512), (32760, 32760))] == [
        None,
        None,
        56,
    ]
    assert fit("v6e", 75600, 75600, 64).vmem_mib is None


def test_a_head_too_wide_for_the_kernel_is_refused():
    with pytest.raises(ValueError, match="up to 256; got 384"):
        fit("v6e", 1024, 1024, 384)


def test_tiles_that_the_kernel_cannot_cut_are_refused():
    with pytest.raises(ValueError, match="multiples of 128"):
        Blocks(queries=300, keys=512, columns=100, slice=512)


@pytest.mark.parametrize(
    ("kind", "generation"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("TPU v9", "v9"),
    ],
)
def test_device_kinds_are_known(kind, generation):
    assert generation_of(kind) == generation


@pytest.mark.parametrize("heads", [2, 3], ids=["2-heads", "3-heads"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("given", "real"), [(1100, 1024), (1120, 1030), (600, 513), (300, 300), (512, 40)], ids=str)
def test_keys_behind_the_real_ones_do_not_count(given, real, width, heads):
    """They would take all the weight: real logits lie far below theirs."""
    q, k, v = problem(130, given, heads, width)
    q, k = jnp.abs(q), -jnp.abs(k) * 4
    k, v = (x.at[:, real:].set(40) for x in (k, v))
    out = np.asarray(kernel(q, k, v, keys=real, blocks=SMALL), np.float64)
    expected, _ = reference(q, k[:, :real], v[:, :real])
    assert np.abs(out - expected).max() <= BOUND[jnp.float32]


@pytest.mark.parametrize("factor", [1, 1000], ids=["bounded", "online"])
@pytest.mark.parametrize("keys", [513, 528, 1000, 1023])
def test_keys_that_two_tiles_hold_count_once(keys, factor):
    """The last tile starts before the one before ends; the key there is far above all others, or each weighs alike."""
    q, k, v = problem(130, keys)
    check((q * factor, k, v), blocks=SMALL, bound=5e-3)
    check((q * factor, k.at[:, 511].multiply(20), v), blocks=SMALL, bound=5e-3)


def test_memory_behind_the_only_tile_may_hold_anything():
    """The interpreter fills it with NaN: neither logits nor values may let it in."""
    for keys in (1, 130, 500):
        check(problem(40, keys), blocks=SMALL)


def operations(jaxpr):
    """All equations of a program, those in functions it calls as well, but not those in kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from operations(inner)


def test_no_operand_is_copied_where_lengths_are_multiples_of_16():
    for width, heads in ((64, 2), (128, 3), (256, 1)):
        x = jax.ShapeDtypeStruct((2, 1040, heads, width), jnp.bfloat16)
        program = jax.make_jaxpr(functools.partial(kernel, blocks=SMALL))(x, x, x)
        found = list(operations(program.jaxpr))
        assert "pallas_call" in {equation.primitive.name for equation in found}
        copies = [e for e in found if e.primitive.name in ("pad", "transpose", "concatenate")]
        assert not [copy for copy in copies if copy.outvars[0].aval.size >= math.prod(x.shape)]


@pytest.mark.parametrize("keys", [0, 9])
def test_more_real_keys_than_there_are_or_none_are_refused(keys):
    with pytest.raises(ValueError, match=f"must be 1 to 8.*got {keys}"):
        kernel(*problem(8, 8), keys=keys)
