"""A tiny Wan 2.1 text-to-video checkpoint in the layout of ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``.

Everything structural is as in the real one (block kinds, norms, rotary axes, patch size, causal VAE, shards with an
index, scheduler settings); only widths and depths are small. Eight heads, so that eight devices can share them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from tests.checkpoints.folder import write_once
from tests.checkpoints.tokenizer import write_t5_tokenizer
from tests.checkpoints.weights import randomize

RECIPE_VERSION = 1  # raise it when the same options give other files
DIFFUSERS_VERSION = "0.33.0.dev0"  # what the real repository names

TEXT_ENCODER = {
    "d_model": 64,
    "d_kv": 8,
    "d_ff": 128,
    "num_layers": 3,
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
    "tokenizer_class": "T5Tokenizer",
}
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 8,
    "attention_head_dim": 12,  # the smallest whose rotary split gives time, height and width 4 each
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_ENCODER["d_model"],
    "freq_dim": 256,
    "ffn_dim": 256,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
# z_dim, latents_mean and latents_std stay at the library's defaults, which are the real Wan 2.1 values.
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write(
    dest: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 600_000,
    **overrides: dict,
) -> Path:
    """Write the checkpoint to the folder ``dest`` unless it is complete already; return its absolute path.

    ``dtype`` is that of transformer and text encoder (the real VAE is float32 always). Shards of these two hold at most
    ``shard_bytes``. ``overrides`` name a component and change its configuration:
    ``write(dest, transformer={"num_layers": 2}, vae={"base_dim": 16})``. torch's random state is left as it was.
    """
    settings = configs(overrides)
    recipe = {
        "writer": __name__,
        "version": RECIPE_VERSION,
        "seed": seed,
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        **settings,
    }
    return write_once(dest, recipe, lambda folder: fill(folder, settings, seed, dtype, shard_bytes))


def configs(overrides: dict[str, dict]) -> dict[str, dict]:
    """Configuration per component with ``overrides`` applied; refuses names that do not exist."""
    found = {"text_encoder": TEXT_ENCODER, "transformer": TRANSFORMER, "vae": VAE, "scheduler": SCHEDULER}
    if unknown := sorted(set(overrides) - set(found)):
        raise TypeError(f"expected overrides for {', '.join(found)}; got {', '.join(unknown)}")
    return {name: {**config, **overrides.get(name, {})} for name, config in found.items()}


def fill(
    folder: Path,
    configs: dict[str, dict],
    seed: int,
    dtype: torch.dtype,
    shard_bytes: int,
    index: dict = MODEL_INDEX,
) -> None:
    """Write every component and ``model_index.json`` into ``folder``."""
    vocab_size = write_t5_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights from the global generator
        text_encoder = _text_encoder(configs["text_encoder"], vocab_size, seed)
        denoiser = transformer(configs["transformer"], seed)
        vae = _vae(configs["vae"], seed)
    cast(text_encoder, dtype).save_pretrained(folder / "text_encoder", max_shard_size=shard_bytes)
    cast(denoiser, dtype).save_pretrained(folder / "transformer", max_shard_size=shard_bytes)
    vae.save_pretrained(folder / "vae")  # a single file, like the real one
    _untie_in_config(folder / "text_encoder" / "config.json")
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    _write_json(folder / "model_index.json", index)


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast what Diffusers would cast: it keeps some modules (norms, time embedding) in float32 whatever the dtype."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, parameter in module.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return module


def _untie_in_config(path: Path) -> None:
    """The real file says ``tie_word_embeddings: false``; transformers ties all the same, and saves ``true``."""
    _write_json(path, {**json.loads(path.read_text()), "tie_word_embeddings": False})


def _text_encoder(config: dict, vocab_size: int, seed: int) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    module = UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **config))
    std = {
        "shared.weight": 1.0,
        # T5 attention does not divide by sqrt(d_kv): the query projection has to be that much smaller.
        "SelfAttention.q.weight": 1 / math.sqrt(config["d_model"] * config["d_kv"]),
        "relative_attention_bias.weight": 0.5,
    }
    randomize(module, seed, std)
    return module


def transformer(config: dict, seed: int) -> torch.nn.Module:
    """A WanTransformer3DModel with seeded weights that keep activations of order one."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(**config)
    randomize(module, seed, {"scale_shift_table": 0.2, "time_proj.weight": 0.5 / math.sqrt(_inner_dim(config))})
    return module


def _inner_dim(config: dict) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _vae(config: dict, seed: int) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    module = AutoencoderKLWan(**config)
    randomize(module, seed)
    return module


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
