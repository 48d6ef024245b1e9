"""Flux.2's components as device modules: Mistral-3 text encoder, transformer, autoencoder."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from comfyui_tpu.models import plans
from comfyui_tpu.models.flux2_attention import split_projections
from comfyui_tpu.runtime import bridge
from comfyui_tpu.runtime.checkpoint import Checkpoint, explained_settings
from comfyui_tpu.runtime.device_module import ComponentSpec, DeviceModule
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput
from comfyui_tpu.runtime.plan import Plan, spread, tensor
from comfyui_tpu.runtime.skeleton import Scan

# Which hidden states of the text encoder make the prompt embeddings; later layers are neither loaded nor run.
HIDDEN_STATES = (10, 20, 30)
TEXT_LAYERS = max(HIDDEN_STATES)


def _build_text_encoder(config: dict) -> torch.nn.Module:
    """The language model up to the last layer that is asked for, without its final norm."""
    from transformers import AutoModel

    text = _text_config(config)
    text.num_hidden_layers = TEXT_LAYERS
    module = AutoModel.from_config(text, attn_implementation="sdpa")
    module.norm = torch.nn.Identity()
    return module


def _text_config(config: dict) -> Any:
    from transformers import Mistral3Config

    text = Mistral3Config.from_dict(config).text_config
    if text.num_hidden_layers <= TEXT_LAYERS:
        # With exactly that many, the last hidden state would be another one: the one behind the final norm.
        raise CheckpointError(
            f"The text encoder must have more than {TEXT_LAYERS} layers (hidden states {HIDDEN_STATES} are used); "
            f"got {text.num_hidden_layers}. Check that this is a FLUX.2-dev checkpoint."
        )
    return text


def _build_transformer(config: dict) -> torch.nn.Module:
    """The stock transformer; with bfloat16 weights its time embedding and modulation are computed in float32.

    The stock forward casts the timestep to the dtype of the latents it is given, and bfloat16 cannot tell 0.730 from
    0.732. So the latents come in float32 and are cast behind the first projection instead.
    """
    from diffusers import Flux2Transformer2DModel

    module = Flux2Transformer2DModel.from_config(config)
    split_projections(module)
    for layer in (module.x_embedder, module.context_embedder):
        layer.register_forward_pre_hook(_cast_input)
    modulations = (module.double_stream_modulation_img, module.double_stream_modulation_txt)
    for layer in (*modulations, module.single_stream_modulation):
        layer.register_forward_hook(_cast_output)
    return module


def _cast_input(layer: torch.nn.Linear, args: tuple) -> tuple:
    return (args[0].to(layer.weight.dtype),)


def _cast_output(modulation: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out.to(modulation.linear.weight.dtype)


def _build_vae(config: dict) -> torch.nn.Module:
    from diffusers import AutoencoderKLFlux2

    module = AutoencoderKLFlux2.from_config(config)
    del module.bn  # its statistics are applied to latents on the host, as the pipeline does
    return module


def _encode_text(encoder, input_ids, attention_mask):
    """Ids and mask ``[B, S]`` → the hidden states asked for, each ``[B, S, hidden_size]``.

    The four-dimensional mask is the one transformers would make of the other; making it there needs its values.
    """
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    mask = (order <= order[:, None]) & attention_mask.bool()[:, None, None, :]
    (blocks,) = encoder.layers
    with blocks.recording() as recorded:
        encoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
    return tuple(recorded[0][number - 1] for number in HIDDEN_STATES)


def _denoise(transformer, **inputs):
    return transformer(**inputs, return_dict=False)[0]


def _decode(vae, z):
    return vae.decode(z, return_dict=False)[0]


def _encode(vae, x):
    return vae.encode(x, return_dict=False)[0].parameters


def _text_encoder_plans(chips: int, config: dict) -> tuple[Plan, ...]:
    return (tensor(chips, r"\.(q|k|v|gate|up)_proj\.", r"\.(o|down)_proj\."),)


def _transformer_plans(chips: int, config: dict) -> tuple[Plan, ...]:
    """A picture has few tokens for so many weights: they stay where they are, if every chip gets whole heads."""
    if config.get("num_attention_heads", 48) % chips:
        return (spread(chips),)
    outputs = r"(add_[qkv]_proj|to_[qkv]|linear_in|to_qkv_mlp_proj|context_embedder)\."
    return (tensor(chips, outputs, r"(to_out|to_add_out|linear_out)\.", shard_tokens=True), spread(chips))


TEXT_ENCODER = ComponentSpec(
    name="text_encoder",
    build=_build_text_encoder,
    methods={"encode": _encode_text},
    plans=_text_encoder_plans,
    config_class="Mistral3ForConditionalGeneration",
    stacked=("layers",),
    # What transformers 4 and 5 call the language model within Mistral3ForConditionalGeneration.
    prefixes=("language_model.model.", "model.language_model."),
    unused=(
        r"(^|\.)vision_tower\.",
        r"(^|\.)multi_modal_projector\.",
        r"(^|\.)lm_head\.",
        r"language_model\.(model\.)?norm\.",
        rf"\.layers\.({'|'.join(map(str, range(TEXT_LAYERS, 100)))})\.",
    ),
)

TRANSFORMER = ComponentSpec(
    name="transformer",
    build=_build_transformer,
    methods={"denoise": _denoise},
    plans=_transformer_plans,
    config_class="Flux2Transformer2DModel",
    stacked=(
        Scan("transformer_blocks", carry=("encoder_hidden_states", "hidden_states")),
        Scan("single_transformer_blocks", carry=("hidden_states",)),
    ),
)

VAE = ComponentSpec(
    name="vae",
    build=_build_vae,
    methods={"decode": _decode, "encode": _encode},
    plans=plans.of_autoencoder,
    config_class="AutoencoderKLFlux2",
    unused=(r"^bn\.",),
)


class Flux2TextEncoder(DeviceModule):
    """Called as ``Mistral3ForConditionalGeneration``; only ``.hidden_states`` 10, 20 and 30 come back."""

    def check_files(self) -> None:
        super().check_files()
        with explained_settings(self.folder):
            _text_config(self.raw_config)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any):
        """Ids and mask ``[B, 512]`` → ``.hidden_states[k]`` ``[B, 512, hidden_size]``."""
        if kwargs not in ({}, {"output_hidden_states": True, "use_cache": False}):
            raise InvalidInput(f"The text encoder only encodes prompts on the TPU; got {sorted(kwargs)}.")
        states = self.run("encode", {"input_ids": input_ids, "attention_mask": attention_mask})
        by_number = dict(zip(HIDDEN_STATES, map(bridge.to_torch, states), strict=True))
        return SimpleNamespace(hidden_states=by_number)


class Flux2Transformer(DeviceModule):
    """Called as ``Flux2Transformer2DModel``: tokens ``[B, S, 128]`` → predicted velocity ``[B, S, 128]`` float32."""

    velocity: torch.Tensor | None = None  # the last prediction of this copy (a run has its own, see with_options)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        """``timestep`` ``[B]`` in 0..1, ``guidance`` ``[B]``, ids ``[B, tokens, 4]`` (image, row, column, word)."""
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

        if joint_attention_kwargs:
            raise InvalidInput(f"attention_kwargs are not supported on the TPU; got {sorted(joint_attention_kwargs)}.")
        inputs = {
            "hidden_states": hidden_states.float(),
            "encoder_hidden_states": encoder_hidden_states.to(self.dtype),
            "timestep": timestep.float(),
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        sample = self.velocity = bridge.to_torch(self.run("denoise", given)).float()
        return Flux2Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class Flux2VAE(DeviceModule):
    """Called as ``AutoencoderKLFlux2``: ``encode`` and ``decode`` whole pictures; ``bn`` holds the statistics."""

    @functools.cached_property
    def bn(self) -> SimpleNamespace:
        """Batch-norm statistics of the latents on the CPU: ``running_mean`` and ``running_var`` ``[128]`` float32."""
        checkpoint = Checkpoint.open(self.folder)
        names = ("running_mean", "running_var")
        return SimpleNamespace(**{name: _statistic(checkpoint, f"bn.{name}") for name in names})

    def check_files(self) -> None:
        super().check_files()
        _ = self.bn

    def decode(self, z: torch.Tensor, return_dict: bool = True):
        """Latents ``[B, 32, h, w]`` → pictures ``[B, 3, 8·h, 8·w]`` in -1..1."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        # One by one: a decoder's activations are large, and a batch of any size shares one program.
        pictures = [bridge.to_torch(self.run("decode", {"z": latent})) for latent in z.to(self.dtype).split(1)]
        sample = torch.cat(pictures)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        """Pictures ``[B, 3, H, W]`` in -1..1 → distribution of latents ``[B, 32, H/8, W/8]``."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        posterior = DiagonalGaussianDistribution(bridge.to_torch(self.run("encode", {"x": x.to(self.dtype)})))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


def _statistic(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder} has no {name}, so it is no Flux.2 autoencoder. Download the checkpoint again."
        )
    return torch.from_numpy(checkpoint.read(name).astype(np.float32))
