"""The real models by name: their configs, without weights, as the checkpoints on Hugging Face ship them.

Where a value's source is "default", it is the constructor's default in the installed Diffusers or transformers release
(the conversion script used it), and is left out here: the class itself fills it in.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfyui_tpu.models.common import Task
from comfyui_tpu.runtime.errors import PlanError


@dataclass(frozen=True)
class Entry:
    """One published model.

    Attributes:
        repository: on Hugging Face.
        task: what people ask of it by default: the sampler nodes' defaults (sizes as on the model card).
        configs: file in the checkpoint → its content.
    """

    repository: str
    task: Task
    configs: dict[str, dict[str, Any]]


# google/umt5-xxl: the model card's config; the same values stand in Wan-Video/Wan2.1, wan/modules/t5.py (umt5_xxl).
_UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 256384,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
}
# google/t5-v1_1-xxl, which Diffusers' scripts/convert_cogvideox_to_diffusers.py takes as it is.
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
}
# Mistral-Small-3.2-24B-Instruct-2506, FLUX.2-dev's text encoder: the language model's part of its config.json, as
# kohya-ss/musubi-tuner quotes it. The vision tower is neither loaded nor run.
_MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
}

# scripts/convert_wan_to_diffusers.py, "Wan-T2V-14B"; eps, norms, patch size and the rest: default.
_WAN_14B = {
    "_class_name": "WanTransformer3DModel",
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 4096,
}
# The same script, "Wan-T2V-1.3B".
_WAN_1_3B = {**_WAN_14B, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
# The same script, "Wan2.2-I2V-14B-720p": no image embeddings, and the condition's 20 channels besides.
_WAN_I2V_A14B = {**_WAN_14B, "in_channels": 36}
# convert_vae of the same script: every value is AutoencoderKLWan's default.
_WAN_VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16}
_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "flow_shift": 3.0,
}

# scripts/convert_cogvideox_to_diffusers.py: 42 layers and 48 heads "for 5B", rotary positions, scaling factor 0.7,
# snr_shift_scale 1.0; by version: 60 × 90 latents of 49 frames (1.0), 300 × 300 of 81 with temporal patches (1.5).
_COGVIDEOX_5B = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 48,
    "num_layers": 42,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "use_rotary_positional_embeddings": True,
}
_COGVIDEOX_1_5_5B = {
    **_COGVIDEOX_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
_COGVIDEOX_VAE = {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7}
_COGVIDEOX_DPM = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}

# Every value of FLUX.2-dev's transformer and autoencoder is Diffusers' default for its class.
_FLUX2 = {"_class_name": "Flux2Transformer2DModel", "num_layers": 8, "num_single_layers": 48}
_FLUX2_VAE = {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32}
_FLOW_MATCH = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def _checkpoint(index: dict, text_encoder: dict, transformer: dict, vae: dict, scheduler: dict) -> dict[str, dict]:
    experts = ("transformer", "transformer_2") if "transformer_2" in index else ("transformer",)
    return {
        "model_index.json": index,
        "text_encoder/config.json": text_encoder,
        **{f"{expert}/config.json": transformer for expert in experts},
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": scheduler,
    }


_WAN = {"_class_name": "WanPipeline"}
# Wan-AI/Wan2.2-I2V-A14B-Diffusers: two experts, the first down to 0.9 of the schedule (wan_i2v_A14B.py: boundary).
_WAN_I2V = {
    "_class_name": "WanImageToVideoPipeline",
    "boundary_ratio": 0.9,
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
}
_COGVIDEOX = {"_class_name": "CogVideoXPipeline"}

CATALOGUE = {
    "flux.2-dev": Entry(
        "black-forest-labs/FLUX.2-dev",
        Task(1024, 1024, 1, 50, 4.0),
        _checkpoint({"_class_name": "Flux2Pipeline"}, _MISTRAL_SMALL, _FLUX2, _FLUX2_VAE, _FLOW_MATCH),
    ),
    "cogvideox1.5-5b": Entry(
        "zai-org/CogVideoX1.5-5B",
        Task(720, 1280, 81, 50, 6.0),
        _checkpoint(_COGVIDEOX, _T5_XXL, _COGVIDEOX_1_5_5B, _COGVIDEOX_VAE, _COGVIDEOX_DPM),
    ),
    "cogvideox-5b": Entry(
        "zai-org/CogVideoX-5b",
        Task(480, 720, 49, 50, 6.0),
        _checkpoint(_COGVIDEOX, _T5_XXL, _COGVIDEOX_5B, _COGVIDEOX_VAE, _COGVIDEOX_DPM),
    ),
    "wan2.1-t2v-14b": Entry(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        Task(720, 1280, 81, 50, 5.0),
        _checkpoint(_WAN, _UMT5_XXL, _WAN_14B, _WAN_VAE, _UNIPC),
    ),
    "wan2.1-t2v-1.3b": Entry(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        Task(480, 832, 81, 50, 5.0),
        _checkpoint(_WAN, _UMT5_XXL, _WAN_1_3B, _WAN_VAE, _UNIPC),
    ),
    "wan2.2-i2v-a14b": Entry(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        Task(720, 1280, 81, 40, 3.5),
        _checkpoint(_WAN_I2V, _UMT5_XXL, _WAN_I2V_A14B, _WAN_VAE, _UNIPC),
    ),
}

_LAYER_KEYS = ("num_layers", "num_single_layers")


def entry(name: str) -> Entry:
    """The model called ``name`` (PlanError with all names if there is none)."""
    if name not in CATALOGUE:
        raise PlanError(f"model must be one of {', '.join(CATALOGUE)}, or a checkpoint folder; got {name!r}.")
    return CATALOGUE[name]


def write(configs: dict[str, dict], folder: Path) -> Path:
    """``configs`` as files below ``folder``; returns it."""
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def with_blocks(configs: dict[str, dict], blocks: int) -> dict[str, dict]:
    """The same checkpoint with ``blocks`` blocks of each kind in its transformers."""
    cut = copy.deepcopy(configs)
    for name, config in cut.items():
        if name.startswith("transformer"):
            config.update({key: min(blocks, config[key]) for key in _LAYER_KEYS if key in config})
    return cut
