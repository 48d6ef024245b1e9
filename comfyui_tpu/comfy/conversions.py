"""Values between nodes, in core's own contract: CONDITIONING, LATENT, IMAGE. Everything wrong is refused here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from comfyui_tpu.runtime.errors import InvalidInput, NumericsError

if TYPE_CHECKING:
    import torch

# What core's conditioning nodes add and its own samplers obey. Ignoring these silently would be a lie to the user.
_UNSUPPORTED_CONDITIONING = {
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "control": "Apply ControlNet",
    "gligen": "GLIGEN",
    "hooks": "hooks",
    "start_percent": "ConditioningSetTimestepRange",
    "end_percent": "ConditioningSetTimestepRange",
}


def check_range(name: str, value: float, minimum: float, maximum: float) -> None:
    """Core checks ranges only for values typed into a node, not for linked ones."""
    if not (math.isfinite(value) and minimum <= value <= maximum):
        raise InvalidInput(f"{name} must be between {minimum} and {maximum}, but {value} came.")


def to_conditioning(embeds: torch.Tensor) -> list[list[Any]]:
    """``[1, tokens, width]`` → core's CONDITIONING."""
    return [[embeds, {}]]


def from_conditioning(conditioning: Any, *, name: str, text_dim: int, max_tokens: int) -> torch.Tensor:
    """Core's CONDITIONING → ``[1, max_tokens, text_dim]`` float32 on the CPU, zero after the last token.

    Also takes what core's CLIP Text Encode makes with the same text encoder. ``name`` is the input's name.
    """
    import torch

    if not isinstance(conditioning, list) or not conditioning:
        raise InvalidInput(f"{name} is empty. Connect the output of a text encoder node.")
    if len(conditioning) > 1:
        raise InvalidInput(
            f"{name} must hold one prompt, but {len(conditioning)} came combined. "
            "Remove the Conditioning (Combine) node and write one prompt."
        )
    embeds, options = conditioning[0]
    _refuse_unsupported_options(name, options)
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[0] != 1:
        raise InvalidInput(f"{name} must hold a tensor [1, tokens, {text_dim}], but {_describe(embeds)} came.")
    if embeds.shape[2] != text_dim:
        raise InvalidInput(
            f"{name} is {embeds.shape[2]} wide, but this model's transformer takes text embeddings {text_dim} wide. "
            "Use the text encoder node with the same model_id as the sampler."
        )
    if embeds.shape[1] > max_tokens:
        raise InvalidInput(f"{name} has {embeds.shape[1]} tokens, the model takes {max_tokens}. Shorten the prompt.")
    embeds = embeds.to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(embeds).all():
        raise NumericsError(f"{name} holds NaN or infinity. Run the text encoder again; if it stays, report a bug.")
    return torch.nn.functional.pad(embeds, (0, 0, 0, max_tokens - embeds.shape[1]))


def to_latent(samples: torch.Tensor) -> dict[str, Any]:
    """Latents in core's space → core's LATENT."""
    import torch

    if not torch.isfinite(samples).all():
        raise NumericsError(
            "The sampler produced NaN or infinity in its latents. Try a lower guidance_scale; "
            "if that does not help, the checkpoint may be damaged: download it again."
        )
    return {"samples": samples}


def from_video_latent(latent: Any, *, channels: int) -> torch.Tensor:
    """Core's LATENT → ``[B, channels, T, h, w]`` float32 on the CPU, in the space core's own VAE nodes use."""
    import torch

    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, torch.Tensor):
        raise InvalidInput('latents must be a LATENT with a tensor "samples". Connect the output of a video sampler.')
    expected = f"latents must be video latents [batch, {channels}, frames, height/8, width/8]"
    if samples.ndim == 4:
        raise InvalidInput(
            f"{expected}, but image latents {list(samples.shape)} came. Connect the output of a Wan 2.1 sampler; "
            "latents of an image model need that model's own VAE node."
        )
    if samples.ndim != 5 or samples.numel() == 0:
        raise InvalidInput(f"{expected}, but {_describe(samples)} came.")
    if samples.shape[1] != channels:
        raise InvalidInput(
            f"{expected}, but {samples.shape[1]} channels came (shape {list(samples.shape)}). "
            "They belong to another model: decode them with that model's VAE node."
        )
    samples = samples.to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(samples).all():
        raise NumericsError("latents hold NaN or infinity. The node they come from failed: run it again.")
    return samples


def _refuse_unsupported_options(name: str, options: dict[str, Any]) -> None:
    for key, node in _UNSUPPORTED_CONDITIONING.items():
        whole_range = {"start_percent": 0.0, "end_percent": 1.0}.get(key)
        if options.get(key) is not None and options[key] != whole_range:
            raise InvalidInput(f"{name} carries '{key}' from {node}, which the TPU samplers do not support. Remove it.")


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {list(shape)}"
