"""The three nodes of CogVideoX text-to-video. Schemas and calls; checks and conversions live in comfyui_tpu.comfy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy import cogvideox
from comfyui_tpu.comfy.checked import checked
from comfyui_tpu.comfy.conversions import check_choice, check_ranges
from comfyui_tpu.comfy.devices import first_devices
from comfyui_tpu.comfy.frontend import register_frontend
from comfyui_tpu.comfy.inputs import (
    MODEL_ID_TOOLTIP,
    SEED_RANGE,
    guidance_input,
    k_smooth_input,
    limits,
    seed_input,
    steps_input,
    video_outputs,
)
from comfyui_tpu.comfy.model_lookup import check_model_id, find_checkpoint
from comfyui_tpu.comfy.previews import rgb_previewer
from comfyui_tpu.comfy.reporter import node_progress
from comfyui_tpu.comfy.unload import install_unload_hook

if TYPE_CHECKING:
    from comfyui_tpu.models.cogvideox import CogVideoX

CATEGORY = "TPU/CogVideoX"
MODEL_ID = "zai-org/CogVideoX1.5-5B"
HEIGHT, WIDTH, NUM_FRAMES = 720, 1280, 81
SCHEDULERS = ("checkpoint", "dpm", "ddim")

# One table for the widgets and for values that come through links, which core does not check: (minimum, maximum).
RANGES = {
    "num_inference_steps": (1, 100),
    "guidance_scale": (1.0, 20.0),
    "seed": SEED_RANGE,
    "num_devices": (0, 1024),
    "fps": (1, 60),
}

Embeds = io.Custom(cogvideox.EMBEDS_TYPE)


def size_inputs() -> list[io.Input]:
    size = {"min": 16, "max": 2048, "step": 16}
    return [
        io.Int.Input("height", default=HEIGHT, **size, tooltip="Height in pixels, a multiple of 16."),
        io.Int.Input("width", default=WIDTH, **size, tooltip="Width in pixels, a multiple of 16."),
        io.Int.Input(
            "num_frames",
            default=NUM_FRAMES,
            min=9,
            max=161,
            tooltip="Length of the video in frames, any number from 9 to 161. 81 are 5 seconds at 16 fps.",
        ),
    ]


def runtime_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "num_devices",
            default=0,
            **limits(RANGES, "num_devices"),
            optional=True,
            tooltip="How many TPU chips denoise the video. 0 uses all.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default=SCHEDULERS[0],
            optional=True,
            tooltip="The noise scheduler: the one the checkpoint names, DPM-Solver++ or DDIM.",
        ),
        io.Boolean.Input(
            "dynamic_cfg",
            default=False,
            optional=True,
            tooltip="Vary the guidance from step to step, between 1 and 1 + guidance_scale, "
            "as use_dynamic_cfg in Diffusers does.",
        ),
        k_smooth_input(),
    ]


def model_socket(belongs_to: str) -> io.Input:
    """A socket without a text field: a name typed here would silently outlive a change of the text encoder's."""
    return io.String.Input(
        "model_id",
        optional=True,
        force_input=True,
        tooltip=f"Only for {belongs_to} from other nodes: the checkpoint to use instead of the one they carry.",
    )


def check_size(height: int | None, width: int | None, num_frames: int | None) -> None:
    """Raise unless the model takes this size. ``None``: linked, not known yet."""
    from comfyui_tpu.models.cogvideox import check_video_size

    sizes = ((height, HEIGHT), (width, WIDTH), (num_frames, NUM_FRAMES))
    check_video_size(*(default if value is None else value for value, default in sizes))


def check_sampling(height: int, width: int, num_frames: int, **values: float) -> None:
    check_size(height, width, num_frames)
    check_ranges(RANGES, values)


def open_model(model_id: str, devices: tuple | None = None) -> CogVideoX:
    folder = find_checkpoint(model_id)
    from comfyui_tpu.models.cogvideox import CogVideoX

    return CogVideoX.open(folder, devices)


class CogVideoXTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTextEncoder",
            display_name="CogVideoX Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompt and the negative prompt with CogVideoX's text encoder (T5-XXL) on the TPU.",
            inputs=[
                io.String.Input(
                    "prompt", multiline=True, tooltip="What the video shows, in English, up to 226 tokens."
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="What the video must not show. May be empty.",
                ),
                io.String.Input(
                    "model_id", default=MODEL_ID, tooltip=f"{MODEL_ID_TOOLTIP} Sampler and decoder take it from here."
                ),
            ],
            outputs=[
                Embeds.Output(
                    "embeddings",
                    display_name="embeddings",
                    tooltip="Both encoded prompts and their model, for CogVideoX TPU Sampler.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        # Errors are raised, not returned: core repeats a returned message once for every input named here.
        if model_id is not None:
            check_model_id(model_id)
        return True

    @classmethod
    def execute(cls, prompt: str, negative_prompt: str, model_id: str) -> io.NodeOutput:
        with node_progress() as reporter:
            embeds = open_model(model_id).encode_prompt(prompt, negative_prompt)
            reporter.message("prompts encoded")
            return io.NodeOutput(cogvideox.to_embeds(model_id, *embeds))


class CogVideoXTPUSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTPUSampler",
            display_name="CogVideoX TPU Sampler",
            category=CATEGORY,
            description="Makes video latents from the encoded prompts with CogVideoX's transformer on the TPU. "
            "The first run at a size compiles the model, which may take minutes; later runs start at once.",
            inputs=[
                Embeds.Input("embeddings", tooltip="Both prompts, from CogVideoX Text Encoder (TPU)."),
                *size_inputs(),
                steps_input(50, RANGES),
                guidance_input(6.0, RANGES),
                seed_input(42, RANGES, makes="video"),
                *runtime_inputs(),
                model_socket("embeddings"),
            ],
            outputs=[
                io.Latent.Output(
                    "latents", display_name="latents", tooltip="Video latents for CogVideoX TPU VAE Decoder."
                ),
                io.String.Output(
                    "info", display_name="info", tooltip="Frames, size, speed, and how the model ran on the chips."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None) -> bool:
        check_size(height, width, num_frames)
        return True

    @classmethod
    def execute(
        cls,
        embeddings,
        num_devices=0,
        scheduler=SCHEDULERS[0],
        dynamic_cfg=False,
        k_smooth=False,
        model_id="",
        **settings,
    ) -> io.NodeOutput:
        check_sampling(**settings, num_devices=num_devices)
        check_choice("scheduler", scheduler, SCHEDULERS)
        model_id = cogvideox.embeds_model_id(embeddings, model_id)
        settings.update(scheduler=scheduler, dynamic_cfg=dynamic_cfg, k_smooth=k_smooth)
        devices = first_devices(num_devices)
        with node_progress() as reporter:
            model = open_model(model_id, devices)
            reporter.preview_with(rgb_previewer(model.latent_rgb_factors))
            embeds = cogvideox.from_embeds(embeddings, model)
            latents = model.sample(*embeds, **settings, on_step=reporter.step)
            speed = reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            info = f"{settings['num_frames']} frames, {settings['width']}×{settings['height']} · {speed}"
            return io.NodeOutput(cogvideox.to_video_latent(latents, model_id, settings["num_frames"]), info)


class CogVideoXTPUVAEDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogVideoXTPUVAEDecoder",
            display_name="CogVideoX TPU VAE Decoder",
            category=CATEGORY,
            description="Decodes CogVideoX video latents to frames on the TPU: exactly as many as the sampler was "
            "asked for.",
            inputs=[
                io.Latent.Input("latents", tooltip="Video latents, from CogVideoX TPU Sampler."),
                io.Int.Input(
                    "fps",
                    default=16,
                    **limits(RANGES, "fps"),
                    tooltip="Frames per second, passed on to Create Video: 16 for CogVideoX 1.5, 8 for CogVideoX.",
                ),
                model_socket("latents"),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def execute(cls, latents: dict, fps: int, model_id: str = "") -> io.NodeOutput:
        check_ranges(RANGES, {"fps": fps})
        model_id = cogvideox.latent_model_id(latents, model_id)
        with node_progress() as reporter:
            frames = cogvideox.decode(open_model(model_id), latents)
            reporter.message(f"{frames.shape[0]} frames, {frames.shape[2]}×{frames.shape[1]}")
            return io.NodeOutput(frames, float(fps))


class CogVideoXExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return checked([CogVideoXTextEncoder, CogVideoXTPUSampler, CogVideoXTPUVAEDecoder])


async def comfy_entrypoint() -> CogVideoXExtension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return CogVideoXExtension()
