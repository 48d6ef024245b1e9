"""CogVideoX's components as device modules: T5 text encoder, transformer (1.5 and 1.0), causal video autoencoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from comfyui_tpu.models import cogvideox_decoder, plans
from comfyui_tpu.models.cogvideox_block import prepare_blocks
from comfyui_tpu.models.video_decoder import SpreadAutoencoder
from comfyui_tpu.runtime import bridge, causal
from comfyui_tpu.runtime.device_module import ComponentSpec, DeviceModule
from comfyui_tpu.runtime.errors import InvalidInput
from comfyui_tpu.runtime.skeleton import Scan

FRAMES_PER_LATENT = 4


def _build_text_encoder(config: dict) -> torch.nn.Module:
    """T5 whose blocks are all alike: the position bias, which only the first one owns, moves out of it.

    So that they run as one scan; the bias is the same for all of them.
    """
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel._from_config(T5Config.from_dict(config), attn_implementation="eager")
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    encoder.relative_attention_bias = attention.relative_attention_bias
    del attention.relative_attention_bias
    for block in encoder.encoder.block:
        block.register_forward_hook(lambda block, args, outputs: outputs[0])  # the activations, not the bias again
    return encoder


class _AddPositions(torch.nn.Module):
    """Adds sin-cos positions to the embedded tokens. Takes the place of a dropout, which does nothing at inference."""

    positions: torch.Tensor | None = None

    @contextlib.contextmanager
    def given(self, positions: torch.Tensor | None) -> Iterator[None]:
        self.positions = positions
        try:
            yield
        finally:
            self.positions = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.positions is None else x + self.positions.to(x.dtype)


def _build_transformer(config: dict) -> torch.nn.Module:
    """The stock transformer; sin-cos positions (CogVideoX-2b) come as an input instead of a table.

    The table fits one size and takes 136 MB on every chip; the stock module recomputes it for any other size, in
    float64, which a trace does not have.
    """
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_config(config)
    prepare_blocks(transformer)
    transformer.embedding_dropout = _AddPositions()
    if not transformer.config.use_rotary_positional_embeddings:
        transformer.patch_embed.use_positional_embeddings = False
        del transformer.patch_embed.pos_embedding
    return transformer


def _build_vae(config: dict) -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX.from_config(config)


def _encode_text(encoder, input_ids, buckets):
    """Ids ``[B, S]``, distance buckets ``[S, S]`` → ``[B, S, d_model]``. CogVideoX attends to the padding too."""
    stack = encoder.encoder
    bias = encoder.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
    hidden_states = stack.embed_tokens(input_ids)
    for block in stack.block:
        hidden_states = block(hidden_states, None, bias)
    return stack.final_layer_norm(hidden_states)


def _denoise(transformer, hidden_states, encoder_hidden_states, timestep, rotary=None, positions=None):
    dtype = transformer.proj_out.weight.dtype
    with transformer.embedding_dropout.given(positions):
        velocity = transformer(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return velocity.float()


def _encode_chunk(vae, x, state=None):
    """Frames ``[B, 3, T, H, W]`` → moments ``[B, 32, T/4, H/8, W/8]`` float32 and new state."""
    moments, cache = vae.encoder(x.to(vae.encoder.conv_in.conv.weight.dtype), conv_cache=state)
    return moments.float(), _over_time(cache)


def _over_time(cache: Any) -> Any:
    """The caches that the next chunk reads: two frames of each convolution over time.

    The stock norms also return their whole input, for convolutions (``conv_y``, ``conv_b``) that never look back.
    """
    if not isinstance(cache, dict):
        return cache
    return {name: _over_time(entry) for name, entry in cache.items() if name not in ("conv_y", "conv_b")}


TEXT_ENCODER = ComponentSpec(
    name="text_encoder",
    build=_build_text_encoder,
    methods={"encode": _encode_text},
    plans=plans.of_t5,
    config_class="T5EncoderModel",
    stacked=("encoder.block",),
    # Where the checkpoint stores the position bias that was moved out of the first block.
    prefixes=("", "encoder.block.0.layer.0.SelfAttention."),
)

TRANSFORMER = ComponentSpec(
    name="transformer",
    build=_build_transformer,
    methods={"denoise": _denoise},
    plans=plans.of_video_transformer,
    config_class="CogVideoXTransformer3DModel",
    stacked=(Scan("transformer_blocks", carry=("hidden_states", "encoder_hidden_states")),),
)

VAE = ComponentSpec(
    name="vae",
    build=_build_vae,
    methods={
        "decode_first": cogvideox_decoder.decode,
        "decode_next": cogvideox_decoder.decode,
        "encode_first": _encode_chunk,
        "encode_next": _encode_chunk,
    },
    plans=plans.of_autoencoder,
    config_class="AutoencoderKLCogVideoX",
)


class CogVideoXTextEncoder(DeviceModule):
    """Called as ``T5EncoderModel``: ids ``[B, 226]`` → ``[0]`` ``[B, 226, d_model]``."""

    def __call__(self, input_ids: torch.Tensor):
        from transformers.modeling_outputs import BaseModelOutput

        out = self.run("encode", {"input_ids": input_ids, "buckets": self._buckets(input_ids.shape[1])})
        return BaseModelOutput(last_hidden_state=bridge.to_torch(out))

    def _buckets(self, length: int) -> torch.Tensor:
        """T5's bucket for each pair of tokens, ``[length, length]``.

        Made here, not in the program: distances of 16, 32, 64 lie exactly on a border between two buckets, and on which
        side a device's logarithm puts them would be chance.
        """
        from transformers.models.t5.modeling_t5 import T5Attention

        position = torch.arange(length)
        return T5Attention._relative_position_bucket(
            position[None, :] - position[:, None],
            bidirectional=True,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )


class CogVideoXTransformer(DeviceModule):
    """Called as ``CogVideoXTransformer3DModel``: latents ``[B, T, 16, h, w]`` → velocity of that shape, float32."""

    # Sin-cos positions of the last size, on the devices: for a real video they are too many to make and send each step.
    # Every run has its own copy of this object (with_options), which takes them along when it goes.
    _placed_positions: tuple[torch.Size, Any] | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        """``image_rotary_emb``: cosines and sines ``[tokens, head_dim]``, without the text's tokens."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if attention_kwargs:
            raise InvalidInput(f"attention_kwargs are not supported on the TPU; got {sorted(attention_kwargs)}.")
        inputs = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "timestep": timestep,
        }
        if image_rotary_emb is not None:
            inputs["rotary"] = image_rotary_emb
        elif not self.config.use_rotary_positional_embeddings:
            inputs["positions"] = self._positions(hidden_states.shape)
        sample = bridge.to_torch(self.run("denoise", inputs))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _positions(self, shape: torch.Size) -> Any:
        """Sin-cos positions ``[1, 226 + tokens, inner_dim]`` for latents of ``shape``, placed; zero for the text."""
        if self._placed_positions is None or self._placed_positions[0] != shape:
            _, frames, _, height, width = shape
            embed = self.skeleton.module.patch_embed
            positions = embed._get_positional_embeddings(height, width, (frames - 1) * FRAMES_PER_LATENT + 1)
            self._placed_positions = (shape, self._place(positions))
        return self._placed_positions[1]


class CogVideoXVAE(SpreadAutoencoder):
    """Called as ``AutoencoderKLCogVideoX``: ``encode`` and ``decode`` in the stock module's own chunks.

    Its norms see a whole chunk, so another division would give other pictures: two latent (or eight real) frames, and
    what is left over belongs to the first chunk.
    """

    def decode(self, z: torch.Tensor, return_dict: bool = True):
        """Latents ``[B, 16, T, h, w]`` → frames ``[B, 3, 4·(T-1)+1 (T odd) or 4·T (T even), 8·h, 8·w]`` in -1..1."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        first = 2 + z.shape[2] % 2
        chunking = causal.Chunking("decode_first", "decode_next", first, 2, lambda n: 4 * n, "decoding frames")
        frames = self.decoded(z, chunking)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        """Frames ``[B, 3, 8·n or 8·n+1, H, W]`` in -1..1 → distribution of latents ``[B, 16, 2·n (+1), H/8, W/8]``."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        first = 8 + x.shape[2] % 8
        chunking = causal.Chunking("encode_first", "encode_next", first, 8, lambda n: n // 4, "encoding frames")
        posterior = DiagonalGaussianDistribution(causal.run(self, chunking, x.float()))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)
