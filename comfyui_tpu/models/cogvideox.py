"""CogVideoX 1.5 and 1.0, text-to-video: the stock ``CogVideoXPipeline`` drives, its modules are device modules."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from comfyui_tpu.models import cogvideox_preview
from comfyui_tpu.models.cogvideox_components import (
    FRAMES_PER_LATENT,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    CogVideoXTextEncoder,
    CogVideoXTransformer,
    CogVideoXVAE,
)
from comfyui_tpu.models.common import (
    DEFAULT_PLANS,
    OpenedModel,
    Plans,
    StepInfo,
    Task,
    check_side,
    finite,
    load_scheduler,
    load_tokenizer,
    read_model_index,
    video_frames,
)
from comfyui_tpu.runtime.device_module import DeviceModule, Options
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput

SIZE_MULTIPLE = 16  # the autoencoder divides by 8, the transformer's patches by 2
MIN_SIZE, MAX_SIZE = 16, 2048  # CogVideoX 1.5 knows positions up to 2400 pixels
MIN_FRAMES, MAX_FRAMES = 9, 161
TEXT_TOKENS = 226

Scheduler = Literal["checkpoint", "dpm", "ddim"]
SCHEDULERS = {"dpm": "CogVideoXDPMScheduler", "ddim": "CogVideoXDDIMScheduler"}


def check_video_size(height: int, width: int, num_frames: int) -> None:
    """Raise InvalidInput unless CogVideoX makes videos of ``height`` × ``width`` pixels and ``num_frames`` frames."""
    for name, value in (("height", height), ("width", width)):
        check_side(name, value, MIN_SIZE, MAX_SIZE, SIZE_MULTIPLE)
    if not MIN_FRAMES <= num_frames <= MAX_FRAMES:
        raise InvalidInput(
            f"num_frames must be from {MIN_FRAMES} to {MAX_FRAMES}; got {num_frames}. "
            f"Nearest: {min(max(num_frames, MIN_FRAMES), MAX_FRAMES)}."
        )


def latent_frames(num_frames: int) -> int:
    """Latent frames a video of ``num_frames`` frames is sampled with: the smallest odd number that decodes to enough.

    An odd number T decodes to 4·(T - 1) + 1 frames, whose first latent stands for one frame, as the autoencoder was
    trained; an even one to 4·T. Odd lengths therefore serve every ``num_frames``: what is too much is cut off the end.
    """
    enough = -(-(num_frames - 1) // FRAMES_PER_LATENT) + 1
    return enough + 1 - enough % 2


def decoded_frames(latents: int) -> int:
    """Frames that ``latents`` latent frames decode to."""
    return FRAMES_PER_LATENT * (latents - 1) + 1 if latents % 2 else FRAMES_PER_LATENT * latents


class CogVideoX(OpenedModel):
    """A CogVideoX 1.5 or 1.0 text-to-video checkpoint."""

    def __init__(self, folder: Path, devices: tuple | None = None, plans: Plans = DEFAULT_PLANS):
        self.folder = Path(folder)
        read_model_index(self.folder, "CogVideoXPipeline", "zai-org/CogVideoX1.5-5B")
        self.text_encoder = CogVideoXTextEncoder(TEXT_ENCODER, self.folder, devices=devices, plan=plans.text_encoder)
        self.transformer = CogVideoXTransformer(TRANSFORMER, self.folder, devices=devices, plan=plans.transformer)
        self.vae = CogVideoXVAE(VAE, self.folder, devices=devices, plan=plans.vae)
        _check_parts_fit(self)

    @property
    def components(self) -> tuple[DeviceModule, ...]:
        return (self.text_encoder, self.transformer, self.vae)

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings the transformer takes."""
        return self.transformer.raw_config.get("text_embed_dim", 4096)

    @property
    def latent_channels(self) -> int:
        return self.vae.raw_config.get("latent_channels", 16)

    def encode_prompt(self, prompt: str, negative_prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of both texts, each ``[1, 226, text_dim]`` float32."""
        embeds, negative = self._pipeline(tokenizer=self._tokenizer).encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=True,
            max_sequence_length=TEXT_TOKENS,
            dtype=torch.float32,
        )
        return finite(embeds, "text encoder"), finite(negative, "text encoder")

    def sample(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        *,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        scheduler: Scheduler = "checkpoint",
        dynamic_cfg: bool = False,
        k_smooth: bool = False,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> torch.Tensor:
        """Denoise; returns latents ``[B, 16, T, height/8, width/8]`` float32 in the autoencoder's own space.

        T is :func:`latent_frames` of ``num_frames``; :meth:`decode` cuts to ``num_frames``.

        Args:
            prompt_embeds, negative_prompt_embeds: ``[B, 226, text_dim]``; the negative one counts when
                ``guidance_scale`` is above 1.
            scheduler: ``"checkpoint"``: the one it ships; or DPM-Solver++ or DDIM with its settings.
            dynamic_cfg: let the guidance vary between 1 and 1 + ``guidance_scale``, as Diffusers does.
            k_smooth: subtract the mean key in attention (exact in theory, kinder to low precision).
            on_step: called after each step; may raise to stop.
        """
        check_video_size(height, width, num_frames)
        frames = latent_frames(num_frames)
        pipeline = self._pipeline(scheduler, Options(smooth_keys=k_smooth))
        clean = _recorded_predictions(pipeline.scheduler)

        def after_step(pipe, index, timestep, tensors):
            if on_step is not None:
                on_step(StepInfo(index + 1, num_inference_steps, self._own_space(clean.pop(), frames)))
            return {}

        latents = pipeline(
            # Float32 embeddings: the pipeline keeps the latents between steps in their dtype.
            prompt_embeds=prompt_embeds.float(),
            negative_prompt_embeds=negative_prompt_embeds.float(),
            height=height,
            width=width,
            num_frames=decoded_frames(frames),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            use_dynamic_cfg=dynamic_cfg,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
        )[0]
        return finite(self._own_space(latents, frames), "transformer")

    def _own_space(self, latents: torch.Tensor, frames: int) -> torch.Tensor:
        """The pipeline's latents ``[B, T', 16, h, w]`` → ``[B, 16, T, h, w]`` with the scale divided out.

        CogVideoX 1.5 fills T up to whole temporal patches; the stock pipeline drops the additional frames in front.
        """
        return latents[:, -frames:].movedim(1, 2).float() / self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """Latents as ``sample`` returns them → frames ``[B·num_frames, H, W, 3]`` float32 in 0..1.

        Without ``num_frames`` every decoded frame is kept.
        """
        made = decoded_frames(latents.shape[2])
        if num_frames is not None and not 1 <= num_frames <= made:
            raise InvalidInput(
                f"num_frames must be from 1 to {made}, which {latents.shape[2]} latent frames decode to; got "
                f"{num_frames}. Decode the latents with the num_frames they were sampled for."
            )
        video = finite(self.vae.decode(latents, return_dict=False)[0], "video autoencoder")[:, :, :num_frames]
        return video_frames(video)

    def latent_rgb_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(factors [16, 3], bias [3])``: ``latents · factors + bias`` is about the picture's RGB in -1..1.

        Fitted from this checkpoint's own encoder on first use, see :mod:`comfyui_tpu.models.cogvideox_preview`.
        """
        return self._rgb_factors

    @functools.cached_property
    def _rgb_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return cogvideox_preview.rgb_factors(self.vae.folder, self.vae.raw_config)

    def rehearse(self, task: Task) -> None:
        for _ in ("prompt", "negative prompt"):
            self.text_encoder(torch.zeros(1, TEXT_TOKENS, dtype=torch.long))
        embeds = torch.zeros(1, TEXT_TOKENS, self.text_dim)
        latents = self.sample(
            embeds,
            embeds,
            **dataclasses.asdict(task),
            seed=0,
        )
        self.vae.decode(latents, return_dict=False)

    def _pipeline(self, scheduler: Scheduler = "checkpoint", options: Options | None = None, tokenizer: Any = None):
        """The stock pipeline around this checkpoint's device modules; only encoding prompts needs a ``tokenizer``."""
        from diffusers import CogVideoXPipeline

        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer.with_options(options or Options()),
            scheduler=self._scheduler(scheduler),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def _tokenizer(self):
        _check_tokenizer_readable(self.folder / "tokenizer")
        return load_tokenizer(self.folder)

    def _scheduler(self, choice: str):
        """A fresh scheduler: the checkpoint's own, or the chosen one with the checkpoint's settings."""
        import diffusers

        if choice not in ("checkpoint", *SCHEDULERS):
            raise InvalidInput(f"scheduler must be one of checkpoint, {', '.join(SCHEDULERS)}; got {choice!r}.")
        own = load_scheduler(self.folder)
        name = SCHEDULERS.get(choice, type(own).__name__)
        if name not in SCHEDULERS.values():
            raise CheckpointError(
                f"{self.folder / 'scheduler'} names the scheduler {name}; CogVideoX is sampled with "
                f"{' or '.join(SCHEDULERS.values())}. Choose dpm or ddim instead of the checkpoint's own."
            )
        return own if type(own).__name__ == name else getattr(diffusers, name).from_config(own.config)


