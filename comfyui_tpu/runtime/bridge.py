"""Where torch and JAX meet: the only module that enters torchax.

A stock torch module is traced into JAX by calling it with torchax tensors under a private torchax environment, which is
entered only around that call. Nothing process-wide is switched on, so other nodes keep the torch they know.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.ops import attention as attention_ops
from comfyui_tpu.ops import norm as norm_ops
from comfyui_tpu.ops import rows, tensor_parallel
from comfyui_tpu.ops.sharded_attention import attend
from comfyui_tpu.ops.sharded_attention import attend_jointly as attend_parts
from comfyui_tpu.runtime.plan import Plan

# Tracing swaps a module's parameters in place for the time of the call: one trace at a time.
_trace_lock = threading.RLock()


@dataclass(frozen=True)
class TraceContext:
    """What the operators below need to know while a module is traced: its plan, its mesh, and the caller's options."""

    plan: Plan
    mesh: Mesh
    smooth_keys: bool = False

    @property
    def on_tpu(self) -> bool:
        """Whether the program is for TPUs, so that it may have Pallas kernels."""
        return self.mesh.devices.flat[0].platform == "tpu"

    def constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        """``x`` with a sharding constraint; lengths that do not divide are padded and masked by the partitioner."""
        if self.plan.chips == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def tokens(self, x: jax.Array) -> jax.Array:
        """``[B, S, C]`` activations with their tokens spread over the chips, if the plan says so."""
        if not self.plan.shard_tokens or x.ndim != 3:
            return x
        return self.constrain(x, *self.plan.axes_of(x.shape[0]), None)

    def whole(self, x: jax.Array) -> jax.Array:
        """``[B, n, C]`` that blocks read beside their tokens: nothing but the batch spread over the chips."""
        if not self.plan.shard_tokens or x.ndim != 3:
            return x
        return self.constrain(x, self.plan.axes_of(x.shape[0])[0], None, None)

    def rows(self, batch: int, heads: int | None = None) -> dict[str, Any]:
        """How ``[B, S, C]`` activations lie over the mesh, for the row-wise kernels; ``heads``: inside attention."""
        if heads and self.splits(heads):
            return {"mesh": self.mesh, "spec": PartitionSpec(None, None, self.plan.axis_names)}
        spec = PartitionSpec(*self.plan.axes_of(batch)) if self.plan.shard_tokens else PartitionSpec()
        return {"mesh": self.mesh, "spec": spec}

    def attention_options(self, batch: int) -> dict[str, Any]:
        """What sharded attention is told of the plan; nothing where it is left to XLA's partitioner."""
        plan = self.plan
        if plan.attention == "replicated" and plan.chips > 1:
            return {}
        return {
            "mesh": self.mesh,
            "strategy": "heads" if plan.attention == "replicated" else plan.attention,
            "ring_chips": plan.ring_chips,
            "batch_axes": plan.axes_of(batch)[0],
            "smooth_keys": self.smooth_keys,
        }

    def attended(self, out: jax.Array) -> jax.Array:
        """``[B, S, H, D]`` that sharded attention returned, with its sharding said once more.

        Tokens that do not divide were cut to their number, and XLA would gather what it is not told.
        """
        if self.plan.attention == "own heads":
            return out
        return self.constrain(out, *self.plan.axes_of(out.shape[0]), None, None)

    def splits(self, *features: int) -> bool:
        """Whether layers of so many features are tensor-parallel under this plan."""
        return self.plan.splits_features and all(number % self.plan.chips == 0 for number in features)

    def gathered(self, weight: jax.Array) -> jax.Array:
        """One layer's weight as its layer uses it: on every chip whole, if the plan gathers weights.

        A matrix ``[N, C]`` arrives turned. The compiler makes better products of an operand whose rows are contracted,
        and to turn a chip's part before it is sent costs next to nothing. Without the layouts XLA would turn nothing
        and call the result turned.
        """
        if not self.plan.gather_weights or self.plan.chips == 1:
            return weight
        if weight.ndim != 2:
            return self.constrain(weight)
        rows = Layout(major_to_minor=(0, 1))
        turned = with_layout_constraint(self.constrain(with_layout_constraint(weight.T, rows)), rows)
        return turned.T


_context: contextvars.ContextVar[TraceContext] = contextvars.ContextVar("comfyui_tpu_trace")


def current_trace() -> TraceContext:
    """The context of the trace this code runs in; LookupError outside of :func:`trace`."""
    return _context.get()


