"""What decoders of causal video autoencoders share: channels last, rows spread over the devices, the past as state.

Traced as they stand, stock decoders are channels first with the whole video as one item; XLA then cuts the width into
pieces to have a batch, and copies every activation for it several times. These have the stock arithmetic and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import torch
from jax.sharding import PartitionSpec

from comfyui_tpu.ops import causal_conv
from comfyui_tpu.ops.causal_conv import PAST, Rows
from comfyui_tpu.ops.padding import pad_to_multiple
from comfyui_tpu.runtime import bridge, causal
from comfyui_tpu.runtime.device_module import DeviceModule
from comfyui_tpu.runtime.plan import Plan, sharding

State = list[jax.Array]


def spread_rows(plan: Plan) -> PartitionSpec:
    """Where the state's ``[frames, rows, columns, channels]`` lie."""
    return PartitionSpec(None, plan.axis_names)


class SpreadAutoencoder(DeviceModule):
    """An autoencoder whose decoder is one of these."""

    def activation_sharding(self, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Of videos as the plan says; with four axes it is the decoder's state."""
        if len(shape) != 4:
            return super().activation_sharding(shape)
        return sharding(self.plan, self.devices, spread_rows(self.plan))

    def decoded(self, z: torch.Tensor, chunking: causal.Chunking) -> torch.Tensor:
        """Latents ``[B, C, T, h, w]`` through all chunks, one video after the other as the decoder takes them."""
        return torch.cat([causal.run(self, chunking, video) for video in z.float().split(1)])


def decode(
    frames_of: Callable[[Rows, dict[str, jax.Array], jax.Array, State | None], tuple[jax.Array, State]],
    parts: dict[str, torch.nn.Module],
    x: torch.Tensor,
    state: list[torch.Tensor] | None,
    scale: int,
):
    """While tracing: latents ``[1, C, T, h, w]`` → frames ``[1, 3, T', scale·h, scale·w]`` float32, and the new state.

    The state is what every convolution over time has seen last, ``[2, rows, columns, channels]`` each.

    Args:
        frames_of: one device's work: its rows, the weights, its part of the video ``[T, S, U, C]`` in the weights'
            dtype and of the state → ``[T', scale·S, U', columns·3]`` and the new state.
        parts: the modules whose weights it needs, by what stands before their names.
    """
    env, context = bridge.environment(), bridge.current_trace()
    weights = {
        prefix + name: env.t2j_iso(weight) for prefix, part in parts.items() for name, weight in part.named_parameters()
    }
    x, state = env.t2j_iso((x, state))
    sideways = _spread_the_width(*x.shape[-2:], context.plan.chips)
    if sideways:
        weights = {name: w.swapaxes(-1, -2) if w.ndim >= 4 else w for name, w in weights.items()}
    video = jnp.moveaxis(x[0], 0, -1).astype(next(iter(weights.values())).dtype)
    video = video.swapaxes(1, 2) if sideways else video
    total = video.shape[1]
    video = pad_to_multiple(video, 1, context.plan.chips)
    rows = Rows(total, video.shape[1] // context.plan.chips, context.plan.axes)
    spec = spread_rows(context.plan)
    frames, state = jax.shard_map(
        lambda *inputs: frames_of(rows, *inputs),
        mesh=context.mesh,
        in_specs=(PartitionSpec(), spec, spec),
        out_specs=(spec, spec),
        check_vma=False,
    )(weights, video, state)
    frames = frames[:, : total * scale].reshape(*frames.shape[:1], total * scale, -1, 3).astype(jnp.float32)
    frames = jnp.moveaxis(frames.swapaxes(1, 2) if sideways else frames, -1, 0)[None]
    return env.j2t_iso((frames, state))


def _spread_the_width(height: int, width: int, chips: int) -> bool:
    """Whether the width is better spread than the height: fewer rows to fill up, or columns nearer to tiles of 8."""

    def waste(spread: int, other: int) -> tuple[float, float]:
        return -(-spread // chips) * chips / spread, -(-other // 8) * 8 / other

    return waste(width, height) < waste(height, width)


class Pass:
    """One pass through a decoder; takes the old state's entries in order and collects the new ones.

    Videos are ``[T, S, U, columns·C]``: in the last level two columns lie side by side.
    """

    def __init__(self, weights: dict[str, jax.Array], rows: Rows, state: State | None):
        self.weights, self.rows, self.columns = weights, rows, 1
        self.old: Iterator[jax.Array] | None = None if state is None else iter(state)
        self.state: State = []

    def pointwise(self, x: jax.Array, name: str) -> jax.Array:
        weight = self.weights[f"{name}.weight"]
        matrix = weight.reshape(weight.shape[:2]).T
        if self.columns > 1:
            matrix = jnp.kron(jnp.eye(self.columns, dtype=matrix.dtype), matrix)
        return x @ matrix + jnp.tile(self.weights[f"{name}.bias"], self.columns)

    def shortcut(self, x: jax.Array, name: str) -> jax.Array:
        """What the residual block ``name`` adds: ``x``, by a convolution of single places where it has one."""
        shortcut = f"{name}.conv_shortcut"
        return self.pointwise(x, shortcut) if f"{shortcut}.weight" in self.weights else x

    def convolved(
        self, wide: jax.Array, name: str, residual: jax.Array | None = None, to_colours: bool = False
    ) -> jax.Array:
        """A 3 × 3 × 3 convolution of what has its past and neighbours, ``[T + 2, S + 2, U, (columns + 2)·C]``."""
        weight = causal_conv.weights_of(self.weights[f"{name}.weight"], self.columns)
        bias = self.weights[f"{name}.bias"]
        if to_colours:
            return causal_conv.convolve_to_few(wide, weight, bias)
        return causal_conv.convolve(wide, weight, bias, residual)

    def upsample(self, x: jax.Array, name: str, in_pairs: bool) -> jax.Array:
        """Twice the rows and the columns; these stay in pairs if so wanted."""
        x = causal_conv.upsampled(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.rows)
        self.rows = self.rows.doubled()
        if in_pairs:
            self.columns = 2
            return x
        return x.reshape(*x.shape[:2], 2 * x.shape[2], -1)

    def after(self, past: jax.Array, x: jax.Array) -> jax.Array:
        """``x``, after the last frames of it and its past have become the past of the next chunk."""
        return self.keep(x, jnp.concatenate([past, x[-PAST:]])[-PAST:])

    def with_neighbours(self, past: jax.Array, x: jax.Array) -> jax.Array:
        """``x`` with its past, rows and columns beside each: what :meth:`convolved` takes."""
        return causal_conv.with_columns(self.rows.with_neighbours(jnp.concatenate([past, x])), self.columns)

    def keep(self, x: jax.Array, last: jax.Array) -> jax.Array:
        """``x``, after ``last`` has become an entry of the new state."""
        # Kept before x is used. Left to itself, XLA cuts the state at the end, and until then holds every layer's whole
        # video in HBM for it. (After the layer would save a copy, 2 % of the time, but takes 2.5 GiB more.)
        last, x = jax.lax.optimization_barrier((last, x))
        self.state.append(last)
        return x
