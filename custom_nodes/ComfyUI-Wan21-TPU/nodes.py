"""The four nodes of Wan 2.1 text-to-video. Schemas and calls only; checks and conversions live in comfyui_tpu.comfy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy.conversions import (
    check_ranges,
    from_conditioning,
    from_video_latent,
    to_conditioning,
    to_latent,
)
from comfyui_tpu.comfy.frontend import register_frontend
from comfyui_tpu.comfy.inputs import SEED_RANGE, k_smooth_input, limits, model_id_input, seed_input, steps_input
from comfyui_tpu.comfy.model_lookup import check_model_id, find_checkpoint
from comfyui_tpu.comfy.reporter import NodeReporter, node_progress
from comfyui_tpu.comfy.unload import install_unload_hook

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.wan import WanTextToVideo

CATEGORY = "TPU/Wan2.1"
FAMILY = "Wan 2.1"
MODEL_ID = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
LATENT_FORMAT = "Wan21"  # the class in core's comfy.latent_formats
HEIGHT, WIDTH, NUM_FRAMES = 720, 1280, 81

# One table for the widgets and for values that come through links, which core does not check: (minimum, maximum).
RANGES = {
    "num_inference_steps": (1, 100),
    "guidance_scale": (0.0, 20.0),
    "seed": SEED_RANGE,
    "flow_shift": (1.0, 10.0),
    "fps": (1, 60),
}


def prompt_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "prompt", multiline=True, tooltip="What the video shows, in English or Chinese, up to 512 tokens."
        ),
        io.String.Input("negative_prompt", multiline=True, tooltip="What the video must not show. May be empty."),
    ]


def sampling_inputs() -> list[io.Input]:
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
        steps_input(50, RANGES),
        io.Float.Input(
            "guidance_scale",
            default=5.0,
            **limits(RANGES, "guidance_scale"),
            step=0.1,
            tooltip="How strictly the video follows the prompt (classifier-free guidance). "
            "At 1.0 or below the negative prompt has no effect and a step takes half the time.",
        ),
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


def fps_input() -> io.Input:
    return io.Int.Input(
        "fps",
        default=16,
        **limits(RANGES, "fps"),
        optional=True,
        tooltip="Frames per second, passed on to Create Video. Wan 2.1 was trained at 16.",
    )


def video_outputs() -> list[io.Output]:
    return [
        io.Image.Output("frames", display_name="frames", tooltip="The video's frames. Connect them to Create Video."),
        # Input and output ids of a node must differ; users see the display name.
        io.Float.Output("fps_out", display_name="fps", tooltip="Frames per second. Connect it to Create Video's fps."),
    ]


def check_sampling(height: int | None, width: int | None, num_frames: int | None, **values: float) -> None:
    """Sizes the model takes, and ranges. ``None``: linked, not known yet."""
    from comfyui_tpu.models.wan import check_video_size

    sizes = ((height, HEIGHT), (width, WIDTH), (num_frames, NUM_FRAMES))
    check_video_size(*(default if value is None else value for value, default in sizes))
    check_ranges(RANGES, values)


def check_constants(model_id: str | None, height=None, width=None, num_frames=None) -> bool:
    """What ``validate_inputs`` can know when a prompt is queued; ``execute`` repeats it for values from links.

    Errors are raised, not returned: core repeats a returned message once for every input that validate_inputs names,
    also for those that are right, and marks them all red.
    """
    if model_id is not None:
        check_model_id(model_id)
    check_sampling(height, width, num_frames)
    return True


def open_model(model_id: str) -> WanTextToVideo:
    folder = find_checkpoint(model_id)
    from comfyui_tpu.models.wan import WanTextToVideo

    return WanTextToVideo.open(folder)


def sample(model: WanTextToVideo, reporter: NodeReporter, embeds: tuple[torch.Tensor, ...], **settings) -> dict:
    """The denoising loop → LATENT, with its progress on the node."""
    return to_latent(model.sample(*embeds, **settings, on_step=reporter.step))


def decode(model: WanTextToVideo, latents: dict) -> torch.Tensor:
    """LATENT → IMAGE."""
    return model.decode(from_video_latent(latents, channels=model.latent_channels))


class Wan21TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TextEncoder",
            display_name="Wan 2.1 Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompt and the negative prompt with Wan 2.1's text encoder (UMT5-XXL) on the TPU.",
            inputs=[*prompt_inputs(), model_id_input(MODEL_ID, FAMILY)],
            outputs=[
                io.Conditioning.Output("prompt_embeds", display_name="prompt_embeds", tooltip="The encoded prompt."),
                io.Conditioning.Output(
                    "negative_prompt_embeds",
                    display_name="negative_prompt_embeds",
                    tooltip="The encoded negative prompt.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return check_constants(model_id)

    @classmethod
    def execute(cls, prompt: str, negative_prompt: str, model_id: str = MODEL_ID) -> io.NodeOutput:
        with node_progress() as reporter:
            embeds, negative_embeds = open_model(model_id).encode_prompt(prompt, negative_prompt)
            reporter.message("prompts encoded")
            return io.NodeOutput(to_conditioning(embeds), to_conditioning(negative_embeds))


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
                io.Conditioning.Input("prompt_embeds", tooltip="The prompt, from Wan 2.1 Text Encoder (TPU)."),
                io.Conditioning.Input(
                    "negative_prompt_embeds", tooltip="The negative prompt, from Wan 2.1 Text Encoder (TPU)."
                ),
                *sampling_inputs(),
                model_id_input(MODEL_ID, FAMILY),
                flow_shift_input(),
                k_smooth_input(),
            ],
            outputs=[
                io.Latent.Output("latents", display_name="latents", tooltip="Video latents for a Wan 2.1 VAE decoder."),
                # Input and output ids of a node must differ; users see the display name.
                io.Int.Output("num_frames_out", display_name="num_frames", tooltip="Number of frames of the video."),
            ],
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None, model_id=None) -> bool:
        return check_constants(model_id, height, width, num_frames)

    @classmethod
    def execute(
        cls, prompt_embeds, negative_prompt_embeds, model_id=MODEL_ID, flow_shift=5.0, k_smooth=False, **settings
    ) -> io.NodeOutput:
        check_sampling(**settings, flow_shift=flow_shift)
        with node_progress(LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds = (
                model_embeds(model, "prompt_embeds", prompt_embeds),
                model_embeds(model, "negative_prompt_embeds", negative_prompt_embeds),
            )
            latents = sample(model, reporter, embeds, **settings, flow_shift=flow_shift, k_smooth=k_smooth)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(latents, settings["num_frames"])


def model_embeds(model: WanTextToVideo, name: str, conditioning: list) -> torch.Tensor:
    """CONDITIONING → the prompt embeddings this checkpoint takes."""
    from comfyui_tpu.models.wan import TEXT_TOKENS

    return from_conditioning(conditioning, name=name, text_dim=model.text_dim, max_tokens=TEXT_TOKENS)


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
                fps_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return check_constants(model_id)

    @classmethod
    def execute(cls, latents: dict, model_id: str = MODEL_ID, fps: int = 16) -> io.NodeOutput:
        check_ranges(RANGES, {"fps": fps})
        with node_progress() as reporter:
            frames = decode(open_model(model_id), latents)
            reporter.message(f"{frames.shape[0]} frames, {frames.shape[2]}×{frames.shape[1]}")
            return io.NodeOutput(frames, float(fps))


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
                *prompt_inputs(),
                *sampling_inputs(),
                model_id_input(MODEL_ID, FAMILY),
                fps_input(),
                flow_shift_input(),
                k_smooth_input(),
            ],
            outputs=video_outputs(),
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None, model_id=None) -> bool:
        return check_constants(model_id, height, width, num_frames)

    @classmethod
    def execute(
        cls, prompt, negative_prompt, model_id=MODEL_ID, fps=16, flow_shift=5.0, k_smooth=False, **settings
    ) -> io.NodeOutput:
        check_sampling(**settings, flow_shift=flow_shift, fps=fps)
        with node_progress(LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds = model.encode_prompt(prompt, negative_prompt)
            latents = sample(model, reporter, embeds, **settings, flow_shift=flow_shift, k_smooth=k_smooth)
            frames = decode(model, latents)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(frames, float(fps))


class Wan21Extension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Wan21TextEncoder, Wan21TPUSampler, Wan21TPUVAEDecoder, Wan21TPUPipeline]


async def comfy_entrypoint() -> Wan21Extension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return Wan21Extension()
