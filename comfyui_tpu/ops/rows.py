"""Norms of rows with what follows them (modulation, rotary embedding), in one pass over HBM.

XLA takes several: two for a layer norm's statistics, and statistics, norm and rotary embedding of queries and keys one
after another, with copies between their layouts. On a TPU each function here is one Pallas kernel
(:mod:`comfyui_tpu.ops.row_kernels`), and the plain JAX that defines its result everywhere else, as well as for widths
that the kernel does not take.

XLA's partitioner cannot split a kernel: over a mesh each device runs it on its own rows, and where heads are normed one
by one also on its own heads. Rows that do not divide by the devices are filled up with zeros, which costs a pass of its
own; a batch or heads that do not divide take plain JAX, and so does a norm over a width that is split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops import norm, row_kernels
from comfyui_tpu.ops.padding import pad
from comfyui_tpu.ops.row_kernels import LANES


def layer_norm_modulate(
    x: jax.Array,
    *,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    eps: float,
    out_dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``(layer_norm(x) · weight + bias) · (1 + scale) + shift``, all of it in float32.

    Args:
        x: ``[B, S, C]``, bfloat16 or float32.
        weight, bias: ``[C]``; 1 and 0 when None.
        scale, shift: broadcastable to ``[B, S, C]``; 0 when None. The kernel takes one row for all of S.
        out_dtype: of the result; ``x.dtype`` when None.
        mesh: the devices of the program this is part of; this machine's first one when None.
        spec: how ``x`` and the result lie over the mesh; whole on every device when None.
        interpret: run the kernel in Pallas' interpreter (any backend; for tests).

    Returns:
        ``[B, S, C]`` in ``out_dtype``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    _check(x, x.shape[-1], weight=weight, bias=bias)
    one_row = all(t is None or t.ndim < 2 or t.shape[-2] == 1 for t in (scale, shift))
    fits = one_row and _fits(x, row_kernels.layer_norm_row_bytes(x, out_dtype))
    if not fits or not _kernel_runs(x, mesh, spec, interpret):
        return _modulated(x, weight, bias, scale, shift, eps=eps, out_dtype=out_dtype)
    gain, offset = _folded(x, weight, bias, scale, shift)
    run = functools.partial(row_kernels.layer_norm_rows, eps=eps, out_dtype=out_dtype, interpret=interpret)
    return _over_mesh(run, mesh, spec, x, ((gain, _OF_BATCH), (offset, _OF_BATCH)))


def rms_norm_rotary(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    cosines: jax.Array | None = None,
    sines: jax.Array | None = None,
    heads: int,
    over: str,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) · weight``, rounded to ``x.dtype``, then each pair of neighbours turned in float32.

    Pairs turn as in (a, b) → (a·cos − b·sin, a·sin + b·cos).

    Args:
        x: ``[B, S, H·D]``, bfloat16 or float32; viewing the result as ``[B, S, H, D]`` costs nothing.
        weight: ``[H·D]`` over the whole width, else ``[D]``.
        cosines, sines: ``[S, D]`` float32, each angle twice; None for no rotation.
        heads: H.
        over: ``"width"`` for one norm of all heads together (Wan), ``"head"`` for one of each (FLUX.2).
        mesh, spec, interpret: as in :func:`layer_norm_modulate`.

    Returns:
        ``[B, S, H·D]`` in ``x.dtype``.

    Raises:
        ValueError: shapes that do not fit together, or an ``over`` that there is not.
    """
    if over not in ("width", "head"):
        raise ValueError(f"over must be 'width' or 'head'; got {over!r}")
    options = {"eps": eps, "whole": over == "width", "centred": False}
    return _norm_rotary(x, weight, None, cosines, sines, heads, options, mesh, spec, interpret)


def layer_norm_rotary(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float,
    cosines: jax.Array | None = None,
    sines: jax.Array | None = None,
    heads: int,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
    interpret: bool = False,
) -> jax.Array:
    """:func:`rms_norm_rotary` with a layer norm of each head (CogVideoX) in place of the RMS norm.

    ``weight`` and ``bias`` are ``[D]``.
    """
    options = {"eps": eps, "whole": False, "centred": True}
    return _norm_rotary(x, weight, bias, cosines, sines, heads, options, mesh, spec, interpret)


