"""One pass over rows: kernels in Pallas' interpreter and their plain twins against float64 (bounds: numerics.md)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.ops.rows import layer_norm_modulate, layer_norm_rotary, rms_norm_rotary
from comfyui_tpu.plan import hardware
from comfyui_tpu.plan.hardware import describe_devices

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
KERNELS = pytest.mark.parametrize("interpret", [True, False], ids=["kernel", "plain"])
EPS = 1e-6


def rounding(dtype) -> float:
    """Of the largest value: numerics.md for float32; half a unit in the last place of each of two for bfloat16."""
    return 2e-5 if dtype == jnp.float32 else 2**-7


def problem(shape, dtype=jnp.float32, seed=0):
    """Rows with a mean of their own and very different sizes, and a weight and bias for them."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-2, 2, (*shape[:2], 1))) + rng.uniform(-2, 2, (*shape[:2], 1))
    return jnp.asarray(x, dtype), rng


def close(ours, expected, bound):
    ours = np.asarray(ours, np.float64)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()


def reference_layer_norm(x, weight=None, bias=None, scale=None, shift=None):
    wide = [None if t is None else np.asarray(t, np.float64) for t in (x, weight, bias, scale, shift)]
    x, weight, bias, scale, shift = wide
    out = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
    out = out * (1 if weight is None else weight) + (0 if bias is None else bias)
    return out * (1 + (0 if scale is None else scale)) + (0 if shift is None else shift)


def reference_rotary(x, weight, bias, cosines, sines, heads, over):
    """As defined, the rounding between norm and rotation included."""
    dtype, (batch, tokens, width) = x.dtype, x.shape
    shape = (batch, tokens, heads, width // heads)
    wide, axes = np.asarray(x, np.float64).reshape(shape), (-2, -1) if over == "width" else -1
    if bias is not None:
        wide = wide - wide.mean(axes, keepdims=True)
    wide = wide / np.sqrt(np.square(wide).mean(axes, keepdims=True) + EPS)
    wide = wide * np.asarray(weight, np.float64).reshape(-1, shape[3])
    wide = wide if bias is None else wide + np.asarray(bias, np.float64)
    if cosines is not None:
        wide = np.asarray(jnp.asarray(wide, dtype), np.float64)
        pairs = wide.reshape(*shape[:3], -1, 2)
        turns = np.asarray(cosines, np.float64) + 1j * np.asarray(sines, np.float64)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turns[:, None, ::2]
        wide = np.stack([turned.real, turned.imag], -1)
    return wide.reshape(x.shape)


def angles(rng, tokens, head_dim):
    of_pairs = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2)).repeat(2, axis=1)
    return jnp.asarray(np.cos(of_pairs), jnp.float32), jnp.asarray(np.sin(of_pairs), jnp.float32)


@KERNELS
@DTYPES
@pytest.mark.parametrize("affine", [True, False], ids=["affine", ""])
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", ""])
def test_layer_norm_and_modulation(modulated, affine, dtype, interpret):
    x, rng = problem((2, 77, 384), dtype)
    draw = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    given = {"weight": draw(384), "bias": draw(384)} if affine else {}
    given |= {"scale": draw(2, 1, 384, dtype=dtype), "shift": draw(2, 1, 384)} if modulated else {}
    ours = layer_norm_modulate(x, **given, eps=EPS, interpret=interpret)
    assert ours.dtype == dtype
    close(ours, reference_layer_norm(x, **given), rounding(dtype))


@KERNELS
def test_the_result_has_the_dtype_asked_for_and_no_rounding_of_another(interpret):
    x, _ = problem((1, 40, 256), jnp.bfloat16)
    wide = layer_norm_modulate(x, eps=EPS, out_dtype=jnp.float32, interpret=interpret)
    close(wide, reference_layer_norm(x), 2e-5)
    narrow = layer_norm_modulate(x.astype(jnp.float32), eps=EPS, out_dtype=jnp.bfloat16, interpret=interpret)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@KERNELS
def test_a_large_offset_does_not_cancel_the_variance(interpret):
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (1, 8, 1024)), jnp.float32)
    norm = functools.partial(layer_norm_modulate, eps=EPS, interpret=interpret)
    np.testing.assert_allclose(norm(x + 2**11), norm(x), atol=1e-5)


@KERNELS
def test_bfloat16_statistics_are_float32(interpret):
    """Many equal values: a bfloat16 sum would stop growing at 256 and be far off."""
    x = jnp.full((1, 1, 2048), 3.0, jnp.bfloat16)
    ours = rms_norm_rotary(x, jnp.ones(2048), eps=0.0, heads=16, over="width", interpret=interpret)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), 1.0)


