"""Values between nodes, in core's own contract: CONDITIONING, LATENT, IMAGE, SIGMAS. What is wrong is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    "guidance": "Flux Guidance",
    "reference_latents": "Reference Latent",
}
# "guidance": None is core's way to switch guidance off, so it is not without effect.
_WITHOUT_EFFECT = {"start_percent": (None, 0.0), "end_percent": (None, 1.0), "guidance": ()}
_INSTEAD = {
    "guidance": " Set the sampler's guidance_scale instead.",
    "reference_latents": " Connect the pictures to the sampler's reference_images instead.",
}

# Sharpening and resizing overshoot 0..1, which core's nodes clip; beyond this it is another scale, like 0..255.
_OVERSHOOT = 1.0

Ranges = Mapping[str, tuple[float, float]]  # input: (minimum, maximum)


def check_ranges(ranges: Ranges, values: Mapping[str, float]) -> None:
    """Core checks ranges only for values typed into a node, not for linked ones."""
    for name, value in values.items():
        minimum, maximum = ranges[name]
        if not (math.isfinite(value) and minimum <= value <= maximum):
            raise InvalidInput(f"{name} must be between {minimum} and {maximum}, but {value} came.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Core 0.3.75 does not check the choices of V3 nodes, neither picked nor linked ones."""
    if value not in choices:
        raise InvalidInput(f"{name} must be one of {', '.join(choices)}, but {value!r} came.")


def to_conditioning(embeds: torch.Tensor) -> list[list[Any]]:
    """``[1, tokens, width]`` → core's CONDITIONING."""
    return [[embeds, {}]]


def from_conditioning(
    conditioning: Any, *, name: str, text_dim: int, max_tokens: int, pad_left: bool = False
) -> torch.Tensor:
    """Core's CONDITIONING → ``[1, max_tokens, text_dim]`` float32 on the CPU, zero beyond its tokens.

    Also takes what core's CLIP Text Encode makes with the same text encoder. ``name`` is the input's name;
    ``pad_left``: the zeros go before the tokens, for models whose sampler in core puts them there.
    """
    import torch

    if not isinstance(conditioning, list) or not conditioning:
        raise InvalidInput(f"{name} is empty. Connect the output of a text encoder node.")
    if len(conditioning) > 1:
        raise InvalidInput(
            f"{name} must hold one prompt, but {len(conditioning)} came combined. "
            "Remove the Conditioning (Combine) node and write one prompt."
        )
    pair = conditioning[0]
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], dict):
        raise InvalidInput(f"{name} must be CONDITIONING, but {_describe(pair)} came. Connect a text encoder node.")
    embeds, options = pair
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
    missing = max_tokens - embeds.shape[1]
    return torch.nn.functional.pad(embeds, (0, 0, missing, 0) if pad_left else (0, 0, 0, missing))


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
    expected = f"latents must be video latents [batch, {channels}, frames, height/8, width/8]"
    return _checked_samples(latent, channels, 5, expected, other={4: "image"})


def from_image_latent(latent: Any, *, channels: int, scale: int) -> torch.Tensor:
    """Core's LATENT → ``[B, channels, height/scale, width/scale]`` float32 on the CPU, in core's own space."""
    expected = f"latents must be image latents [batch, {channels}, height/{scale}, width/{scale}]"
    return _checked_samples(latent, channels, 4, expected, other={5: "video"})


def check_size_hints(latents: torch.Tensor, scale: int, height: int, width: int) -> None:
    """Raise if a decoder's ``height`` and ``width`` in pixels contradict latents ``[..., h, w]``. 0: no hint."""
    found = (latents.shape[-2] * scale, latents.shape[-1] * scale)
    if any(hint and hint != actual for hint, actual in zip((height, width), found, strict=True)):
        raise InvalidInput(
            f"height and width say {height}×{width}, but the latents are those of a picture {found[0]}×{found[1]} "
            f"(height×width). Set height to {found[0]} and width to {found[1]}, or both to 0 to take them from the "
            "latents."
        )