def _norm_rotary(x, weight, bias, cosines, sines, heads, options, mesh, spec, interpret):
    _check(x, x.shape[-1] if options["whole"] else x.shape[-1] // heads, weight=weight, bias=bias)
    _check_rotary(x, heads, cosines=cosines, sines=sines)
    head_dim = x.shape[2] // heads
    options = options | {"head_dim": head_dim}
    # Tables of fewer than 128 lanes are stored as if they had so many.
    apart = 1 if options["whole"] else heads
    width = x.shape[2] // (1 if mesh is None else _ways(mesh, _axes(spec)[2]))
    row_bytes = 2 * width * x.dtype.itemsize + (0 if cosines is None else 8 * max(head_dim, LANES))
    fits = _fits(x, row_bytes, width) and (LANES % head_dim == 0 or head_dim % LANES == 0)
    if not fits or not _kernel_runs(x, mesh, spec, interpret, apart):
        return _normed(x, weight, bias, cosines, sines, **options)
    run = functools.partial(row_kernels.norm_rotary_rows, interpret=interpret, **options)
    others = ((weight, _WHOLE), (bias, _WHOLE), (cosines, _OF_TOKENS), (sines, _OF_TOKENS))
    return _over_mesh(run, mesh, spec, x, others)


def _modulated(x, weight, bias, scale, shift, *, eps, out_dtype):
    """What :func:`layer_norm_modulate` is, in plain JAX."""
    out = norm.layer_norm(x.astype(jnp.float32), 1, weight, bias, eps)
    out = out if scale is None else out * (1 + scale.astype(jnp.float32))
    return (out if shift is None else out + shift.astype(jnp.float32)).astype(out_dtype)


def _folded(x, weight, bias, scale, shift):
    """Affine and modulation as one factor and one summand, ``[B, 1, C]`` float32 each."""
    wide = lambda t, other: jnp.float32(other) if t is None else t.astype(jnp.float32)  # noqa: E731
    factor = 1 + wide(scale, 0)
    shape = (x.shape[0], 1, x.shape[2])
    gain, offset = wide(weight, 1) * factor, wide(bias, 0) * factor + wide(shift, 0)
    return jnp.broadcast_to(gain, shape), jnp.broadcast_to(offset, shape)


def _normed(x, weight, bias, cosines, sines, *, eps, head_dim, whole, centred):
    """What :func:`rms_norm_rotary` and :func:`layer_norm_rotary` are, in plain JAX."""
    heads = x.reshape(*x.shape[:2], -1, head_dim)
    axes, weight = 2 if whole else 1, weight.reshape(-1, head_dim)
    out = norm.layer_norm(heads, axes, weight, bias, eps) if centred else norm.rms_norm(heads, axes, weight, eps)
    if cosines is not None:
        even = jnp.arange(head_dim) % 2 == 0
        turned = jnp.where(even, -jnp.roll(out, -1, axis=-1), jnp.roll(out, 1, axis=-1))
        out = (out * cosines[:, None] + turned * sines[:, None]).astype(x.dtype)
    return out.reshape(x.shape)


def _check(x: jax.Array, size: int, **affine: jax.Array | None) -> None:
    if x.ndim != 3 or 0 in x.shape or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"expected rows [B, S, C], bfloat16 or float32, not empty; got {x.dtype} {x.shape}")
    for name, given in affine.items():
        if given is not None and given.shape != (size,):
            raise ValueError(f"expected {name} {(size,)} for rows {x.shape}; got {given.shape}")


def _check_rotary(x: jax.Array, heads: int, **tables: jax.Array | None) -> None:
    width = x.shape[2]
    if width % heads or width // heads % 2:
        raise ValueError(f"expected heads of an even size; got {heads} heads for a width of {width}")
    expected = (x.shape[1], width // heads)
    got = {name: None if table is None else table.shape for name, table in tables.items()}
    if set(got.values()) not in ({None}, {expected}):
        raise ValueError(f"expected cosines and sines [S, D] = {expected}, or neither of them; got {got}")


def _fits(x: jax.Array, row_bytes: int, width: int | None = None) -> bool:
    return (width or x.shape[2]) % LANES == 0 and row_kernels.tile_rows(*x.shape[:2], row_bytes) > 0


def _kernel_runs(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec | None, interpret: bool, apart: int = 1) -> bool:
    """Whether the devices are TPUs (or the interpreter stands in), and each has what it needs of whole batches.

    Rows consist of ``apart`` equal parts that need nothing of each other.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    batch, _, width = _axes(spec)
    whole = mesh is None or (apart % _ways(mesh, width) == 0 and x.shape[0] % _ways(mesh, batch) == 0)
    return whole and (interpret or device.platform == "tpu")


def _axes(spec: PartitionSpec | None) -> tuple:
    """What splits B, S and C."""
    return (*(spec or ()), None, None, None)[:3]


def _ways(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


# How an array beside the rows is split: as their batch, as their tokens (its first axis), or not at all.
_OF_BATCH, _OF_TOKENS, _WHOLE = "batch", "tokens", "whole"


def _over_mesh(
    run: Callable[..., jax.Array],
    mesh: Mesh | None,
    spec: PartitionSpec | None,
    x: jax.Array,
    others: Sequence[tuple[jax.Array | None, str]],
) -> jax.Array:
    """``run(x, *others)``, on each device of ``mesh`` with its own part of each."""
    arrays = [array for array, _ in others]
    if mesh is None:
        return run(x, *arrays)
    batch, tokens, width = _axes(spec)
    rows, padding = PartitionSpec(batch, tokens, width), -x.shape[1] % _ways(mesh, tokens)
    if padding:
        x = pad(x, 1, padding)
        arrays = [
            pad(array, 0, padding) if kind == _OF_TOKENS and array is not None else array for array, kind in others
        ]
    specs = {_OF_BATCH: PartitionSpec(batch), _OF_TOKENS: PartitionSpec(tokens), _WHOLE: PartitionSpec()}
    in_specs = (rows, *(specs[kind] for _, kind in others))
    out = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)(x, *arrays)
    return out[:, : out.shape[1] - padding] if padding else out
