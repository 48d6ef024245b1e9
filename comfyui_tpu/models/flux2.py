"""Flux.2: Mistral-3 text encoder, Flux.2 transformer, autoencoder with batch-norm statistics on its latents.

The stock ``Flux2Pipeline`` drives; its three modules are device modules. Latents of this module's own methods are
``[B, 128, H/16, W/16]`` in the transformer's normalised space, which is what ComfyUI's core uses for Flux.2.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from comfyui_tpu.models.common import (
    DEFAULT_PLANS,
    OpenedModel,
    Plans,
    StepInfo,
    Task,
    check_side,
    explained_tokenizer,
    finite,
    load_scheduler,
    read_model_index,
)
from comfyui_tpu.models.flux2_components import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    Flux2TextEncoder,
    Flux2Transformer,
    Flux2VAE,
)
from comfyui_tpu.runtime.device_module import DeviceModule, Options
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput

SIZE_MULTIPLE = 16  # the autoencoder divides by 8, the latents' patches by 2
MIN_SIZE, MAX_SIZE = 256, 2048
TEXT_TOKENS = 512
MAX_REFERENCE_IMAGES = 10
MIN_REFERENCE_SIDE, MAX_REFERENCE_RATIO = 64, 8  # Flux2ImageProcessor.check_image_input

_PROMPTS_KEPT = 8  # embeddings of 512 × 15360 take 16 MB in bfloat16


def check_image_size(height: int, width: int) -> None:
    """Raise InvalidInput unless Flux.2 can make a picture of ``height`` × ``width`` pixels."""
    for name, value in (("height", height), ("width", width)):
        check_side(name, value, MIN_SIZE, MAX_SIZE, SIZE_MULTIPLE)


class Flux2(OpenedModel):
    """A FLUX.2-dev checkpoint. Opening reads configs and headers only; weights load when a component first runs."""

    def __init__(self, folder: Path, devices: tuple | None = None, plans: Plans = DEFAULT_PLANS):
        self.folder = Path(folder)
        read_model_index(self.folder, "Flux2Pipeline", "black-forest-labs/FLUX.2-dev")
        self.text_encoder = Flux2TextEncoder(TEXT_ENCODER, self.folder, devices=devices, plan=plans.text_encoder)
        self.transformer = Flux2Transformer(TRANSFORMER, self.folder, devices=devices, plan=plans.transformer)
        self.vae = Flux2VAE(VAE, self.folder, devices=devices, plan=plans.vae)
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._embeddings_lock = threading.Lock()

    @property
    def components(self) -> tuple[DeviceModule, ...]:
        return (self.text_encoder, self.transformer, self.vae)

    @property
    def text_dim(self) -> int:
        """Width of the prompt embeddings the transformer takes."""
        return self.transformer.raw_config.get("joint_attention_dim", 15360)

    @property
    def latent_channels(self) -> int:
        return self.transformer.raw_config.get("in_channels", 128)

    def is_encoded(self, prompt: str) -> bool:
        """Whether :meth:`encode_prompt` has the embeddings of ``prompt`` in memory."""
        with self._embeddings_lock:
            return prompt in self._embeddings

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """Embeddings ``[1, 512, text_dim]`` float32. The last few prompts' are kept: a new seed encodes nothing."""
        with self._embeddings_lock:
            embeds = self._embeddings.get(prompt)
            if embeds is None:
                embeds, _ = self._pipeline(tokenizer=self._processor).encode_prompt(
                    prompt=prompt, max_sequence_length=TEXT_TOKENS
                )
                self._embeddings[prompt] = finite(embeds, "text encoder")
            self._embeddings.move_to_end(prompt)
            while len(self._embeddings) > _PROMPTS_KEPT:
                self._embeddings.popitem(last=False)
        return embeds.to(torch.float32, copy=True)

    def sample(
        self,
        prompt_embeds: torch.Tensor,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        batch_size: int = 1,
        sigmas: list[float] | None = None,
        reference_images: Sequence[torch.Tensor] = (),
        k_smooth: bool = False,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> torch.Tensor:
        """Denoise; returns latents ``[B·batch_size, 128, height/16, width/16]`` float32.

        Args:
            prompt_embeds: ``[B, 512, text_dim]``.
            batch_size: pictures per prompt.
            sigmas: noise levels of the steps, decreasing from 1, a final 0 or none; they are used as they are (no
                shift by resolution) and ``num_inference_steps`` does not count.
            reference_images: up to 10 pictures ``[H, W, 3]`` in 0..1; their sizes may differ.
            k_smooth: subtract the mean key in attention (exact in theory, kinder to low precision).
            on_step: called after each step; may raise to stop.
        """
        check_image_size(height, width)
        self._check_inputs(prompt_embeds, batch_size)
        pipeline = self._pipeline(Options(smooth_keys=k_smooth), shifted=sigmas is None)
        levels = None if sigmas is None else _noise_levels(sigmas)
        total = num_inference_steps if levels is None else len(levels)

        def unpacked(tokens):
            return tokens.transpose(1, 2).unflatten(2, (height // SIZE_MULTIPLE, width // SIZE_MULTIPLE))

        def after_step(pipe, index, timestep, tensors):
            if on_step is not None:
                clean = _clean_latents(pipe.scheduler, pipe.transformer.velocity, tensors["latents"])
                on_step(StepInfo(index + 1, total, unpacked(clean)))
            return {}

        latents = pipeline(
            image=[_to_pil(image) for image in _checked_references(reference_images)] or None,
            prompt_embeds=prompt_embeds.float(),
            height=height,
            width=width,
            num_inference_steps=total,
            sigmas=levels,
            guidance_scale=guidance_scale,
            num_images_per_prompt=batch_size,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
        )[0]
        return finite(unpacked(latents.float()), "transformer").contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as :meth:`sample` returns them → pictures ``[B, H, W, 3]`` float32 in 0..1."""
        from diffusers import Flux2Pipeline

        mean, std = self._latent_statistics()
        whole = Flux2Pipeline._unpatchify_latents(latents.float() * std + mean)
        pictures = finite(self.vae.decode(whole, return_dict=False)[0].float(), "autoencoder")
        # Diffusers' VaeImageProcessor: (x/2 + 0.5) clamped.
        return pictures.mul_(0.5).add_(0.5).clamp_(0.0, 1.0).permute(0, 2, 3, 1).contiguous()

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the autoencoder's patchified latents, ``[1, 128, 1, 1]``."""
        statistics = self.vae.bn
        std = torch.sqrt(statistics.running_var + self.vae.config.batch_norm_eps)
        return statistics.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _check_inputs(self, prompt_embeds: torch.Tensor, batch_size: int) -> None:
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != self.text_dim:
            raise InvalidInput(
                f"prompt_embeds must be [batch, tokens, {self.text_dim}]; got {list(prompt_embeds.shape)}. Make them "
                "with the text encoder of the same model."
            )
        if batch_size < 1:
            raise InvalidInput(f"batch_size must be at least 1; got {batch_size}.")

    def rehearse(self, task: Task) -> None:
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
        self.text_encoder(ids, ids)
        self.sample(
            torch.zeros(1, TEXT_TOKENS, self.text_dim),
            height=task.height,
            width=task.width,
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            seed=0,
        )
        # Not `decode`: the statistics it applies first are among the weights.
        channels = self.vae.raw_config.get("latent_channels", 32)
        self.vae.decode(torch.zeros(1, channels, task.height // 8, task.width // 8), return_dict=False)

    def _pipeline(self, options: Options | None = None, shifted: bool = True, tokenizer: Any = None):
        """The stock pipeline on the device modules; not ``shifted``: its noise levels are taken as they are given.

        Only encoding prompts needs a ``tokenizer``.
        """
        from diffusers import Flux2Pipeline

        unshifted = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        pipeline = Flux2Pipeline(
            tokenizer=tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=load_scheduler(self.folder, **({} if shifted else unshifted)),
            transformer=self.transformer.with_options(options or Options()),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def _processor(self):
        """Tokenizer and chat template."""
        from transformers import PixtralProcessor

        folder = self.folder / "tokenizer"
        with explained_tokenizer(folder):
            processor = PixtralProcessor.from_pretrained(folder, local_files_only=True)
        if not processor.chat_template:
            raise CheckpointError(
                f"{folder} has no chat template (chat_template.jinja). Download the checkpoint again."
            )
        return processor


def _noise_levels(sigmas: Sequence[float]) -> list[float]:
    """The noise level of each step: ``sigmas`` without their final 0, which the scheduler adds itself."""
    levels = [float(sigma) for sigma in sigmas]
    levels = levels[:-1] if levels and levels[-1] == 0 else levels
    falling = all(high > low for high, low in itertools.pairwise([*levels, 0.0]))
    if not levels or not falling or levels[0] > 1:
        raise InvalidInput(f"sigmas must fall from at most 1 towards 0, one for each step; got {list(sigmas)}.")
    return levels


def _clean_latents(scheduler: Any, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Predicted clean tokens from the noisy ones ``[B, S, 128]`` after a step and the velocity that led there."""
    # The velocity also covers the reference images' tokens, which come after the picture's own.
    return latents - scheduler.sigmas[scheduler.step_index] * velocity[:, : latents.shape[1]]


def _checked_references(images: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if len(images) > MAX_REFERENCE_IMAGES:
        raise InvalidInput(f"Up to {MAX_REFERENCE_IMAGES} reference images are possible; got {len(images)}.")
    for number, image in enumerate(images, start=1):
        if image.ndim != 3 or image.shape[2] != 3:
            raise InvalidInput(f"Reference image {number} must be [height, width, 3]; got {list(image.shape)}.")
        height, width = image.shape[:2]
        sides = sorted((height, width))
        if sides[0] < MIN_REFERENCE_SIDE or sides[1] > MAX_REFERENCE_RATIO * sides[0]:
            raise InvalidInput(
                f"Reference image {number} must be at least {MIN_REFERENCE_SIDE} pixels high and wide, and at most "
                f"{MAX_REFERENCE_RATIO} times as long as short; got {height}×{width}."
            )
        finite(image, f"node that made reference image {number}")
    return images


def _to_pil(image: torch.Tensor):
    """``[H, W, 3]`` in 0..1 → the 8-bit picture the pipeline takes."""
    from PIL import Image

    return Image.fromarray((image.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy())