@KERNELS
@DTYPES
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", ""])
@pytest.mark.parametrize(
    ("heads", "head_dim", "over"),
    [(5, 128, "width"), (6, 64, "width"), (4, 32, "head"), (6, 64, "head"), (3, 128, "head"), (2, 256, "head")],
)
def test_rms_norm_and_rotation(heads, head_dim, over, rotated, dtype, interpret):
    x, rng = problem((2, 71, heads * head_dim), dtype)
    weight = jnp.asarray(rng.uniform(0.5, 2, heads * head_dim if over == "width" else head_dim), dtype)
    tables = angles(rng, 71, head_dim) if rotated else (None, None)
    given = dict(zip(("cosines", "sines"), tables, strict=True))
    ours = rms_norm_rotary(x, weight, **given, eps=EPS, heads=heads, over=over, interpret=interpret)
    assert ours.dtype == dtype
    close(ours, reference_rotary(x, weight, None, *tables, heads, over), rounding(dtype))


@KERNELS
@DTYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (3, 128)])
def test_layer_norm_of_heads_and_rotation(heads, head_dim, dtype, interpret):
    x, rng = problem((1, 71, heads * head_dim), dtype)
    weight, bias = jnp.asarray(rng.uniform(0.5, 2, (2, head_dim)), jnp.float32)
    tables = angles(rng, 71, head_dim)
    ours = layer_norm_rotary(
        x,
        weight,
        bias,
        **dict(zip(("cosines", "sines"), tables, strict=True)),
        eps=EPS,
        heads=heads,
        interpret=interpret,
    )
    close(ours, reference_rotary(x, weight, bias, *tables, heads, "head"), rounding(dtype))


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 255, 300, 1100])
def test_any_number_of_rows(tokens):
    x, rng = problem((1, tokens, 128))
    close(layer_norm_modulate(x, eps=EPS, interpret=True), reference_layer_norm(x), 2e-5)
    weight, tables = jnp.ones(128), angles(rng, tokens, 64)
    ours = rms_norm_rotary(
        x, weight, cosines=tables[0], sines=tables[1], eps=EPS, heads=2, over="width", interpret=True
    )
    close(ours, reference_rotary(x, weight, None, *tables, 2, "width"), 2e-5)


def test_rows_beyond_the_end_do_not_matter_to_others():
    """The interpreter fills what lies beyond the end with NaN."""
    x, _ = problem((2, 65, 128))
    assert not np.isnan(layer_norm_modulate(x, eps=EPS, interpret=True)).any()
    assert not np.isnan(layer_norm_rotary(x, jnp.ones(64), eps=EPS, heads=2, interpret=True)).any()


SPECS = [
    PartitionSpec(None, "tokens"),
    PartitionSpec("halves", "tokens"),
    PartitionSpec(None, ("halves", "tokens")),
    PartitionSpec("halves"),
    PartitionSpec(),
]


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("halves", "tokens"))


