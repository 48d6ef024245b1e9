"""The four nodes of Flux.2 images. Schemas and calls only; checks and conversions live in comfyui_tpu.comfy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy.checked import checked
from comfyui_tpu.comfy.conversions import (
    check_ranges,
    check_size_hints,
    from_conditioning,
    from_image_latent,
    from_reference_images,
    from_sigmas,
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

    from comfyui_tpu.models.flux2 import Flux2

CATEGORY = "TPU/Flux.2"
FAMILY = "Flux.2"
MODEL_ID = "black-forest-labs/FLUX.2-dev"
LATENT_FORMAT = "Flux2"  # the class in core's comfy.latent_formats
HEIGHT, WIDTH = 1024, 1024
REFERENCES = ("reference_images", "reference_images_2", "reference_images_3")

# One table for the widgets and for values that come through links, which core does not check: (minimum, maximum).
RANGES = {
    "num_inference_steps": (1, 100),
    "guidance_scale": (0.0, 20.0),
    "seed": SEED_RANGE,
    "batch_size": (1, 64),
}


def prompt_input() -> io.Input:
    return io.String.Input(
        "prompt", multiline=True, tooltip="What the picture shows, or how to change the reference images."
    )


def sampling_inputs() -> list[io.Input]:
    size = {"min": 256, "max": 2048, "step": 16}
    return [
        io.Int.Input("height", default=HEIGHT, **size, tooltip="Height in pixels, a multiple of 16."),
        io.Int.Input("width", default=WIDTH, **size, tooltip="Width in pixels, a multiple of 16."),
        steps_input(50, RANGES),
        io.Float.Input(
            "guidance_scale",
            default=4.0,
            **limits(RANGES, "guidance_scale"),
            step=0.1,
            tooltip="How strictly the picture follows the prompt. The model knows the scale, so it costs no time.",
        ),
        seed_input(42, RANGES, makes="picture"),
    ]


def optional_inputs() -> list[io.Input]:
    first, *others = REFERENCES
    return [
        model_id_input(MODEL_ID, FAMILY),
        io.Image.Input(
            first,
            optional=True,
            tooltip="Pictures to edit or to take things from, up to 10 in all. Several of one size come as a batch.",
        ),
        *(io.Image.Input(name, optional=True, tooltip="More reference images, of another size.") for name in others),
        io.Int.Input(
            "batch_size",
            default=1,
            **limits(RANGES, "batch_size"),
            optional=True,
            tooltip="How many pictures to make at once.",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="A noise schedule from 1 to 0, for example from Flux2Scheduler. It replaces num_inference_steps. "
            "Without it the model's own schedule for the size is used.",
        ),
        k_smooth_input(),
    ]


def hint_input(name: str, default: int) -> io.Input:
    return io.Int.Input(
        name,
        default=default,
        min=0,
        max=2048,
        step=16,
        tooltip=f"The sampler's {name}, to check the latents against. 0 takes it from the latents.",
    )


def image_output() -> io.Output:
    return io.Image.Output("image", tooltip="The finished pictures.")


def check_constants(model_id: str | None, height: int | None = None, width: int | None = None) -> bool:
    """What ``validate_inputs`` can know when a prompt is queued; ``execute`` repeats it for values from links.

    Errors are raised, not returned: core repeats a returned message once for every input that validate_inputs names,
    also for those that are right, and marks them all red. ``None``: linked, not known yet.
    """
    from comfyui_tpu.models.flux2 import check_image_size

    if model_id is not None:
        check_model_id(model_id)
    check_image_size(HEIGHT if height is None else height, WIDTH if width is None else width)
    return True


def checked_settings(
    *, height: int, width: int, sigmas: Any = None, k_smooth: bool = False, batch_size: int = 1, **values: Any
) -> dict[str, Any]:
    """A sampling node's inputs → the arguments of ``Flux2.sample``."""
    from comfyui_tpu.models import flux2

    references = {name: values.pop(name, None) for name in REFERENCES}
    flux2.check_image_size(height, width)
    check_ranges(RANGES, {**values, "batch_size": batch_size})
    schedule = from_sigmas(sigmas)
    if schedule is not None:
        values["num_inference_steps"] = len(schedule) - 1
    images = from_reference_images(
        references,
        limit=flux2.MAX_REFERENCE_IMAGES,
        min_side=flux2.MIN_REFERENCE_SIDE,
        max_ratio=flux2.MAX_REFERENCE_RATIO,
    )
    settings = {"height": height, "width": width, "batch_size": batch_size, "k_smooth": k_smooth, **values}
    return {**settings, "sigmas": schedule, "reference_images": images}


def open_model(model_id: str) -> Flux2:
    folder = find_checkpoint(model_id)
    from comfyui_tpu.models.flux2 import Flux2

    return Flux2.open(folder)


def encode(model: Flux2, prompt: str) -> tuple[torch.Tensor, str]:
    """The prompt's embeddings, and where they came from, for people."""
    how = "prompt from memory" if model.is_encoded(prompt) else "prompt encoded"
    return model.encode_prompt(prompt), how


