"""Inputs and outputs that nodes of several packs have: one wording, one behaviour. For packs: needs ComfyUI to import.

Each pack keeps one table of ranges that serves its widgets and, for linked values, ``conversions.check_ranges``.
"""

from __future__ import annotations

from comfy_api.latest import io

from comfyui_tpu.comfy.conversions import Ranges

SEED_RANGE = (0, 0xFFFF_FFFF_FFFF_FFFF)


def limits(ranges: Ranges, name: str) -> dict[str, float]:
    """A widget's ``min`` and ``max``."""
    minimum, maximum = ranges[name]
    return {"min": minimum, "max": maximum}


MODEL_ID_TOOLTIP = (
    "A folder in ComfyUI/models/diffusers, or a Hugging Face repo id (downloaded on first use), "
    "optionally with @revision."
)


def model_id_input(default: str, family: str) -> io.Input:
    return io.String.Input(
        "model_id",
        default=default,
        optional=True,
        tooltip=f"{MODEL_ID_TOOLTIP} Use the same one in all {family} nodes of a workflow.",
    )


def steps_input(default: int, ranges: Ranges) -> io.Input:
    return io.Int.Input(
        "num_inference_steps",
        default=default,
        **limits(ranges, "num_inference_steps"),
        tooltip="Denoising steps. More take longer and show finer detail.",
    )


def guidance_input(default: float, ranges: Ranges) -> io.Input:
    return io.Float.Input(
        "guidance_scale",
        default=default,
        **limits(ranges, "guidance_scale"),
        step=0.1,
        tooltip="How strictly the video follows the prompt (classifier-free guidance). "
        "At 1.0 or below the negative prompt has no effect and a step takes half the time.",
    )


def seed_input(default: int, ranges: Ranges, makes: str) -> io.Input:
    """``makes``: what the node makes, such as ``"video"``."""
    return io.Int.Input(
        "seed",
        default=default,
        **limits(ranges, "seed"),
        control_after_generate=True,
        tooltip=f"Start of the random noise. The same seed and settings give the same {makes}.",
    )


def k_smooth_input() -> io.Input:
    return io.Boolean.Input(
        "k_smooth",
        default=False,
        optional=True,
        tooltip="Subtract the mean key before attention. Exact in theory, kinder to low precision.",
    )


def video_outputs() -> list[io.Output]:
    return [
        io.Image.Output("frames", display_name="frames", tooltip="The video's frames. Connect them to Create Video."),
        # Input and output ids of a node must differ; users see the display name.
        io.Float.Output("fps_out", display_name="fps", tooltip="Frames per second. Connect it to Create Video's fps."),
    ]
