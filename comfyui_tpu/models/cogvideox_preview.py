"""Factors from CogVideoX latents to RGB, for previews.

ComfyUI has none for CogVideoX, so they are fitted from the opened checkpoint itself: its encoder turns a fixed set of
synthetic pictures into latents, and a linear least-squares regression predicts from each latent (and a constant) the
mean colour of the 8 × 8 pixels it stands for.

The encoder runs once in torch on the CPU: 16 pictures of 64 × 64 pixels are little work, while on the TPU they would
need a program of their own, compiled for this alone, and room in the HBM beside the transformer.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from comfyui_tpu.runtime.checkpoint import Checkpoint

log = logging.getLogger(__name__)

PICTURE_SIZE = 64
PICTURES_OF_EACH_KIND = 4
# Keeps the factors bounded where the latents of the synthetic pictures do not vary; small against trained latents,
# whose variance is of order one.
RIDGE = 1e-3


def rgb_factors(vae_folder: Path, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """``(factors [C, 3], bias [3])`` float32 with ``latents · factors + bias`` ≈ RGB in -1..1.

    Latents are the autoencoder's own, with the scale divided out. A preview is a courtesy that must not end a run: if
    the fit fails, the reason is logged and all factors are zero (a grey picture).
    """
    try:
        pictures = synthetic_pictures()
        return fit(encode(vae_folder, config, pictures), pictures)
    except Exception:
        log.warning("Previews of CogVideoX stay grey: their colours could not be fitted", exc_info=True)
        return torch.zeros(config.get("latent_channels", 16), 3), torch.zeros(3)


def synthetic_pictures() -> torch.Tensor:
    """``[N, 3, 64, 64]`` in -1..1, the same every time: flat colours, gradients, smooth noise, coloured tiles."""
    generator = torch.Generator("cpu").manual_seed(0)

    def enlarged(cells: int, mode: str) -> torch.Tensor:
        colours = torch.rand(PICTURES_OF_EACH_KIND, 3, cells, cells, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(colours, size=(PICTURE_SIZE, PICTURE_SIZE), mode=mode)

    return torch.cat(
        [enlarged(1, "nearest"), enlarged(2, "bilinear"), enlarged(5, "bicubic").clamp(-1, 1), enlarged(4, "nearest")]
    )


def encode(vae_folder: Path, config: dict, pictures: torch.Tensor) -> torch.Tensor:
    """Mean latents ``[N, C, H/8, W/8]`` of ``pictures`` ``[N, 3, H, W]``, each a video of one frame."""
    encoder = _load_encoder(vae_folder, config)
    with torch.inference_mode():
        moments, _ = encoder(pictures.unsqueeze(2))
        return moments.chunk(2, dim=1)[0].squeeze(2)


def _load_encoder(vae_folder: Path, config: dict) -> torch.nn.Module:
    """The encoder alone, in torch, with its weights in float32."""
    from diffusers import AutoencoderKLCogVideoX

    # On meta: no initial values are drawn that the checkpoint's would replace.
    with torch.device("meta"):
        encoder = AutoencoderKLCogVideoX.from_config(config).encoder
    checkpoint = Checkpoint.open(vae_folder)
    weights = {
        name: torch.from_numpy(checkpoint.read(f"encoder.{name}").astype(np.float32)) for name in encoder.state_dict()
    }
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval().requires_grad_(False)


def fit(latents: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares from latents ``[N, C, h, w]`` to the mean colours of their patches of ``[N, 3, H, W]``."""
    if not torch.isfinite(latents).all():
        raise ArithmeticError("the encoder produced NaN or infinity")
    colours = torch.nn.functional.adaptive_avg_pool2d(pictures, latents.shape[-2:])
    x, y = (t.movedim(1, -1).flatten(0, 2).double() for t in (latents, colours))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    factors = torch.linalg.solve(x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y / len(x))
    return factors.float(), (y_mean - x_mean @ factors).float()