def _check_parts_fit(model: CogVideoX) -> None:
    """CheckpointError unless text encoder, transformer and autoencoder belong together and make video from text."""
    folder, config = model.transformer.folder, model.transformer.raw_config
    if config.get("ofs_embed_dim") is not None or config.get("in_channels", 16) != model.latent_channels:
        raise CheckpointError(
            f"{folder} takes {config.get('in_channels', 16)} channels; a text-to-video transformer takes the "
            f"autoencoder's {model.latent_channels}. Image-to-video checkpoints do not run in these nodes."
        )
    width = model.text_encoder.raw_config.get("d_model")
    if width != model.text_dim:
        raise CheckpointError(
            f"{folder} takes text embeddings of width {model.text_dim}, but the text encoder beside it makes {width}. "
            "Download the checkpoint again."
        )


def _check_tokenizer_readable(folder: Path) -> None:
    """The real repositories ship ``spiece.model`` alone. Without protobuf, transformers takes it for another format."""
    if (folder / "tokenizer.json").is_file() or importlib.util.find_spec("google.protobuf") is not None:
        return
    raise CheckpointError(
        f"{folder} holds a SentencePiece model, which transformers reads with the package protobuf; it is not "
        "installed. Run `pip install protobuf` in ComfyUI's Python environment."
    )


def _recorded_predictions(scheduler: Any) -> list[torch.Tensor]:
    """A list that holds the predicted clean latents of the scheduler's last step (its second result) from now on.

    The pipeline's callback is not given them. ``functools.wraps`` keeps the signature, which the pipeline reads.
    """
    latest: list[torch.Tensor] = []
    step = scheduler.step

    @functools.wraps(step)
    def recording_step(*args: Any, **kwargs: Any):
        result = step(*args, **kwargs)
        latest[:] = [result[1]]
        return result

    scheduler.step = recording_step
    return latest
