"""Wan's video decoder with channels last, rows spread over the devices: the stock decoder's arithmetic and weights.

Traced as it stands, the stock decoder is channels first with the whole video as one item; XLA then cuts the width into
pieces to have a batch, and copies every activation for it several times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import torch
from jax.sharding import PartitionSpec

from comfyui_tpu.ops import attention, causal_conv
from comfyui_tpu.ops.causal_conv import PAST, Rows
from comfyui_tpu.ops.padding import pad_to_multiple
from comfyui_tpu.runtime import bridge
from comfyui_tpu.runtime.plan import Plan

State = list[jax.Array]


def spread_rows(plan: Plan) -> PartitionSpec:
    """Where the state's ``[frames, rows, columns, channels]`` lie."""
    return PartitionSpec(None, plan.axis_names)


def decode(vae: torch.nn.Module, x: torch.Tensor, state: list[torch.Tensor] | None = None):
    """While tracing: latents ``[1, 16, T, h, w]`` → frames ``[1, 3, 4·T, 8·h, 8·w]`` in -1..1, and the new state.

    Without a state it is a video's first latent frame alone, which makes one frame. The state is what every convolution
    over time has seen last, ``[2, rows, columns, channels]`` each: zeros where there was nothing yet.
    """
    env, context = bridge.environment(), bridge.current_trace()
    weights = {name: env.t2j_iso(weight) for name, weight in vae.decoder.named_parameters()}
    weights |= {
        f"post_quant_conv.{name}": env.t2j_iso(weight) for name, weight in vae.post_quant_conv.named_parameters()
    }
    x, state = env.t2j_iso((x, state))
    levels = len(vae.decoder.up_blocks) - 1
    sideways = _spread_the_width(*x.shape[-2:], context.plan.chips)
    if sideways:
        weights = {name: w.swapaxes(-1, -2) if w.ndim >= 4 else w for name, w in weights.items()}
    video = jnp.moveaxis(x[0], 0, -1)
    video = video.swapaxes(1, 2) if sideways else video
    total = video.shape[1]
    video = pad_to_multiple(video, 1, context.plan.chips)
    rows = Rows(total, video.shape[1] // context.plan.chips, context.plan.axes)
    on_tpu = context.mesh.devices.flat[0].platform == "tpu"
    run = functools.partial(_frames, vae.decoder, rows, on_tpu)
    spec = spread_rows(context.plan)
    frames, state = jax.shard_map(
        run,
        mesh=context.mesh,
        in_specs=(PartitionSpec(), spec, spec),
        out_specs=(spec, spec),
        check_vma=False,
    )(weights, video, state)
    frames = frames[:, : total * 2**levels].reshape(*frames.shape[:1], total * 2**levels, -1, 3)
    frames = jnp.moveaxis(frames.swapaxes(1, 2) if sideways else frames, -1, 0)[None]
    return env.j2t_iso((frames, state))


def _spread_the_width(height: int, width: int, chips: int) -> bool:
    """Whether the width is better spread than the height: fewer rows to fill up, or columns nearer to tiles of 8."""

    def waste(spread: int, other: int) -> tuple[float, float]:
        return -(-spread // chips) * chips / spread, -(-other // 8) * 8 / other

    return waste(width, height) < waste(height, width)


def _frames(decoder: torch.nn.Module, rows: Rows, kernels: bool, weights: dict, x: jax.Array, state: State | None):
    """One device's part: ``[T, S, U, 16]`` → ``[4·T, 8·S, 4·U, 2·3]`` (columns in pairs), and its part of the state."""
    run = _Run(weights, rows, kernels, state)
    x = run.pointwise(x, "post_quant_conv")
    x = run.causal(*run.past_of(x), "conv_in")
    x = run.resnet(x, "mid_block.resnets.0")
    for index in range(len(decoder.mid_block.attentions)):
        x = run.attention(x, f"mid_block.attentions.{index}")
        x = run.resnet(x, f"mid_block.resnets.{index + 1}")
    last = len(decoder.up_blocks) - 1
    for number, block in enumerate(decoder.up_blocks):
        for index in range(len(block.resnets)):
            x = run.resnet(x, f"up_blocks.{number}.resnets.{index}")
        if number < last:
            name = f"up_blocks.{number}.upsamplers.0"
            if block.upsamplers[0].mode == "upsample3d":
                x = run.twice_the_frames(x, f"{name}.time_conv")
            x = run.upsample(x, f"{name}.resample.1", in_pairs=number == last - 1)
    x = run.causal(*run.past_of(x), "conv_out", "norm_out", to_colours=True)
    return jnp.clip(x, -1.0, 1.0), run.state


class _Run:
    """One pass through the decoder; takes the old state's entries in order and collects the new ones.

    Videos are ``[T, S, U, columns·C]``: in the last level two columns lie side by side.
    """

    def __init__(self, weights: dict[str, jax.Array], rows: Rows, kernels: bool, state: State | None):
        self.weights, self.rows, self.kernels, self.columns = weights, rows, kernels, 1
        self.old: Iterator[jax.Array] | None = None if state is None else iter(state)
        self.state: State = []

    def past_of(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The frames before ``x``, and ``x``, whose last ones are the past of the next chunk."""
        past = next(self.old) if self.old is not None else jnp.zeros((PAST, *x.shape[1:]), x.dtype)
        last = jnp.concatenate([past, x[-PAST:]])[-PAST:]
        # Kept before x is used. Left to itself, XLA cuts the state at the end, and until then holds every layer's whole
        # video in HBM for it. (After the layer would save a copy, 2 % of the time, but takes 2.5 GiB more.)
        last, x = jax.lax.optimization_barrier((last, x))
        self.state.append(last)
        return past, x

    def causal(
        self,
        past: jax.Array,
        x: jax.Array,
        name: str,
        norm: str | None = None,
        residual: jax.Array | None = None,
        to_colours: bool = False,
    ) -> jax.Array:
        """A 3 × 3 × 3 convolution of ``x`` after its ``past``, normed first if a norm is named."""
        if norm is None:
            wide = causal_conv.with_columns(self.rows.with_neighbours(jnp.concatenate([past, x])), self.columns)
        else:
            gain = self.weights[f"{norm}.gamma"].reshape(-1)
            wide = causal_conv.normed_columns(past, x, gain, self.rows, self.columns, self.kernels)
        weight = causal_conv.weights_of(self.weights[f"{name}.weight"], self.columns)
        bias = self.weights[f"{name}.bias"]
        if to_colours:
            return causal_conv.convolve_to_few(wide, weight, bias)
        return causal_conv.convolve(wide, weight, bias, residual)

    def resnet(self, x: jax.Array, name: str) -> jax.Array:
        # The residual is what has its past, so that XLA does not lay out twice what it was before.
        past, x = self.past_of(x)
        shortcut = f"{name}.conv_shortcut"
        residual = self.pointwise(x, shortcut) if f"{shortcut}.weight" in self.weights else x
        x = self.causal(past, x, f"{name}.conv1", f"{name}.norm1")
        return self.causal(*self.past_of(x), f"{name}.conv2", f"{name}.norm2", residual)

    def pointwise(self, x: jax.Array, name: str) -> jax.Array:
        weight = self.weights[f"{name}.weight"]
        matrix = weight.reshape(weight.shape[:2]).T
        if self.columns > 1:
            matrix = jnp.kron(jnp.eye(self.columns, dtype=matrix.dtype), matrix)
        return x @ matrix + jnp.tile(self.weights[f"{name}.bias"], self.columns)

    def attention(self, x: jax.Array, name: str) -> jax.Array:
        """Every frame's positions to one another, one head."""
        normed = causal_conv.rms_norm(x, self.weights[f"{name}.norm.gamma"].reshape(-1))
        query, key, value = jnp.split(self.pointwise(normed, f"{name}.to_qkv"), 3, axis=-1)
        tokens = lambda y: y.reshape(y.shape[0], 1, -1, y.shape[-1])  # noqa: E731
        out = attention.attention(tokens(query), tokens(self.rows.whole(key)), tokens(self.rows.whole(value)))
        return x + self.pointwise(out.reshape(x.shape), f"{name}.proj")

    def twice_the_frames(self, x: jax.Array, name: str) -> jax.Array:
        """Two frames from each by a convolution over time; a video's first frame stays one."""
        if self.old is None:
            self.state.append(jnp.zeros((PAST, *x.shape[1:]), x.dtype))  # it does not count as the past either
            return x
        x = jnp.concatenate(self.past_of(x))
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        taps = weight[..., 0].transpose(2, 3, 1, 0)
        parts = zip(jnp.split(taps, 2, axis=-1), jnp.split(bias, 2), strict=True)
        both = jnp.stack([causal_conv.convolve(x, *part) for part in parts], axis=1)
        return both.reshape(-1, *both.shape[2:])

    def upsample(self, x: jax.Array, name: str, in_pairs: bool) -> jax.Array:
        """Twice the rows and the columns; these stay in pairs if so wanted."""
        x = causal_conv.upsampled(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.rows)
        self.rows = self.rows.doubled()
        if in_pairs:
            self.columns = 2
            return x
        return x.reshape(*x.shape[:2], 2 * x.shape[2], -1)