def split_outputs(x: torch.Tensor, *layers: torch.nn.Linear) -> list[list[torch.Tensor]]:
    """While tracing: ``x`` ``[B, S, C]`` through linear layers without bias that read the same activations.

    Returns:
        For each layer its output features, ``[B, S, ...]`` each, cut where its units (``layer.units``) begin; features
        lie as the plan has them: under tensor parallelism each chip has its part of every unit.
    """
    env, context = environment(), current_trace()
    x = env.t2j_iso(x)
    weights = [env.t2j_iso(layer.weight) for layer in layers]
    units = [getattr(layer, "units", (0, 1))[1] for layer in layers]
    if context.splits(*(weight.shape[0] // number for weight, number in zip(weights, units, strict=True))):
        return env.j2t_iso(tensor_parallel.split_outputs(x, weights, units, mesh=context.mesh))
    made = [tensor_parallel.linear(x, weight) for weight in weights]
    return env.j2t_iso([jnp.split(y, number, axis=-1) for y, number in zip(made, units, strict=True)])


def split_inputs(parts: Sequence[torch.Tensor], layer: torch.nn.Linear) -> torch.Tensor:
    """While tracing: ``parts``, ``[B, S, units·N]`` each, side by side through a linear layer without bias.

    The result is ``[B, S, C]``, under tensor parallelism with its tokens split over the chips.
    """
    env, context = environment(), current_trace()
    parts, weight = env.t2j_iso((list(parts), layer.weight))
    if context.splits(*(part.shape[-1] for part in parts)):
        return env.j2t_iso(tensor_parallel.split_inputs(parts, weight, mesh=context.mesh))
    return env.j2t_iso(tensor_parallel.linear(jnp.concatenate(parts, axis=-1), weight))


def of_own_tokens(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """While tracing: a linear layer outside of the blocks, ``[B, S, C]`` → ``[B, S, N]``, each chip its own tokens.

    Said for both operands: of a weight that lies split, XLA makes a loop that computes beside each part's arrival.
    """
    env, context = environment(), current_trace()
    x, weight, bias = env.t2j_iso((x, weight, bias))
    return env.j2t_iso(tensor_parallel.linear(context.tokens(x), context.gathered(weight)) + bias)


def layer_norm_modulate(
    x: torch.Tensor,
    norm: torch.nn.Module,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """While tracing: ``norm(x) · (1 + scale) + shift`` in float32, rounded to ``x``'s dtype.

    Args:
        x: ``[B, S, C]``, tokens spread as the plan says.
        norm: a layer norm over C, with or without weight and bias; or an identity.
        scale, shift: ``[B, 1, C]``.
    """
    if not isinstance(norm, torch.nn.LayerNorm):
        return norm(x)
    env, context = environment(), current_trace()
    x, *rest = env.t2j_iso((x, norm.weight, norm.bias, scale, shift))
    named = dict(zip(("weight", "bias", "scale", "shift"), rest, strict=True))
    return env.j2t_iso(rows.layer_norm_modulate(x, eps=norm.eps, **named, **context.rows(x.shape[0])))


def norm_rotary(
    x: torch.Tensor, norm: torch.nn.Module, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """While tracing: a norm of queries or keys ``x`` ``[B, S, H·D]``, then the rotary embedding of each head.

    Args:
        norm: an RMS norm over all heads together, with a weight ``[H·D]``; or an RMS or layer norm over each, with a
            weight ``[D]``.
        rotary: cosines and sines, each angle twice, with ``S·D`` elements; None for no rotation.
    """
    env, context = environment(), current_trace()
    x, weight, bias, rotary = env.t2j_iso((x, norm.weight, getattr(norm, "bias", None), rotary))
    cosines, sines = (None, None) if rotary is None else (t.reshape(x.shape[1], -1).astype(jnp.float32) for t in rotary)
    together = weight.shape[0] == x.shape[2]
    heads = x.shape[2] // (weight if not together else x if cosines is None else cosines).shape[-1]
    options = {"eps": norm.eps, "heads": heads, "cosines": cosines, "sines": sines, **context.rows(x.shape[0], heads)}
    if isinstance(norm, torch.nn.LayerNorm):
        return env.j2t_iso(rows.layer_norm_rotary(x, weight, bias, **options))
    return env.j2t_iso(rows.rms_norm_rotary(x, weight, over="width" if together else "head", **options))


def attend_jointly(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """While tracing: attention of each part's queries to the keys and values of all parts.

    Args:
        parts: query, key and value of each, ``[B, S, H, D]``; S is the part's own.

    Returns:
        ``[B, S, H, D]`` for each part.
    """
    env, context = environment(), current_trace()
    parts = env.t2j_iso([tuple(part) for part in parts])
    if options := context.attention_options(parts[0][0].shape[0]):
        return env.j2t_iso([context.attended(out) for out in attend_parts(parts, **options)])
    cuts = list(itertools.accumulate(query.shape[1] for query, _, _ in parts[:-1]))
    q, k, v = (jnp.swapaxes(jnp.concatenate(each, axis=1), 1, 2) for each in zip(*parts, strict=True))
    out = attention_ops.attention(q, k, v, smooth_keys=context.smooth_keys)
    return env.j2t_iso(jnp.split(jnp.swapaxes(out, 1, 2), cuts, axis=1))


def trace(
    call: Callable[..., Any], module: torch.nn.Module, context: TraceContext, params: dict, *args, **kwargs
) -> Any:
    """Run ``call(module, *args, **kwargs)`` in JAX, with ``params`` in place of the module's parameters and buffers.

    Args:
        call: a function of the module, for example ``lambda m, x: m.decoder(x)``.
        module: a torch module; its own parameters are never read.
        context: plan and options for the operators replaced while tracing.
        params: JAX arrays by parameter or buffer name.
        args, kwargs: pytrees of JAX arrays and static Python values.

    Returns:
        What ``call`` returns, torch tensors replaced by JAX arrays.
    """
    env = environment()
    wrapped = _Call(module, call)
    # ComfyUI calls nodes under inference mode. Tensors made there are marked, and composite operators on them (dropout,
    # conv3d) are not decomposed, so that torchax would find no lowering.
    with _trace_lock, torch.inference_mode(False), torch.no_grad(), _tracing(context):
        named = {f"module.{name}": env.j2t_iso(array) for name, array in params.items()}
        torch_args, torch_kwargs = env.j2t_iso((args, kwargs))
        with env, warnings.catch_warnings():
            # torch's 64-bit integers (positions, indices) become JAX's 32-bit ones; all of them fit. 64-bit floats are
            # asked for in rotary tables, whose angles float32 holds well within the numerics contract.
            warnings.filterwarnings("ignore", message="Explicitly requested dtype (int|float)64")
            out = torch.func.functional_call(wrapped, named, torch_args, torch_kwargs)
    return env.t2j_iso(out)


@contextlib.contextmanager
def _tracing(context: TraceContext) -> Iterator[None]:
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


class _Call(torch.nn.Module):
    """Makes any function of a module the ``forward`` that ``torch.func.functional_call`` wants."""

    def __init__(self, module: torch.nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *args, **kwargs):
        return self.call(self.module, *args, **kwargs)


@functools.cache
def environment():
    """Our own torchax environment (never torchax's global one, which other packs may use)."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        from torchax import tensor
    finally:
        # Importing torchax turns off torch's fused encoder fast path for the whole process; put it back.
        torch.backends.mha.set_fastpath_enabled(fastpath)
    env = tensor.Environment()
    functional = torch.nn.functional
    for function, replacement in (
        (functional.scaled_dot_product_attention, _scaled_dot_product_attention),
        (functional.group_norm, _group_norm),
        (functional.layer_norm, _layer_norm),
        (functional.rms_norm, _rms_norm),
    ):
        env.override_op_definition(function, replacement)
    return env


def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch's operator of that name, sharded as the plan says; ``query`` is ``[..., S, D]``, dropout is off."""
    if is_causal or enable_gqa:
        raise NotImplementedError("causal and grouped-query attention are not used by the models this library runs")
    env, context = environment(), current_trace()
    q, k, v, mask = env.t2j_iso((query, key, value, attn_mask))
    lead = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    out = _sharded_attention(context, q, k, v, mask, scale)
    return env.j2t_iso(out.reshape(*lead, *out.shape[1:]))


def _sharded_attention(context: TraceContext, q, k, v, mask, scale):
    """``[B, H, S, D]`` attention as the plan says; with a mask it is left to XLA's partitioner."""
    if mask is not None or not context.attention_options(q.shape[0]):
        options = {"scale": scale, "smooth_keys": context.smooth_keys}
        return attention_ops.attention(q, k, v, mask=mask, **options)
    # Models turn [B, S, H, D] for torch's operator; turned back, nothing is left of that in the program.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = attend(q, k, v, scale=scale, **context.attention_options(q.shape[0]))
    return jnp.swapaxes(context.attended(out), 1, 2)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    env = environment()
    x, w, b = env.t2j_iso((input, weight, bias))
    return env.j2t_iso(norm_ops.group_norm(x, num_groups, w, b, eps))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    env = environment()
    x, w, b = env.t2j_iso((input, weight, bias))
    return env.j2t_iso(norm_ops.layer_norm(x, len(normalized_shape), w, b, eps))


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    env = environment()
    x, w = env.t2j_iso((input, weight))
    return env.j2t_iso(norm_ops.rms_norm(x, len(normalized_shape), w, eps))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's values as numpy; shares memory where it can. 64-bit integers become 32-bit, as JAX computes."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array = tensor.numpy()
    if array.dtype == np.int64:
        return array.astype(np.int32)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype that :func:`to_numpy` gives values of ``dtype``."""
    return to_numpy(torch.empty(0, dtype=dtype)).dtype


def to_torch(array: jax.Array | jax.ShapeDtypeStruct) -> torch.Tensor:
    """A device array's values as a CPU tensor of its own (writable, no shared memory).

    A described array, which a rehearsal hands on, has no values: zeros that take no memory (not writable).
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        zero = to_torch(np.zeros((), array.dtype))
        return zero.expand(array.shape)
    values = np.array(array)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


TORCH_DTYPES = {
    jnp.dtype(jnp.float32): torch.float32,
    jnp.dtype(jnp.bfloat16): torch.bfloat16,
}
