"""The four nodes of Wan 2.1 text-to-video. Schemas and calls only; checks and conversions live in comfyui_tpu.comfy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy import wan
from comfyui_tpu.comfy.checked import checked
from comfyui_tpu.comfy.conversions import check_ranges, to_latent
from comfyui_tpu.comfy.frontend import register_frontend
from comfyui_tpu.comfy.inputs import (
    SEED_RANGE,
    guidance_input,
    k_smooth_input,
    limits,
    model_id_input,
    seed_input,
    steps_input,
    video_outputs,
)
from comfyui_tpu.comfy.model_lookup import find_checkpoint
from comfyui_tpu.comfy.reporter import NodeReporter, node_progress
from comfyui_tpu.comfy.unload import install_unload_hook

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.wan import WanTextToVideo

CATEGORY = "TPU/Wan2.1"
FAMILY = "Wan 2.1"
MODEL_ID = "Wan-AI/Wan2.1-T2V-14B-Diffusers"

# One table for the widgets and for values that come through links, which core does not check: (minimum, maximum).
RANGES = {
    "num_inference_steps": (1, 100),
    "guidance_scale": (0.0, 20.0),
    "seed": SEED_RANGE,
    "flow_shift": (1.0, 10.0),
    "fps": wan.FPS_RANGE,
}


def sampling_inputs() -> list[io.Input]:
    return [
        *wan.size_inputs(),
        steps_input(50, RANGES),
        guidance_input(5.0, RANGES),
        seed_input(2025, RANGES, makes="video"),
    ]


def flow_shift_input() -> io.Input:
    return io.Float.Input(
        "flow_shift",
        default=5.0,
        **limits(RANGES, "flow_shift"),
        step=0.5,
        optional=True,
        tooltip="Shift of the noise schedule: 5.0 for 720p, 3.0 for 480p.",
    )


def check_sampling(height: int, width: int, num_frames: int, **values: float) -> None:
    wan.check_size(height, width, num_frames)
    check_ranges(RANGES, values)


def open_model(model_id: str) -> WanTextToVideo:
    folder = find_checkpoint(model_id)
    from comfyui_tpu.models.wan import WanTextToVideo

    return WanTextToVideo.open(folder)


def sample(model: WanTextToVideo, reporter: NodeReporter, embeds: tuple[torch.Tensor, ...], **settings) -> dict:
    """The denoising loop → LATENT, with its progress on the node."""
    return to_latent(model.sample(*embeds, **settings, on_step=reporter.step))


class Wan21TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TextEncoder",
            display_name="Wan 2.1 Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompt and the negative prompt with Wan 2.1's text encoder (UMT5-XXL) on the TPU.",
            inputs=[*wan.prompt_inputs(), model_id_input(MODEL_ID, FAMILY)],
            outputs=wan.embeds_outputs(),
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return wan.check_constants(model_id)

    @classmethod
    def execute(cls, prompt: str, negative_prompt: str, model_id: str = MODEL_ID) -> io.NodeOutput:
        return wan.encode_prompts(open_model, model_id, prompt, negative_prompt)


class Wan21TPUSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TPUSampler",
            display_name="Wan 2.1 TPU Sampler",
            category=CATEGORY,
            description="Makes video latents from the encoded prompts with Wan 2.1's transformer on the TPU. "
            "The first run at a size compiles the model, which may take minutes; later runs start at once.",
            inputs=[
                *wan.embeds_inputs(FAMILY),
                *sampling_inputs(),
                model_id_input(MODEL_ID, FAMILY),
                flow_shift_input(),
                k_smooth_input(),
            ],
            outputs=wan.sampler_outputs(FAMILY),
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None, model_id=None) -> bool:
        return wan.check_constants(model_id, height, width, num_frames)

    @classmethod
    def execute(
        cls, prompt_embeds, negative_prompt_embeds, model_id=MODEL_ID, flow_shift=5.0, k_smooth=False, **settings
    ) -> io.NodeOutput:
        check_sampling(**settings, flow_shift=flow_shift)
        with node_progress(wan.LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds = wan.model_embeds(model, prompt_embeds, negative_prompt_embeds)
            latents = sample(model, reporter, embeds, **settings, flow_shift=flow_shift, k_smooth=k_smooth)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(latents, settings["num_frames"])


class Wan21TPUVAEDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TPUVAEDecoder",
            display_name="Wan 2.1 TPU VAE Decoder",
            category=CATEGORY,
            description="Decodes Wan 2.1 video latents to frames on the TPU.",
            inputs=[
                io.Latent.Input("latents", tooltip="Video latents, from Wan 2.1 TPU Sampler or core's Wan 2.1 nodes."),
                model_id_input(MODEL_ID, FAMILY),
                wan.fps_input(FAMILY),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return wan.check_constants(model_id)

    @classmethod
    def execute(cls, latents: dict, model_id: str = MODEL_ID, fps: int = 16) -> io.NodeOutput:
        return wan.decode_video(open_model, model_id, latents, fps)


class Wan21TPUPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TPUPipeline",
            display_name="Wan 2.1 TPU Full Pipeline",
            category=CATEGORY,
            description="Text to video in one node: text encoder, sampler and VAE decoder of Wan 2.1 on the TPU. "
            "Gives the same frames as the three separate nodes.",
            inputs=[
                *wan.prompt_inputs(),
                *sampling_inputs(),
                model_id_input(MODEL_ID, FAMILY),
                wan.fps_input(FAMILY),
                flow_shift_input(),
                k_smooth_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None, model_id=None) -> bool:
        return wan.check_constants(model_id, height, width, num_frames)

    @classmethod
    def execute(
        cls, prompt, negative_prompt, model_id=MODEL_ID, fps=16, flow_shift=5.0, k_smooth=False, **settings
    ) -> io.NodeOutput:
        check_sampling(**settings, flow_shift=flow_shift, fps=fps)
        with node_progress(wan.LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds = model.encode_prompt(prompt, negative_prompt)
            latents = sample(model, reporter, embeds, **settings, flow_shift=flow_shift, k_smooth=k_smooth)
            frames = wan.decode(model, latents)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(frames, float(fps))


class Wan21Extension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return checked([Wan21TextEncoder, Wan21TPUSampler, Wan21TPUVAEDecoder, Wan21TPUPipeline])


async def comfy_entrypoint() -> Wan21Extension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return Wan21Extension()
