"""A tiny Flux.2 checkpoint in the layout of ``black-forest-labs/FLUX.2-dev``.

Everything structural is as in the real one (block kinds, rotary axes, grouped-query text encoder with a vision tower
beside it, batch-norm statistics, shards with an index, scheduler settings); only widths and depths are small. Eight
heads, so that eight devices can share them, and a few text layers past the last one that is used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from tests.checkpoints.folder import write_once
from tests.checkpoints.mistral_tokenizer import write_processor
from tests.checkpoints.weights import randomize

RECIPE_VERSION = 2  # raise it when the same options give other files
DIFFUSERS_VERSION = "0.36.0.dev0"  # what the real repository names

TEXT_ENCODER = {
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 8,  # as in the real one, heads × head_dim is not hidden_size
        "hidden_act": "silu",
        "hidden_size": 80,
        "intermediate_size": 160,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 8,
        "num_hidden_layers": 33,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "vision_config": {
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "image_size": 1540,
        "intermediate_size": 64,
        "model_type": "pixtral",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
}
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 8,
    "joint_attention_dim": 3 * TEXT_ENCODER["text_config"]["hidden_size"],
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (4, 4, 4, 4),
    "rope_theta": 2000,
    "eps": 1e-6,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "latent_channels": 32,
    "norm_num_groups": 4,
    "sample_size": 1024,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
MODEL_INDEX = {
    "_class_name": "Flux2Pipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
    "tokenizer": ["transformers", "PixtralProcessor"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def write(
    dest: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 3_000_000,
    **overrides: dict,
) -> Path:
    """Write the checkpoint to the folder ``dest`` unless it is complete already; return its absolute path.

    All weights have ``dtype`` (bfloat16 in the real one). Shards of transformer and text encoder hold at most
    ``shard_bytes``. ``overrides`` name a component and change its configuration:
    ``write(dest, transformer={"num_layers": 1}, vae={"layers_per_block": 1})``. torch's random state is left as it was.
    """
    configs = _configs(overrides)
    recipe = {
        "writer": __name__,
        "version": RECIPE_VERSION,
        "seed": seed,
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        **configs,
    }
    return write_once(dest, recipe, lambda folder: _fill(folder, configs, seed, dtype, shard_bytes))


def _configs(overrides: dict[str, dict]) -> dict[str, dict]:
    """Configuration per component with ``overrides`` applied; refuses names that do not exist."""
    configs = {"text_encoder": TEXT_ENCODER, "transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER}
    if unknown := sorted(set(overrides) - set(configs)):
        raise TypeError(f"expected overrides for {', '.join(configs)}; got {', '.join(unknown)}")
    return {name: {**config, **overrides.get(name, {})} for name, config in configs.items()}


def _fill(folder: Path, configs: dict[str, dict], seed: int, dtype: torch.dtype, shard_bytes: int) -> None:
    vocab_size = write_processor(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights from the global generator
        text_encoder = _text_encoder(configs["text_encoder"], vocab_size, seed)
        transformer = _transformer(configs["transformer"], seed)
        vae = _vae(configs["vae"], seed)
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder", max_shard_size=shard_bytes)
    transformer.to(dtype).save_pretrained(folder / "transformer", max_shard_size=shard_bytes)
    vae.to(dtype).save_pretrained(folder / "vae")  # a single file, like the real one
    _write_json(folder / "text_encoder" / "config.json", _as_stored(configs["text_encoder"], vocab_size, dtype))
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    _write_json(folder / "model_index.json", MODEL_INDEX)


def _as_stored(config: dict, vocab_size: int, dtype: torch.dtype) -> dict:
    """The text encoder's config.json in the words of transformers 4, which wrote the real one (``rope_theta``)."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": "mistral3",
        "transformers_version": "4.57.1",
        **config,
        "text_config": {**config["text_config"], "vocab_size": vocab_size},
    }


def _text_encoder(config: dict, vocab_size: int, seed: int) -> torch.nn.Module:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {**config["text_config"], "vocab_size": vocab_size}
    module = Mistral3ForConditionalGeneration(Mistral3Config(**{**config, "text_config": text}))
    randomize(module, seed, {"embed_tokens.weight": 1.0})
    return module


def _transformer(config: dict, seed: int) -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    module = Flux2Transformer2DModel(**config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # Shared by all blocks: at full size their products would grow from block to block.
    randomize(module, seed, {"modulation_img.linear.weight": 0.3 / math.sqrt(width)})
    # Sharper attention: with even weights the few tokens of a prompt would be lost among hundreds of others.
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
                parameter.mul_(2)
    return module


def _vae(config: dict, seed: int) -> torch.nn.Module:
    from diffusers import AutoencoderKLFlux2

    module = AutoencoderKLFlux2(**config)
    randomize(module, seed)
    generator = torch.Generator().manual_seed(seed)
    module.bn.running_mean.normal_(0.0, 0.3, generator=generator)
    module.bn.running_var.uniform_(0.5, 3.0, generator=generator)
    return module


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
