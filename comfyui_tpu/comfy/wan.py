"""What the Wan packs share: inputs, outputs, checks, and the ways into and out of a model. For packs only.

Each pack opens its own class of model; ``open_model`` below is its function of a ``model_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from comfy_api.latest import io

from comfyui_tpu.comfy.conversions import check_ranges, from_conditioning, from_video_latent, to_conditioning
from comfyui_tpu.comfy.model_lookup import check_model_id
from comfyui_tpu.comfy.reporter import node_progress

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.wan import WanModel

HEIGHT, WIDTH, NUM_FRAMES = 720, 1280, 81
FPS_RANGE = (1, 60)
LATENT_FORMAT = "Wan21"  # the class in core's comfy.latent_formats, the same for Wan 2.2's 14B models


def prompt_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "prompt", multiline=True, tooltip="What the video shows, in English or Chinese, up to 512 tokens."
        ),
        io.String.Input("negative_prompt", multiline=True, tooltip="What the video must not show. May be empty."),
    ]


def size_inputs() -> list[io.Input]:
    size = {"min": 256, "max": 1280, "step": 16}
    return [
        io.Int.Input("height", default=HEIGHT, **size, tooltip="Height in pixels, a multiple of 16."),
        io.Int.Input("width", default=WIDTH, **size, tooltip="Width in pixels, a multiple of 16."),
        io.Int.Input(
            "num_frames",
            default=NUM_FRAMES,
            min=17,
            max=121,
            step=4,
            tooltip="Length of the video in frames: 4n+1, such as 17, 33, 81 or 121. 81 are 5 seconds at 16 fps.",
        ),
    ]


def fps_input(family: str) -> io.Input:
    minimum, maximum = FPS_RANGE
    return io.Int.Input(
        "fps",
        default=16,
        min=minimum,
        max=maximum,
        optional=True,
        tooltip=f"Frames per second, passed on to Create Video. {family} was trained at 16.",
    )


def embeds_inputs(family: str) -> list[io.Input]:
    return [
        io.Conditioning.Input("prompt_embeds", tooltip=f"The prompt, from {family} Text Encoder (TPU)."),
        io.Conditioning.Input(
            "negative_prompt_embeds", tooltip=f"The negative prompt, from {family} Text Encoder (TPU)."
        ),
    ]


def embeds_outputs() -> list[io.Output]:
    return [
        io.Conditioning.Output("prompt_embeds", display_name="prompt_embeds", tooltip="The encoded prompt."),
        io.Conditioning.Output(
            "negative_prompt_embeds", display_name="negative_prompt_embeds", tooltip="The encoded negative prompt."
        ),
    ]


def sampler_outputs(family: str) -> list[io.Output]:
    return [
        io.Latent.Output("latents", display_name="latents", tooltip=f"Video latents for a {family} VAE decoder."),
        # Input and output ids of a node must differ; users see the display name.
        io.Int.Output("num_frames_out", display_name="num_frames", tooltip="Number of frames of the video."),
    ]


def check_size(height: int | None, width: int | None, num_frames: int | None) -> None:
    """Raise unless the model takes this size. ``None``: linked, not known yet."""
    from comfyui_tpu.models.wan import check_video_size

    sizes = ((height, HEIGHT), (width, WIDTH), (num_frames, NUM_FRAMES))
    check_video_size(*(default if value is None else value for value, default in sizes))


def check_constants(model_id: str | None, height=None, width=None, num_frames=None) -> bool:
    """What ``validate_inputs`` can know when a prompt is queued; ``execute`` repeats it for values from links.

    Errors are raised, not returned: core repeats a returned message once for every input that validate_inputs names,
    also for those that are right, and marks them all red.
    """
    if model_id is not None:
        check_model_id(model_id)
    check_size(height, width, num_frames)
    return True


def encode_prompts(
    open_model: Callable[[str], WanModel], model_id: str, prompt: str, negative_prompt: str
) -> io.NodeOutput:
    """What a text encoder node does."""
    with node_progress() as reporter:
        embeds, negative_embeds = open_model(model_id).encode_prompt(prompt, negative_prompt)
        reporter.message("prompts encoded")
        return io.NodeOutput(to_conditioning(embeds), to_conditioning(negative_embeds))


def model_embeds(model: WanModel, prompt_embeds: list, negative_prompt_embeds: list) -> tuple[torch.Tensor, ...]:
    """CONDITIONING of both prompts → the embeddings this checkpoint takes."""
    from comfyui_tpu.models.wan import TEXT_TOKENS

    named = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    return tuple(
        from_conditioning(conditioning, name=name, text_dim=model.text_dim, max_tokens=TEXT_TOKENS)
        for name, conditioning in named.items()
    )


def decode(model: WanModel, latents: dict) -> torch.Tensor:
    """LATENT → IMAGE."""
    return model.decode(from_video_latent(latents, channels=model.latent_channels))


def decode_video(open_model: Callable[[str], WanModel], model_id: str, latents: dict, fps: int) -> io.NodeOutput:
    """What a VAE decoder node does."""
    check_ranges({"fps": FPS_RANGE}, {"fps": fps})
    with node_progress() as reporter:
        frames = decode(open_model(model_id), latents)
        reporter.message(f"{frames.shape[0]} frames, {frames.shape[2]}×{frames.shape[1]}")
        return io.NodeOutput(frames, float(fps))
