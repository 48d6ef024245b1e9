"""What CogVideoX nodes hand each other: COGVIDEOX_EMBEDS, and LATENTs that know their checkpoint and frame count.

COGVIDEOX_EMBEDS is ``{"positive": CONDITIONING, "negative": CONDITIONING, "model_id": str}``. The LATENT is core's,
``[B, 16, T, H/8, W/8]``, with ``"model_id"`` and ``"num_frames"`` besides ``"samples"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comfyui_tpu.comfy.conversions import from_conditioning, from_video_latent, to_conditioning, to_latent
from comfyui_tpu.runtime.errors import InvalidInput

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.cogvideox import CogVideoX

EMBEDS_TYPE = "COGVIDEOX_EMBEDS"


def to_embeds(model_id: str, positive: torch.Tensor, negative: torch.Tensor) -> dict[str, Any]:
    """Embeddings of both prompts → COGVIDEOX_EMBEDS."""
    return {"positive": to_conditioning(positive), "negative": to_conditioning(negative), "model_id": model_id}


def from_embeds(embeds: Any, model: CogVideoX) -> tuple[torch.Tensor, ...]:
    """COGVIDEOX_EMBEDS → positive and negative embeddings ``[1, 226, text_dim]``, as ``model`` takes them."""
    from comfyui_tpu.models.cogvideox import TEXT_TOKENS

    return tuple(
        from_conditioning(embeds[key], name=f"embeddings ({key})", text_dim=model.text_dim, max_tokens=TEXT_TOKENS)
        for key in ("positive", "negative")
    )


def embeds_model_id(embeds: Any, model_id: str) -> str:
    """Which checkpoint samples ``embeds``: the input ``model_id`` if it is set, or the one that encoded the prompts."""
    missing = {"positive", "negative"} - set(embeds) if isinstance(embeds, Mapping) else {"positive", "negative"}
    if missing:
        raise InvalidInput(
            f"embeddings must be {EMBEDS_TYPE} with 'positive' and 'negative', but {_kind(embeds)} came. "
            "Connect CogVideoX Text Encoder (TPU)."
        )
    return _chosen(model_id, embeds, "embeddings", "CogVideoX Text Encoder (TPU)")


def to_video_latent(samples: torch.Tensor, model_id: str, num_frames: int) -> dict[str, Any]:
    """The sampler's latents → LATENT for the decoder."""
    return {**to_latent(samples), "model_id": model_id, "num_frames": num_frames}


def latent_model_id(latents: Any, model_id: str) -> str:
    """Which checkpoint decodes ``latents``: the input ``model_id`` if it is set, or the one that sampled them."""
    return _chosen(model_id, latents if isinstance(latents, Mapping) else {}, "latents", "CogVideoX TPU Sampler")


def decode(model: CogVideoX, latents: Any) -> torch.Tensor:
    """LATENT → IMAGE; all frames of latents that do not know how many were asked for."""
    samples = from_video_latent(latents, channels=model.latent_channels)
    return model.decode(samples, latents.get("num_frames"))


def _chosen(model_id: str, values: Mapping[str, Any], name: str, node: str) -> str:
    chosen = model_id or values.get("model_id")
    if not chosen:
        raise InvalidInput(
            f"{name} carry no model_id, so it is not known which checkpoint they belong to. Connect {node}, or "
            "connect a String node with the checkpoint's name to this node's model_id."
        )
    return chosen


def _kind(value: Any) -> str:
    return f"a mapping with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