def sample(model: Flux2, reporter: NodeReporter, embeds: torch.Tensor, settings: dict[str, Any]) -> dict:
    """The denoising loop → LATENT, with its progress on the node."""
    return to_latent(model.sample(embeds, **settings, on_step=reporter.step))


def decode(model: Flux2, latents: dict, height: int = 0, width: int = 0) -> torch.Tensor:
    """LATENT → IMAGE."""
    from comfyui_tpu.models.flux2 import SIZE_MULTIPLE

    samples = from_image_latent(latents, channels=model.latent_channels, scale=SIZE_MULTIPLE)
    check_size_hints(samples, SIZE_MULTIPLE, height, width)
    return model.decode(samples)


class Flux2TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Flux2TextEncoder",
            display_name="Flux.2 Text Encoder (TPU)",
            category=CATEGORY,
            description="Encodes the prompt with Flux.2's text encoder (Mistral 3) on the TPU. "
            "A prompt that was encoded before comes from memory.",
            inputs=[prompt_input(), model_id_input(MODEL_ID, FAMILY)],
            outputs=[
                io.Conditioning.Output("prompt_embeds", display_name="prompt_embeds", tooltip="The encoded prompt.")
            ],
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return check_constants(model_id)

    @classmethod
    def execute(cls, prompt: str, model_id: str = MODEL_ID) -> io.NodeOutput:
        with node_progress() as reporter:
            embeds, how = encode(open_model(model_id), prompt)
            reporter.message(how)
            return io.NodeOutput(to_conditioning(embeds))


class Flux2TPUSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Flux2TPUSampler",
            display_name="Flux.2 TPU Sampler",
            category=CATEGORY,
            description="Makes image latents from the encoded prompt, and from reference images if there are any, with "
            "Flux.2's transformer on the TPU. The first run at a size compiles the model, which may take minutes; "
            "later runs start at once.",
            inputs=[
                io.Conditioning.Input("prompt_embeds", tooltip="The prompt, from Flux.2 Text Encoder (TPU)."),
                *sampling_inputs(),
                *optional_inputs(),
            ],
            outputs=[io.Latent.Output("latents", tooltip="Image latents for a Flux.2 VAE decoder.")],
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, model_id=None) -> bool:
        return check_constants(model_id, height, width)

    @classmethod
    def execute(cls, prompt_embeds: list, model_id: str = MODEL_ID, **inputs: Any) -> io.NodeOutput:
        from comfyui_tpu.models.flux2 import TEXT_TOKENS

        settings = checked_settings(**inputs)
        with node_progress(LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            # Core's Flux.2 puts the missing tokens before the prompt's.
            prompt = {"name": "prompt_embeds", "text_dim": model.text_dim, "max_tokens": TEXT_TOKENS, "pad_left": True}
            latents = sample(model, reporter, from_conditioning(prompt_embeds, **prompt), settings)
            reporter.sampled(settings["num_inference_steps"], model.describe_plan())
            return io.NodeOutput(latents)


class Flux2TPUVAEDecoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Flux2TPUVAEDecoder",
            display_name="Flux.2 TPU VAE Decoder",
            category=CATEGORY,
            description="Decodes Flux.2 image latents to pictures on the TPU.",
            inputs=[
                io.Latent.Input("latents", tooltip="Image latents, from Flux.2 TPU Sampler or core's Flux.2 nodes."),
                hint_input("height", HEIGHT),
                hint_input("width", WIDTH),
                model_id_input(MODEL_ID, FAMILY),
            ],
            outputs=[image_output()],
        )

    @classmethod
    def validate_inputs(cls, model_id=None) -> bool:
        return check_constants(model_id)

    @classmethod
    def execute(cls, latents: dict, height: int, width: int, model_id: str = MODEL_ID) -> io.NodeOutput:
        with node_progress() as reporter:
            images = decode(open_model(model_id), latents, height, width)
            reporter.message(f"{images.shape[0]} × {images.shape[2]}×{images.shape[1]}")
            return io.NodeOutput(images)


class Flux2TPUPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Flux2TPUPipeline",
            display_name="Flux.2 TPU Full Pipeline",
            category=CATEGORY,
            description="Text to image, and image editing, in one node: text encoder, sampler and VAE decoder of "
            "Flux.2 on the TPU. Gives the same pictures as the three separate nodes.",
            inputs=[prompt_input(), *sampling_inputs(), *optional_inputs()],
            outputs=[image_output()],
        )

    @classmethod
    def validate_inputs(cls, height=None, width=None, model_id=None) -> bool:
        return check_constants(model_id, height, width)

    @classmethod
    def execute(cls, prompt: str, model_id: str = MODEL_ID, **inputs: Any) -> io.NodeOutput:
        settings = checked_settings(**inputs)
        with node_progress(LATENT_FORMAT) as reporter:
            model = open_model(model_id)
            embeds, how = encode(model, prompt)
            images = decode(model, sample(model, reporter, embeds, settings))
            reporter.sampled(settings["num_inference_steps"], f"{how} · {model.describe_plan()}")
            return io.NodeOutput(images)


class Flux2Extension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return checked([Flux2TextEncoder, Flux2TPUSampler, Flux2TPUVAEDecoder, Flux2TPUPipeline])


async def comfy_entrypoint() -> Flux2Extension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return Flux2Extension()
