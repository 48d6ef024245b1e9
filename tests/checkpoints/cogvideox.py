"""Tiny CogVideoX text-to-video checkpoints in the layouts of ``zai-org/CogVideoX1.5-5B``, ``-5b`` and ``-2b``.

Everything structural is as in the real ones (block kinds, norms, patch sizes, positions, causal VAE, shards with an
index, scheduler settings, the sizes the position grids refer to); only widths and depths are small. Eight heads, so
that eight devices can share them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from tests.checkpoints.folder import write_once
from tests.checkpoints.tokenizer import write_t5_tokenizer
from tests.checkpoints.wan21 import cast
from tests.checkpoints.weights import randomize

RECIPE_VERSION = 1  # raise it when the same options give other files
DIFFUSERS_VERSION = "0.32.0.dev0"

TEXT_ENCODER = {
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
TRANSFORMER = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,  # the rotary split gives time 4, height and width 6 each
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "num_attention_heads": 8,
    "num_layers": 3,
    "out_channels": 16,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": TEXT_ENCODER["d_model"],
    "time_embed_dim": 64,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16, 32],
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
SCHEDULER = {
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
# What tells the three repositories apart. 1.5 joins two latent frames to a token and cuts its rotary grid out of a
# larger one; 5b stretches its rotary grid to 480 × 720; 2b adds sin-cos positions instead.
VARIANTS = {
    "1.5-5b": {
        "transformer": {
            "patch_bias": False,
            "patch_size_t": 2,
            "sample_frames": 81,
            "sample_height": 300,
            "sample_width": 300,
            "use_rotary_positional_embeddings": True,
        },
        "vae": {"scaling_factor": 0.7},
        "scheduler": {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0},
    },
    "1.0-5b": {
        "transformer": {
            "sample_frames": 49,
            "sample_height": 60,
            "sample_width": 90,
            "use_rotary_positional_embeddings": True,
        },
        "vae": {"scaling_factor": 0.7},
        "scheduler": {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0},
    },
    "1.0-2b": {
        "transformer": {
            "sample_frames": 49,
            "sample_height": 60,
            "sample_width": 90,
            "use_rotary_positional_embeddings": False,
        },
        "vae": {"scaling_factor": 1.15258426},
        "scheduler": {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0},
    },
}


def write(
    dest: Path,
    *,
    variant: str = "1.5-5b",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 600_000,
    **overrides: dict,
) -> Path:
    """Write the checkpoint to the folder ``dest`` unless it is complete already; return its absolute path.

    ``variant`` is a key of :data:`VARIANTS`. ``dtype`` is that of all weights. Shards of transformer and text encoder
    hold at most ``shard_bytes``. ``overrides`` name a component and change its configuration:
    ``write(dest, transformer={"num_layers": 2})``. torch's random state is left as it was.
    """
    settings = configs(variant, overrides)
    recipe = {
        "writer": __name__,
        "version": RECIPE_VERSION,
        "seed": seed,
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        **settings,
    }
    return write_once(dest, recipe, lambda folder: _fill(folder, settings, seed, dtype, shard_bytes))


def configs(variant: str, overrides: dict[str, dict]) -> dict[str, dict]:
    """Configuration per component of a variant with ``overrides`` applied; refuses names that do not exist."""
    if variant not in VARIANTS:
        raise ValueError(f"expected one of {', '.join(VARIANTS)}; got {variant!r}")
    shared = {"text_encoder": TEXT_ENCODER, "transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER}
    if unknown := sorted(set(overrides) - set(shared)):
        raise TypeError(f"expected overrides for {', '.join(shared)}; got {', '.join(unknown)}")
    own = VARIANTS[variant]
    return {name: {**config, **own.get(name, {}), **overrides.get(name, {})} for name, config in shared.items()}


def _fill(folder: Path, configs: dict[str, dict], seed: int, dtype: torch.dtype, shard_bytes: int) -> None:
    vocab_size = write_t5_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights from the global generator
        text_encoder = _text_encoder(configs["text_encoder"], vocab_size, seed)
        transformer = _transformer(configs["transformer"], seed)
        vae = _vae(configs["vae"], seed)
    cast(text_encoder, dtype).save_pretrained(folder / "text_encoder", max_shard_size=shard_bytes)
    cast(transformer, dtype).save_pretrained(folder / "transformer", max_shard_size=shard_bytes)
    cast(vae, dtype).save_pretrained(folder / "vae")  # a single file, like the real one
    config_path = folder / "text_encoder" / "config.json"
    # The real file says so; transformers ties all the same, and saves ``true``.
    _write_json(config_path, {**json.loads(config_path.read_text()), "tie_word_embeddings": False})
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    _write_json(folder / "model_index.json", _model_index(configs["scheduler"]["_class_name"]))


def _model_index(scheduler: str) -> dict:
    return {
        "_class_name": "CogVideoXPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def _text_encoder(config: dict, vocab_size: int, seed: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    module = T5EncoderModel(T5Config(vocab_size=vocab_size, **config))
    std = {
        "shared.weight": 1.0,
        # T5 attention does not divide by sqrt(d_kv): the query projection has to be that much smaller.
        "SelfAttention.q.weight": 1 / math.sqrt(config["d_model"] * config["d_kv"]),
        "relative_attention_bias.weight": 0.5,
    }
    randomize(module, seed, std)
    return module


def _transformer(config: dict, seed: int) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    module = CogVideoXTransformer3DModel(**config)
    # Modulation of half the strength: scales vary around 1 and gates stay below it, as trained ones do.
    randomize(module, seed, {"linear.weight": 0.5 / math.sqrt(config["time_embed_dim"])})
    return module


def _vae(config: dict, seed: int) -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    module = AutoencoderKLCogVideoX(**config)
    # Pictures of moderate contrast: most values between black and white.
    randomize(module, seed, {"decoder.conv_out.conv.weight": 0.03})
    return module


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