@pytest.mark.parametrize("tokens", [64, 37], ids=["even", "uneven"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_over_eight_devices_as_on_one(spec, tokens):
    x, rng = problem((2, tokens, 256), jnp.bfloat16)
    scale, shift = (jnp.asarray(rng.standard_normal((2, 1, 256)), jnp.float32) for _ in range(2))
    cosines, sines = angles(rng, tokens, 64)
    weight = jnp.asarray(rng.uniform(0.5, 2, 64), jnp.float32)

    def both(x, **places):
        modulated = layer_norm_modulate(x, scale=scale, shift=shift, eps=EPS, interpret=True, **places)
        tables = {"cosines": cosines, "sines": sines}
        return modulated, rms_norm_rotary(x, weight, **tables, eps=EPS, heads=4, over="head", interpret=True, **places)

    ours = jax.jit(functools.partial(both, mesh=mesh(), spec=spec))(x)
    for split, whole in zip(ours, jax.jit(both)(x), strict=True):
        np.testing.assert_array_equal(split, whole)


def test_each_device_works_on_its_own_rows_and_nothing_moves():
    place = NamedSharding(mesh(), PartitionSpec("halves", "tokens"))
    x = jax.ShapeDtypeStruct((2, 64, 256), jnp.bfloat16, sharding=place)
    run = functools.partial(layer_norm_modulate, eps=EPS, mesh=mesh(), spec=place.spec, interpret=True)
    compiled = jax.jit(run).lower(x).compile()
    assert compiled.output_shardings.is_equivalent_to(place, 3)
    assert not {"all-gather", "all-to-all", "all-reduce", "collective-permute"} & set(
        re.findall(r"[a-z\-]+(?=\()", compiled.as_text())
    )


def kernels_in(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call")


@functools.cache
def tpus(topology="v6e:2x4") -> Mesh:
    """Described; they are not there."""
    return Mesh(np.array(describe_devices(hardware.parse(topology))), ("chips",))


def test_tpus_run_the_kernels_and_a_cpu_does_not():
    x = jax.ShapeDtypeStruct((1, 512, 1536), jnp.bfloat16)
    norm = functools.partial(layer_norm_modulate, eps=EPS, spec=PartitionSpec(None, "chips"))
    assert kernels_in(functools.partial(norm, mesh=tpus()), x) == 1
    assert kernels_in(functools.partial(norm, mesh=Mesh(np.array(jax.devices()), ("chips",))), x) == 0
    assert kernels_in(norm, x) == 0


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 512, 1500), PartitionSpec(None, "chips")),
        ((1, 512, 1536), PartitionSpec(None, None, "chips")),
        ((3, 512, 1536), PartitionSpec("chips")),
        ((1, 512, 128 * 1024), PartitionSpec(None, "chips")),
    ],
    ids=["lanes", "a split width", "a batch that does not divide", "too wide"],
)
def test_what_the_kernel_does_not_take_is_plain(shape, spec):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert kernels_in(functools.partial(layer_norm_modulate, eps=EPS, mesh=tpus(), spec=spec), x) == 0


def test_a_modulation_of_every_row_is_plain_and_right():
    x, rng = problem((1, 40, 256))
    scale = jnp.asarray(rng.standard_normal((1, 40, 256)), jnp.float32)
    run = functools.partial(layer_norm_modulate, eps=EPS, interpret=True)
    assert kernels_in(lambda x, scale: run(x, scale=scale), x, scale) == 0
    close(run(x, scale=scale), reference_layer_norm(x, scale=scale), 2e-5)


def test_one_modulation_serves_a_whole_batch():
    x, rng = problem((2, 40, 256))
    scale = jnp.asarray(rng.standard_normal((1, 1, 256)), jnp.float32)
    close(layer_norm_modulate(x, scale=scale, eps=EPS, interpret=True), reference_layer_norm(x, scale=scale), 2e-5)


def test_arguments_that_do_not_fit_are_named():
    x, weight = jnp.zeros((1, 8, 256)), jnp.ones(64)
    norm = functools.partial(rms_norm_rotary, x, weight, eps=EPS, heads=4)
    with pytest.raises(ValueError, match=r"expected rows \[B, S, C\].*got int32 \(1, 8, 256\)"):
        layer_norm_modulate(x.astype(jnp.int32), eps=EPS)
    with pytest.raises(ValueError, match=r"weight \(256,\) for rows .* got \(64,\)"):
        norm(over="width")
    with pytest.raises(ValueError, match="'width' or 'head'; got 'token'"):
        norm(over="token")
    with pytest.raises(ValueError, match=r"\(8, 64\), or neither of them; got {'cosines': \(8, 32\), 'sines': None}"):
        norm(over="head", cosines=jnp.ones((8, 32)))
    with pytest.raises(ValueError, match="heads of an even size; got 3 heads for a width of 256"):
        rms_norm_rotary(x, jnp.ones(85), eps=EPS, heads=3, over="head")


@pytest.mark.parametrize(("heads", "kernels"), [(8, 1), (4, 0)], ids=["each device has whole heads", "half a head"])
def test_heads_normed_one_by_one_may_be_split_over_devices(heads, kernels):
    devices = Mesh(np.array(jax.devices()), ("chips",))
    x, rng = problem((1, 40, 8 * 128))
    weight = jnp.asarray(rng.standard_normal(x.shape[2] // heads), jnp.float32)
    cosines, sines = angles(rng, 40, x.shape[2] // heads)
    options = {"eps": EPS, "cosines": cosines, "sines": sines, "heads": heads, "over": "head"}
    norm = functools.partial(rms_norm_rotary, weight=weight, **options, spec=PartitionSpec(None, None, "chips"))
    ours = jax.jit(functools.partial(norm, mesh=devices, interpret=True))(x)
    close(ours, reference_rotary(x, weight, None, cosines, sines, heads, "head"), rounding(x.dtype))
    split = Mesh(tpus().devices.reshape(-1), ("chips",))
    assert kernels_in(functools.partial(norm, mesh=split), x) == kernels
