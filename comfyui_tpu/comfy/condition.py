"""The picture's way from the image encoder node to the sampler node: CONDITION and LATENT_INFO, refused if wrong.

CONDITION is the tensor ``[B, 20, T, H/8, W/8]`` itself, so that other packs' nodes can look at it and change it.
LATENT_INFO is a dict: the video's ``height``, ``width`` and ``num_frames``; ``image_embeds`` where the model has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfyui_tpu.runtime.errors import InvalidInput, NumericsError

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.wan_i2v import Condition, WanImageToVideo

MASK_CHANNELS = 4
_SIZES = ("height", "width", "num_frames")
_CONNECT = "Connect both outputs of the same image encoder node."


def to_sockets(condition: Condition) -> tuple[torch.Tensor, dict[str, Any]]:
    """The model's condition → (CONDITION, LATENT_INFO)."""
    info = {name: getattr(condition, name) for name in _SIZES}
    if condition.image_embeds is not None:
        info["image_embeds"] = condition.image_embeds
    return condition.latents, info


def from_sockets(model: WanImageToVideo, latents: Any, info: Any) -> Condition:
    """(CONDITION, LATENT_INFO) → the condition ``model`` takes, on the CPU in float32."""
    import torch

    from comfyui_tpu.models.wan_i2v import Condition

    sizes = _checked_sizes(info)
    _check_shape(latents, sizes, channels=MASK_CHANNELS + model.latent_channels)
    embeds = info.get("image_embeds")
    if model.image_encoder is not None and not isinstance(embeds, torch.Tensor):
        raise InvalidInput(
            f"{model.folder.name} also looks at the picture with CLIP, but latent_info has no image_embeds. Use the "
            "image encoder node with the same model_id as the sampler."
        )
    found = {"condition": latents, **({} if model.image_encoder is None else {"image_embeds": embeds})}
    for name, tensor in found.items():
        found[name] = tensor.to(device="cpu", dtype=torch.float32)
        if not torch.isfinite(found[name]).all():
            raise NumericsError(f"{name} holds NaN or infinity. The node it comes from failed: run it again.")
    return Condition(found["condition"], **sizes, image_embeds=found.get("image_embeds"))


def _checked_sizes(info: Any) -> dict[str, int]:
    from comfyui_tpu.models.wan import check_video_size

    if not isinstance(info, dict) or not all(type(info.get(name)) is int for name in _SIZES):
        shown = {name: info.get(name) for name in _SIZES} if isinstance(info, dict) else type(info).__name__
        raise InvalidInput(f"latent_info must say {', '.join(_SIZES)} as whole numbers, but {shown} came. {_CONNECT}")
    sizes = {name: info[name] for name in _SIZES}
    check_video_size(**sizes)
    return sizes


def _check_shape(latents: Any, sizes: dict[str, int], channels: int) -> None:
    import torch

    height, width, num_frames = sizes.values()
    expected = [channels, (num_frames - 1) // 4 + 1, height // 8, width // 8]
    found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
    if isinstance(found, str) or len(found) != 5 or found[0] == 0 or found[1:] != expected:
        raise InvalidInput(
            f"condition must have the shape [batch, {', '.join(map(str, expected))}], for latent_info says {height}×"
            f"{width} (height×width) and {num_frames} frames; but {found} came. {_CONNECT}"
        )
