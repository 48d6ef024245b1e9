"""The nodes of Wan 2.2 image-to-video. Schemas and calls only; checks and conversions live in comfyui_tpu.comfy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy import condition as conditions
from comfyui_tpu.comfy import wan
from comfyui_tpu.comfy.checked import checked
from comfyui_tpu.comfy.conversions import check_choice, check_ranges, from_image, to_latent
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
from comfyui_tpu.comfy.reporter import node_progress
from comfyui_tpu.comfy.unload import install_unload_hook
from comfyui_tpu.runtime.errors import InvalidInput

if TYPE_CHECKING:
    from comfyui_tpu.models.wan_i2v import WanImageToVideo

CATEGORY = "TPU/Wan2.2-I2V"
FAMILY = "Wan 2.2 I2V"
MODEL_ID = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
RESIZE_MODES = ("crop", "pad", "stretch")  # as in models/wan_i2v.py, which a start of ComfyUI must not import
SAME_AS_FIRST = -1.0

# One table for the widgets and for values that come through links, which core does not check: (minimum, maximum).
RANGES = {
    "num_inference_steps": (1, 100),
    "guidance_scale": (0.0, 20.0),
    "guidance_scale_2": (SAME_AS_FIRST, 20.0),
    "shift": (1.0, 20.0),
    "seed": SEED_RANGE,
}

Condition = io.Custom("CONDITION")
LatentInfo = io.Custom("LATENT_INFO")


def open_model(model_id: str) -> WanImageToVideo:
    folder = find_checkpoint(model_id)
    from comfyui_tpu.models.wan_i2v import WanImageToVideo

    return WanImageToVideo.open(folder)


class Wan22I2VImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan22I2VImageEncoder",
            display_name="Wan 2.2 I2V Image Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the picture a video begins with (and optionally the one it ends with) on the TPU. "
            "Sets the video's size and length.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The first frame, of any size. Each picture of a batch becomes a video of its own."
                ),
                *wan.size_inputs(),
                model_id_input(MODEL_ID, FAMILY),
                io.Image.Input(
                    "end_image", optional=True, tooltip="The last frame. One for all videos, or one for each."
                ),
                io.Combo.Input(
                    "resize_mode",
                    options=list(RESIZE_MODES),
                    default="crop",
                    optional=True,
                    tooltip="How pictures of another shape are fitted. crop: fill the frame, cut off what is too much "
                    "evenly. pad: show the whole picture between black borders. stretch: distort it.",
                ),
            ],
            outputs=[
                Condition.Output("condition", display_name="condition", tooltip="The encoded picture."),
                LatentInfo.Output("latent_info", display_name="latent_info", tooltip="Size and length of the video."),
            ],
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, num_frames=None, model_id=None, resize_mode=None) -> bool:
        # Core 0.3.75 does not compare the choices of V3 nodes with their options.
        if resize_mode is not None:
            check_choice("resize_mode", resize_mode, RESIZE_MODES)
        return wan.check_constants(model_id, height, width, num_frames)

    @classmethod
    def execute(
        cls, image, height, width, num_frames, model_id=MODEL_ID, end_image=None, resize_mode="crop"
    ) -> io.NodeOutput:
        wan.check_size(height, width, num_frames)
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        pictures = {
            "image": from_image("image", image),
            "end_image": None if end_image is None else from_image("end_image", end_image),
        }
        size = {"height": height, "width": width, "num_frames": num_frames}
        with node_progress() as reporter:
            condition = open_model(model_id).encode_image(**pictures, **size, resize_mode=resize_mode)
            reporter.message(f"{condition.latents.shape[0]} × {num_frames} frames, {width}×{height}")
            return io.NodeOutput(*conditions.to_sockets(condition))


class Wan22I2VTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan22I2VTextEncoder",
            display_name="Wan 2.2 I2V Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompt and the negative prompt with Wan 2.2's text encoder (UMT5-XXL) on the TPU.",
            inputs=[*wan.prompt_inputs(), model_id_input(MODEL_ID, FAMILY)],
            outputs=wan.embeds_outputs(),
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return wan.check_constants(model_id)

    @classmethod
    def execute(cls, prompt: str, negative_prompt: str, model_id: str = MODEL_ID) -> io.NodeOutput:
        return wan.encode_prompts(open_model, model_id, prompt, negative_prompt)


def shift_input() -> io.Input:
    return io.Float.Input(
        "shift",
        default=5.0,
        **limits(RANGES, "shift"),
        step=0.1,
        tooltip="Shift of the noise schedule; the model was released with 5.0. "
        "A higher one leaves more of the steps to the high-noise expert.",
    )


def guidance_2_input() -> io.Input:
    return io.Float.Input(
        "guidance_scale_2",
        default=SAME_AS_FIRST,
        **limits(RANGES, "guidance_scale_2"),
        step=0.1,
        optional=True,
        tooltip="guidance_scale of the low-noise expert. Below 0: the same as guidance_scale. "
        "Without effect for checkpoints with one expert.",
    )


def second_guidance(guidance_scale: float, guidance_scale_2: float) -> float | None:
    """The second expert's own guidance; None: the first one's."""
    if guidance_scale <= 1 < guidance_scale_2:
        raise InvalidInput(
            f"guidance_scale_2 is {guidance_scale_2:g}, but with guidance_scale {guidance_scale:g} the negative prompt "
            "is computed for neither expert. Set guidance_scale above 1, or guidance_scale_2 to -1."
        )
    return None if guidance_scale_2 < 0 else guidance_scale_2


class Wan22I2VTPUSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan22I2VTPUSampler",
            display_name="Wan 2.2 I2V TPU Sampler",
            category=CATEGORY,
            description="Makes video latents from the encoded picture and prompts with Wan 2.2's two experts on the "
            "TPU. The first run at a size compiles the model, which may take minutes; later runs start at once.",
            inputs=[
                *wan.embeds_inputs(FAMILY),
                Condition.Input("condition", tooltip="The picture, from Wan 2.2 I2V Image Encoder (TPU)."),
                LatentInfo.Input(
                    "latent_info", tooltip="Size and length, from the same Wan 2.2 I2V Image Encoder (TPU)."
                ),
                steps_input(40, RANGES),
                guidance_input(3.5, RANGES),
                shift_input(),
                seed_input(0, RANGES, makes="video"),
                model_id_input(MODEL_ID, FAMILY),
                guidance_2_input(),
                k_smooth_input(),
            ],
            outputs=wan.sampler_outputs(FAMILY),
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return wan.check_constants(model_id)

    @classmethod
    def execute(
        cls,
        prompt_embeds,
        negative_prompt_embeds,
        condition,
        latent_info,
        model_id=MODEL_ID,
        guidance_scale_2=SAME_AS_FIRST,
        k_smooth=False,
        **settings,
    ) -> io.NodeOutput:
        check_ranges(RANGES, {**settings, "guidance_scale_2": guidance_scale_2})
        settings["guidance_scale_2"] = second_guidance(settings["guidance_scale"], guidance_scale_2)
        with node_progress(wan.LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds = wan.model_embeds(model, prompt_embeds, negative_prompt_embeds)
            picture = conditions.from_sockets(model, condition, latent_info)
            latents = model.sample(*embeds, picture, **settings, k_smooth=k_smooth, on_step=reporter.step)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(to_latent(latents), picture.num_frames)


class Wan22I2VTPUVAEDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan22I2VTPUVAEDecoder",
            display_name="Wan 2.2 I2V TPU VAE Decoder",
            category=CATEGORY,
            description="Decodes Wan 2.2 video latents to frames on the TPU.",
            inputs=[
                io.Latent.Input("latents", tooltip="Video latents, from Wan 2.2 I2V TPU Sampler or core's Wan nodes."),
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


class Wan22I2VExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return checked([Wan22I2VImageEncoder, Wan22I2VTextEncoder, Wan22I2VTPUSampler, Wan22I2VTPUVAEDecoder])


async def comfy_entrypoint() -> Wan22I2VExtension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return Wan22I2VExtension()
