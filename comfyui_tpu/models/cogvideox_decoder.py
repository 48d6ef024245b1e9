"""CogVideoX's video decoder with channels last, rows spread over the devices: the stock decoder's arithmetic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import torch

from comfyui_tpu.models import video_decoder
from comfyui_tpu.models.video_decoder import State
from comfyui_tpu.ops import causal_conv, chunk_norm
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
    x = run.conv_in()
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
    return run.normed(x, "norm_out", "conv_out", to_colours=True), run.state


def _twice_the_frames(x: jax.Array) -> jax.Array:
    """Every frame twice; the first of an odd number stays one."""
    single = x.shape[0] % 2
    return jnp.concatenate([x[:single], jnp.repeat(x[single:], 2, axis=0)])


def _last_frames(x: jax.Array) -> jax.Array:
    """The last frames of a video ``[T, S + 2, U, C]`` with neighbours, without these."""

    # Frame by frame, because XLA takes twice as long for a slice of both.
    def step(index: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(out, x[x.shape[0] - PAST + index, 1:-1], index, 0)

    return jax.lax.fori_loop(0, PAST, step, jax.lax.empty((PAST, x.shape[1] - 2, *x.shape[2:]), x.dtype))


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
        self.groups, self.eps = norm.num_groups, norm.eps
        self.latents, self.latent_rows = latents, rows

    def conv_in(self) -> jax.Array:
        past = next(self.old) if self.old is not None else jnp.concatenate([self.latents[:1]] * PAST)
        return self.convolved(self.with_neighbours(past, self.after(past, self.latents)), "conv_in.conv")

    def resnet(self, x: jax.Array, name: str) -> jax.Array:
        residual = self.shortcut(x, name)
        x = self.normed(x, f"{name}.norm1", f"{name}.conv1")
        return self.normed(x, f"{name}.norm2", f"{name}.conv2", residual)

    def normed(
        self, x: jax.Array, norm: str, conv: str, residual: jax.Array | None = None, to_colours: bool = False
    ) -> jax.Array:
        """The group norm over the whole chunk, SiLU and a 3 × 3 × 3 convolution."""
        statistics = chunk_norm.group_statistics(x, self.rows, self.groups, self.eps, self.columns)
        x = chunk_norm.modulated(x, *statistics, *self._modulation(norm, x.shape[2]))
        past = next(self.old) if self.old is not None else jnp.concatenate([x[PAST : PAST + 1, 1:-1]] * PAST)
        x = x.at[:PAST, 1:-1].set(past)
        x = self.rows.filled_in(self.keep(x, _last_frames(x)))
        return self.convolved(causal_conv.with_columns(x, self.columns), f"{conv}.conv", residual, to_colours)

    def _modulation(self, name: str, width: int) -> tuple[jax.Array, jax.Array]:
        """What a norm is multiplied by and what is added, ``[T, S, width, columns·C]`` float32.

        The stock decoder convolves (1 × 1 × 1) latents that it has enlarged to the video; here only the columns are.
        Nothing is left of rows that are none, so that the convolution sees zeros there.
        """
        latents = jnp.repeat(self.latents, width // self.latents.shape[2], axis=2)
        factor, shift = (self._of_latents(latents, f"{name}.conv_{kind}.conv") for kind in "yb")
        gain, offset = (self._lanes(f"{name}.norm_layer.{kind}") for kind in ("weight", "bias"))
        return self.latent_rows.real(factor * gain), self.latent_rows.real(shift + factor * offset)

    def _of_latents(self, latents: jax.Array, name: str) -> jax.Array:
        weight = self.weights[f"{name}.weight"]
        matrix = jnp.tile(weight.reshape(weight.shape[:2]).T, self.columns)
        return jnp.matmul(latents, matrix, preferred_element_type=jnp.float32) + self._lanes(f"{name}.bias")

    def _lanes(self, name: str) -> jax.Array:
        return jnp.tile(self.weights[name].astype(jnp.float32), self.columns)
