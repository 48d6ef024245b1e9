"""Wan image-to-video: Wan 2.2 A14B with its two experts, and Wan 2.1 with CLIP image embeddings.

The stock ``WanImageToVideoPipeline`` drives. The picture is encoded by a node of its own, so the pipeline is handed the
finished condition instead of the picture; everything else is its own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from comfyui_tpu.models.common import DEFAULT_PLANS, Plans, StepInfo, Task, finite
from comfyui_tpu.models.wan import REHEARSED_SHIFT, WanModel, check_video_size
from comfyui_tpu.runtime import bridge
from comfyui_tpu.runtime.device_module import ComponentSpec, DeviceModule, Options
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput
from comfyui_tpu.runtime.plan import spread

ResizeMode = Literal["crop", "pad", "stretch"]
RESIZE_MODES: tuple[ResizeMode, ...] = ("crop", "pad", "stretch")

# Smaller pictures hold nothing that could be enlarged to a video; a stray mask or an empty image looks like this.
MIN_PICTURE_SIZE = 16


@dataclass(frozen=True)
class Condition:
    """What the sampler needs to know of the picture.

    Attributes:
        latents: ``[B, 20, T, H/8, W/8]``: 4-channel mask of the given frames, then the 16 normalised latents of
            ``[picture, zeros …]``.
        height, width, num_frames: of the video.
        image_embeds: ``[B, tokens, width]`` of Wan 2.1's CLIP image encoder; None for Wan 2.2.
    """

    latents: torch.Tensor
    height: int
    width: int
    num_frames: int
    image_embeds: torch.Tensor | None = None


def fit_picture(
    image: torch.Tensor, height: int, width: int, mode: ResizeMode = "crop", name: str = "image"
) -> torch.Tensor:
    """``[B, H, W, C]`` in 0..1 → ``[B, height, width, 3]``.

    ``crop`` cuts what is too much off evenly, ``pad`` adds black borders, ``stretch`` ignores the aspect ratio. Alpha
    is dropped, as core's own nodes do; a single grey channel is repeated. ``name`` is the input's, for errors.
    """
    image = _checked_picture(image, mode, name)
    if mode == "crop":
        image = _crop_to_ratio(image, height / width)
    rows, columns = image.shape[1:3]
    scale = min(height / rows, width / columns)
    inner = (height, width) if mode != "pad" else (round(rows * scale), round(columns * scale))
    pixels = image.movedim(-1, 1)
    if inner != (rows, columns):
        pixels = torch.nn.functional.interpolate(pixels, size=inner, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    borders = (left, width - inner[1] - left, top, height - inner[0] - top)
    return torch.nn.functional.pad(pixels, borders).movedim(1, -1)


def _checked_picture(image: torch.Tensor, mode: str, name: str) -> torch.Tensor:
    if mode not in RESIZE_MODES:
        raise InvalidInput(f"resize mode must be one of {', '.join(RESIZE_MODES)}; got {mode!r}.")
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or image.shape[0] == 0:
        raise InvalidInput(f"{name} must be [batch, height, width, 3] with values in 0..1; got {list(image.shape)}.")
    if min(image.shape[1:3]) < MIN_PICTURE_SIZE:
        raise InvalidInput(
            f"{name} must be at least {MIN_PICTURE_SIZE}×{MIN_PICTURE_SIZE} pixels; got "
            f"{image.shape[2]}×{image.shape[1]}. Load the picture again, or connect another one."
        )
    image = finite(image.float(), f"{name} input")
    return image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image[..., :3]


def _crop_to_ratio(image: torch.Tensor, ratio: float) -> torch.Tensor:
    """Cut the longer side evenly so that height / width is ``ratio`` (to a pixel)."""
    rows, columns = image.shape[1:3]
    if rows / columns > ratio:
        keep = max(1, round(columns * ratio))
        top = (rows - keep) // 2
        return image[:, top : top + keep]
    keep = max(1, round(rows / ratio))
    left = (columns - keep) // 2
    return image[:, :, left : left + keep]


# --- Wan 2.1's image encoder ------------------------------------------------------------------------------------------


def _build_image_encoder(config: dict) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel._from_config(CLIPVisionConfig.from_dict(config), attn_implementation="eager")


def _embed_picture(encoder, pixel_values):
    # The pipeline uses the hidden states before the last layer.
    return encoder(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2]


IMAGE_ENCODER = ComponentSpec(
    name="image_encoder",
    build=_build_image_encoder,
    methods={"embed": _embed_picture},
    plans=lambda chips, config: (spread(chips),),
    config_class="CLIPVisionModel",
    unused=(r"position_ids",),
)


class WanImageEncoder(DeviceModule):
    """Called as ``CLIPVisionModel`` by the pipeline: pixels → an object with ``hidden_states[-2]``."""

    def __call__(self, pixel_values: torch.Tensor, output_hidden_states: bool = True):
        from transformers.modeling_outputs import BaseModelOutput

        embeds = bridge.to_torch(self.run("embed", {"pixel_values": pixel_values}))
        return BaseModelOutput(hidden_states=(embeds, None))


# --- image to video ---------------------------------------------------------------------------------------------------


class WanImageToVideo(WanModel):
    """A Wan 2.2 (two experts) or Wan 2.1 image-to-video checkpoint."""

    pipeline_class = "WanImageToVideoPipeline"
    example = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"

    def __init__(self, folder: Path, devices: tuple | None = None, plans: Plans = DEFAULT_PLANS):
        super().__init__(folder, devices, plans)
        expected = 20 + self.latent_channels
        found = self.transformer.raw_config.get("in_channels")
        if found != expected:
            raise CheckpointError(
                f"{self.folder / 'transformer'} takes {found} channels; an image-to-video transformer takes {expected}."
            )
        self.image_encoder: WanImageEncoder | None = None
        if self.transformer.raw_config.get("image_dim") is not None:
            self.image_encoder = WanImageEncoder(IMAGE_ENCODER, self.folder, devices=devices, plan=plans.text_encoder)

    @property
    def components(self) -> tuple[DeviceModule, ...]:
        return (*super().components, *([] if self.image_encoder is None else [self.image_encoder]))

    def encode_image(
        self,
        image: torch.Tensor,
        *,
        height: int,
        width: int,
        num_frames: int,
        end_image: torch.Tensor | None = None,
        resize_mode: ResizeMode = "crop",
    ) -> Condition:
        """The picture (and optionally the last frame) as the sampler's condition.

        Args:
            image: ``[B, H, W, C]`` in 0..1 of any size; each picture of the batch becomes a video.
            end_image: likewise, one for all or one each: the frame the video ends with.
        """
        check_video_size(height, width, num_frames)
        first = fit_picture(image, height, width, resize_mode)
        last = None if end_image is None else fit_picture(end_image, height, width, resize_mode, "end_image")
        if last is not None and last.shape[0] not in (1, first.shape[0]):
            raise InvalidInput(
                f"end_image must hold one picture or as many as image ({first.shape[0]}); got {last.shape[0]}."
            )
        if self.image_encoder is not None and first.shape[0] > 1:
            raise InvalidInput(f"Wan 2.1 image-to-video takes one picture at a time; got {first.shape[0]}.")
        pairs = [(first[i], None if last is None else last[min(i, last.shape[0] - 1)]) for i in range(first.shape[0])]
        latents = torch.cat([self._condition_latents(*pair, num_frames) for pair in pairs])
        embeds = None if self.image_encoder is None else self._image_embeds(*pairs[0])
        return Condition(finite(latents, "video autoencoder"), height, width, num_frames, embeds)

    def _condition_latents(self, first: torch.Tensor, last: torch.Tensor | None, num_frames: int) -> torch.Tensor:
        """``[1, 20, T, h, w]`` of one picture ``[H, W, 3]``, by the stock pipeline's own preparation."""
        height, width = first.shape[:2]
        _, condition = self._pipeline().prepare_latents(
            _pixels(first),
            batch_size=1,
            num_channels_latents=self.latent_channels,
            height=height,
            width=width,
            num_frames=num_frames,
            dtype=torch.float32,
            device=torch.device("cpu"),
            generator=torch.Generator("cpu"),  # for noise that is thrown away: leaves the global one alone
            last_image=None if last is None else _pixels(last),
        )
        return condition

    def _image_embeds(self, first: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
        pictures = [p.movedim(-1, 0) for p in (first, last) if p is not None]
        pixels = self._image_processor(images=pictures, return_tensors="pt", do_rescale=False)["pixel_values"]
        # As the stock pipeline: the tokens of first and last picture follow one another in the batch axis.
        return self.image_encoder(pixels).hidden_states[-2].float()

    @functools.cached_property
    def _image_processor(self):
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor.from_pretrained(self.folder / "image_processor", local_files_only=True)

    def sample(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        condition: Condition,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        shift: float,
        guidance_scale_2: float | None = None,
        k_smooth: bool = False,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> torch.Tensor:
        """Denoise; returns latents ``[B, 16, T, height/8, width/8]`` float32 in the autoencoder's own space.

        Args:
            prompt_embeds, negative_prompt_embeds: ``[1, 512, text_dim]``, the same for every video of the batch.
            condition: from :meth:`encode_image`; its batch is the number of videos.
            guidance_scale: of the first expert (and of the second, unless ``guidance_scale_2`` is given).
            shift: the schedule's shift.
        """
        batch = condition.latents.shape[0]
        negative_prompt_embeds = negative_prompt_embeds.expand(batch, -1, -1)
        pipeline = self._pipeline(
            shift,
            Options(smooth_keys=k_smooth),
            _conditioned_pipeline_class(),
            negative=negative_prompt_embeds if guidance_scale > 1 else None,
        )
        pipeline.condition = condition
        if self.transformer_2 is None:
            guidance_scale_2 = None  # one expert: there is nothing for it to act on
        return self._denoise(
            pipeline,
            on_step,
            seed,
            image=torch.zeros(1, 3, condition.height, condition.width),  # stands for the condition; never encoded
            prompt_embeds=prompt_embeds.expand(batch, -1, -1),
            negative_prompt_embeds=negative_prompt_embeds,
            height=condition.height,
            width=condition.width,
            num_frames=condition.num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
        )

    def rehearse(self, task: Task) -> None:
        embeds = self._rehearse_prompts()
        picture = torch.zeros(1, task.height, task.width, 3)
        latents = self.sample(
            embeds,
            embeds,
            self.encode_image(picture, height=task.height, width=task.width, num_frames=task.num_frames),
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            seed=0,
            shift=REHEARSED_SHIFT,
        )
        self.vae.decode(latents, return_dict=False)


def _pixels(picture: torch.Tensor) -> torch.Tensor:
    """``[H, W, 3]`` in 0..1 → ``[1, 3, H, W]`` in -1..1."""
    return picture.movedim(-1, 0).unsqueeze(0) * 2 - 1


@functools.cache
def _conditioned_pipeline_class() -> type:
    """The stock pipeline with a condition that was computed before (a function: Diffusers is imported late)."""
    from diffusers import WanImageToVideoPipeline
    from diffusers.utils.torch_utils import randn_tensor

    class ConditionedPipeline(WanImageToVideoPipeline):
        condition: Condition

        def prepare_latents(
            self,
            image,
            batch_size,
            num_channels_latents=16,
            height=480,
            width=832,
            num_frames=81,
            dtype=None,
            device=None,
            generator=None,
            latents=None,
            last_image=None,
        ):
            condition = self.condition.latents
            shape = (batch_size, num_channels_latents, *condition.shape[2:])
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype), condition.to(dtype)

        def encode_image(self, image, device=None):
            return self.condition.image_embeds

    return ConditionedPipeline