def from_sigmas(sigmas: Any) -> list[float] | None:
    """Core's SIGMAS ``[steps + 1]`` from 1 down to 0 → the same numbers; None stays None.

    The samplers start from pure noise and end at a clean picture, so parts of a schedule are refused.
    """
    import torch

    if sigmas is None:
        return None
    if not isinstance(sigmas, torch.Tensor) or sigmas.ndim != 1 or sigmas.numel() < 2:
        raise InvalidInput(f"sigmas must be SIGMAS: a value per step and a final 0, but {_describe(sigmas)} came.")
    sigmas = sigmas.to(device="cpu", dtype=torch.float32)
    values = sigmas.tolist()
    if not torch.isfinite(sigmas).all() or (sigmas.diff() >= 0).any():
        raise InvalidInput(f"sigmas must be finite and decrease from step to step, but {_shown(values)} came.")
    if values[-1] != 0:
        raise InvalidInput(
            f"sigmas must end with 0 (a clean picture), but the last of {_shown(values)} is {values[-1]:g}. "
            "Connect the whole schedule, not the upper half of Split Sigmas."
        )
    if not 0.99 <= values[0] <= 1:
        raise InvalidInput(
            f"sigmas must begin with 1 (pure noise), but the first of {_shown(values)} is {values[0]:g}. Use a "
            "scheduler for flow models, such as Flux2Scheduler, and the whole of its schedule."
        )
    return values


def from_reference_images(
    inputs: Mapping[str, Any], *, limit: int, min_side: int, max_ratio: float
) -> list[torch.Tensor]:
    """Batches of core's IMAGE by input name (None: not connected) → pictures ``[H, W, 3]`` float32 in 0..1.

    The model takes up to ``limit`` pictures, each with sides of at least ``min_side`` pixels, the long one up to
    ``max_ratio`` times the short one.
    """
    batches = {name: from_image(name, images) for name, images in inputs.items() if images is not None}
    count = sum(len(images) for images in batches.values())
    if count > limit:
        where = " + ".join(f"{len(images)} in {name}" for name, images in batches.items())
        raise InvalidInput(f"The model takes up to {limit} reference images, but {count} came ({where}). Remove some.")
    for name, images in batches.items():
        height, width = images.shape[1:3]
        short, long = sorted((height, width))
        if short < min_side or long > max_ratio * short:
            raise InvalidInput(
                f"{name} must be at least {min_side} pixels wide and high, and at most {max_ratio} times as long as "
                f"short, but {width}×{height} came. Scale or crop it."
            )
    return [image for images in batches.values() for image in images]


def from_image(name: str, images: Any) -> torch.Tensor:
    """Core's IMAGE ``[B, H, W, 1, 3 or 4]`` → ``[B, H, W, 3]`` float32 in 0..1 on the CPU; alpha over white."""
    import torch

    is_image = isinstance(images, torch.Tensor) and images.ndim == 4 and images.numel() > 0
    if not is_image or images.shape[3] not in (1, 3, 4):
        raise InvalidInput(
            f"{name} must be an IMAGE [batch, height, width, 1, 3 or 4 channels], but {_describe(images)} came."
        )
    images = images.to(device="cpu", dtype=torch.float32)
    low, high = images.min().item(), images.max().item()
    if not torch.isfinite(images).all():
        raise NumericsError(f"{name} holds NaN or infinity. The node it comes from failed: run it again.")
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        raise InvalidInput(f"{name} must have values in 0..1, but {low:g}..{high:g} came. Scale the picture first.")
    images = images.clamp(0.0, 1.0)
    if images.shape[3] == 4:
        colour, alpha = images[..., :3], images[..., 3:]
        return colour * alpha + (1 - alpha)
    return images.expand(-1, -1, -1, 3)


def _checked_samples(latent: Any, channels: int, ndim: int, expected: str, other: dict[int, str]) -> torch.Tensor:
    import torch

    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, torch.Tensor):
        raise InvalidInput('latents must be a LATENT with a tensor "samples". Connect the output of a sampler.')
    if samples.ndim in other:
        raise InvalidInput(
            f"{expected}, but {other[samples.ndim]} latents {list(samples.shape)} came. Connect the output of this "
            "pack's sampler; latents of another model need that model's own VAE node."
        )
    if samples.ndim != ndim or samples.numel() == 0:
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
        if key not in options or options[key] in _WITHOUT_EFFECT.get(key, (None,)):
            continue
        raise InvalidInput(
            f"{name} carries '{key}' from {node}, which the TPU samplers do not support. "
            f"Remove it.{_INSTEAD.get(key, '')}"
        )


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {list(shape)}"


def _shown(values: list[float]) -> str:
    """Numbers for a message, the middle of long lists left out."""
    texts = [f"{value:.4g}" for value in values]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-2:]])
