"""A tiny Wan 2.2 image-to-video checkpoint in the layout of ``Wan-AI/Wan2.2-I2V-A14B-Diffusers``.

Two experts of the tiny Wan 2.1 transformer's shape, with 36 input channels: 16 noisy, 16 of the picture, 4 of the mask.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints import wan21
from tests.checkpoints.folder import write_once

RECIPE_VERSION = 1
MODEL_INDEX = {
    **wan21.MODEL_INDEX,
    "_class_name": "WanImageToVideoPipeline",
    "_diffusers_version": "0.35.0.dev0",
    "boundary_ratio": 0.9,
    "image_encoder": [None, None],
    "image_processor": [None, None],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
}


def write(
    dest: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 600_000,
    boundary_ratio: float = 0.9,
    **overrides: dict,
) -> Path:
    """Write the checkpoint to the folder ``dest`` unless it is complete already; arguments as in ``wan21.write``."""
    overrides = {**overrides, "transformer": {"in_channels": 36, **overrides.get("transformer", {})}}
    configs = wan21.configs(overrides)
    index = {**MODEL_INDEX, "boundary_ratio": boundary_ratio}
    recipe = {
        "writer": __name__,
        "version": (RECIPE_VERSION, wan21.RECIPE_VERSION),
        "seed": seed,
        "dtype": str(dtype),
        "shard_bytes": shard_bytes,
        "boundary_ratio": boundary_ratio,
        **configs,
    }

    def fill(folder: Path) -> None:
        wan21.fill(folder, configs, seed, dtype, shard_bytes, index)
        with torch.random.fork_rng(devices=[]):
            second = wan21.transformer(configs["transformer"], seed + 1)
        wan21.cast(second, dtype).save_pretrained(folder / "transformer_2", max_shard_size=shard_bytes)

    return write_once(dest, recipe, fill)
