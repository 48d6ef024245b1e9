"""CogVideoX's video decoder with channels last, rows spread over the devices: the stock decoder's arithmetic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import torch

from comfyui_tpu.models import video_decoder
from comfyui_tpu.models.video_decoder import State
from comfyui_tpu.ops import causal_conv
from comfyui_tpu.ops.causal_conv import PAST, Rows


def decode(vae: torch.nn.Module, x: torch.Tensor, state: list[torch.Tensor] | None = None):
    """While tracing: latents ``[1, 16, T, h, w]`` → frames ``[1, 3, 4·T or 4·(T-1)+1, 8·h, 8·w]``, and the new state.

    An odd number of latent frames begins with one that makes a single frame. The state is what every convolution over
    time has seen last, after its norm: without one it is a video's first chunk, whose first frame stands for the past.
    """
    scale = 2 ** (len(vae.decoder.up_blocks) - 1)
    return video_decoder.decode(functools.partial(_frames, vae.decoder), {"": vae.decoder}, x, state, scale)


def _frames(decoder: torch.nn.Module, rows: Rows, weights: dict, x: jax.Array, state: State | None):
    """One device's part: ``[T, S, U, 16]`` → ``[4·T, 8·S, 4·U, 2·3]`` (columns in pairs), and its part of the state."""
    run = _Pass(decoder.norm_out.norm_layer, x, weights, rows, state)
    x = run.causal(x, "conv_in")
    for index in range(len(decoder.mid_block.resnets)):
        x = run.resnet(x, f"mid_block.resnets.{index}")
    last = len(decoder.up_blocks) - 1
    for number, block in enumerate(decoder.up_blocks):
        for index in range(len(block.resnets)):
            x = run.resnet(x, f"up_blocks.{number}.resnets.{index}")
        if number < last:
            x = run.upsample(x, f"up_blocks.{number}.upsamplers.0.conv", in_pairs=number == last - 1)
            # After the convolution, which is of each frame alone.
            x = _twice_the_frames(x) if block.upsamplers[0].compress_time else x
    return run.causal(run.norm(x, "norm_out"), "conv_out", to_colours=True), run.state


def _twice_the_frames(x: jax.Array, times: int = 2) -> jax.Array:
    """Every frame ``times`` times; the first of an odd number stays one."""
    single = x.shape[0] % 2
    return jnp.concatenate([x[:single], jnp.repeat(x[single:], times, axis=0)])


class _Pass(video_decoder.Pass):
    """One pass through CogVideoX's decoder. All its norms are scaled and shifted by the latents."""

    def __init__(
        self,
        norm: torch.nn.GroupNorm,
        latents: jax.Array,
        weights: dict[str, jax.Array],
        rows: Rows,
        state: State | None,
    ):
        super().__init__(weights, rows, state)
        self.groups, self.eps, self.latents = norm.num_groups, norm.eps, latents

    def causal(self, x: jax.Array, name: str, residual: jax.Array | None = None, to_colours: bool = False) -> jax.Array:
        past = next(self.old) if self.old is not None else jnp.concatenate([x[:1]] * PAST)
        x = self.rows.with_neighbours(self.after(past, x))
        return self.convolved(x, f"{name}.conv", residual, to_colours)

    def resnet(self, x: jax.Array, name: str) -> jax.Array:
        shortcut = f"{name}.conv_shortcut"
        residual = self.pointwise(x, shortcut) if f"{shortcut}.weight" in self.weights else x
        x = self.causal(self.norm(x, f"{name}.norm1"), f"{name}.conv1")
        return self.causal(self.norm(x, f"{name}.norm2"), f"{name}.conv2", residual)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """The group norm over the whole chunk, scaled and shifted by what the latents say of each place, then SiLU."""
        mean, scale = causal_conv.group_statistics(x, self.rows, self.groups, self.eps, self.columns)
        gain, offset = (self.weights[f"{name}.norm_layer.{kind}"].astype(jnp.float32) for kind in ("weight", "bias"))
        factor, shift = self._of_latents(f"{name}.conv_y.conv"), self._of_latents(f"{name}.conv_b.conv")
        shift = self._spread(shift + factor * offset, x.shape)
        factor = self._spread(factor * gain, x.shape)
        places = x.reshape(*factor.shape[:2], -1, *x.shape[2:])
        normed = (places.astype(jnp.float32) - mean) * (factor * scale)[:, :, None] + shift[:, :, None]
        return jax.nn.silu(normed).astype(x.dtype).reshape(x.shape)

    def _of_latents(self, name: str) -> jax.Array:
        """A 1 × 1 × 1 convolution of the latents, ``[T, S, U, C]`` float32 at their own size."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"].astype(jnp.float32)
        matrix = weight.reshape(weight.shape[:2]).T
        return jnp.matmul(self.latents, matrix, preferred_element_type=jnp.float32) + bias

    def _spread(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """To the frames and columns of a video of ``shape``, ``[T, S, U, columns·C]``; the rows stay the latents'."""
        single = y.shape[0] % 2
        times = (shape[0] - single) // max(y.shape[0] - single, 1)
        y = jnp.repeat(y, shape[2] // y.shape[2], axis=2)
        return _twice_the_frames(jnp.tile(y, self.columns), times)
