"""Wan's video decoder with channels last, rows spread over the devices: the stock decoder's arithmetic and weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import torch

from comfyui_tpu.models import video_decoder
from comfyui_tpu.models.video_decoder import State
from comfyui_tpu.ops import attention, causal_conv
from comfyui_tpu.ops.causal_conv import PAST, Rows
from comfyui_tpu.runtime import bridge


def decode(vae: torch.nn.Module, x: torch.Tensor, state: list[torch.Tensor] | None = None):
    """While tracing: latents ``[1, 16, T, h, w]`` → frames ``[1, 3, 4·T, 8·h, 8·w]`` in -1..1, and the new state.

    Without a state it is a video's first latent frame alone, which makes one frame. The state is what every convolution
    over time has seen last: zeros where there was nothing yet.
    """
    parts = {"": vae.decoder, "post_quant_conv.": vae.post_quant_conv}
    scale = 2 ** (len(vae.decoder.up_blocks) - 1)
    return video_decoder.decode(functools.partial(_frames, vae.decoder), parts, x, state, scale)


def _frames(decoder: torch.nn.Module, rows: Rows, weights: dict, x: jax.Array, state: State | None):
    """One device's part: ``[T, S, U, 16]`` → ``[4·T, 8·S, 4·U, 2·3]`` (columns in pairs), and its part of the state."""
    run = _Pass(weights, rows, state)
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


class _Pass(video_decoder.Pass):
    """One pass through Wan's decoder."""

    def past_of(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The frames before ``x``, and ``x``, whose last ones are the past of the next chunk."""
        past = next(self.old) if self.old is not None else jnp.zeros((PAST, *x.shape[1:]), x.dtype)
        return past, self.after(past, x)

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
            return self.convolved(self.with_neighbours(past, x), name, residual, to_colours)
        gain, kernel = self.weights[f"{norm}.gamma"].reshape(-1), bridge.current_trace().on_tpu
        wide = causal_conv.normed_columns(past, x, gain, self.rows, self.columns, kernel)
        return self.convolved(wide, name, residual, to_colours)

    def resnet(self, x: jax.Array, name: str) -> jax.Array:
        # The residual is what has its past, so that XLA does not lay out twice what it was before.
        past, x = self.past_of(x)
        residual = self.shortcut(x, name)
        x = self.causal(past, x, f"{name}.conv1", f"{name}.norm1")
        return self.causal(*self.past_of(x), f"{name}.conv2", f"{name}.norm2", residual)

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
        return causal_conv.by_turns([causal_conv.convolve(x, *part) for part in parts], 0)
