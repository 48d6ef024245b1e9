"""Wan: UMT5 text encoder, Wan transformer (1.3 B and 14 B), causal Wan video autoencoder; text-to-video.

The stock Diffusers pipeline drives; its modules are device modules. Image-to-video is in ``wan_i2v``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from comfyui_tpu.models import plans, wan_decoder
from comfyui_tpu.models.common import (
    DEFAULT_PLANS,
    OpenedModel,
    Plans,
    StepInfo,
    Task,
    check_side,
    clean_latents,
    finite,
    load_scheduler,
    load_tokenizer,
    nearest,
    read_model_index,
    video_frames,
)
from comfyui_tpu.models.guidance import Branches
from comfyui_tpu.models.video_decoder import SpreadAutoencoder
from comfyui_tpu.models.wan_attention import TEXT_TOKENS
from comfyui_tpu.models.wan_block import prepare_blocks
from comfyui_tpu.models.wan_patches import PatchEmbedding
from comfyui_tpu.runtime import bridge, causal
from comfyui_tpu.runtime.device_module import ComponentSpec, DeviceModule, Options
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput

SIZE_MULTIPLE = 16  # the autoencoder divides by 8, the transformer's patches by 2
MIN_SIZE, MAX_SIZE = 256, 1280
MIN_FRAMES, MAX_FRAMES, FRAMES_PER_LATENT = 17, 121, 4
REHEARSED_SHIFT = 5.0  # the shift for 720p; of two experts it decides how many steps each has

# Of a chunk of latent frames: float32 bytes that its widest activation (base_dim channels at full size) may have on a
# chip, and the most frames. By the compiler some five of them are alive at once in the encoder and ten in the decoder.
ENCODE_BUDGET, MAX_ENCODE_LATENTS = 1.5 * 2**30, 4
DECODE_BUDGET, MAX_DECODE_LATENTS = 0.75 * 2**30, 2


def check_video_size(height: int, width: int, num_frames: int) -> None:
    """Raise InvalidInput unless Wan can make a video of ``height`` × ``width`` pixels and ``num_frames`` frames."""
    for name, value in (("height", height), ("width", width)):
        check_side(name, value, MIN_SIZE, MAX_SIZE, SIZE_MULTIPLE)
    if not MIN_FRAMES <= num_frames <= MAX_FRAMES or num_frames % FRAMES_PER_LATENT != 1:
        raise InvalidInput(
            f"num_frames must be 4n + 1 from {MIN_FRAMES} to {MAX_FRAMES} (17, 21, …, 81, …, 121); got {num_frames}. "
            f"Nearest: {nearest(num_frames, MIN_FRAMES, MAX_FRAMES, FRAMES_PER_LATENT, 1)}."
        )


# --- components -------------------------------------------------------------------------------------------------------


def _build_text_encoder(config: dict) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    # Eager attention: the other implementations look at the mask's values to choose a kernel, which a trace cannot.
    return UMT5EncoderModel._from_config(UMT5Config.from_dict(config), attn_implementation="eager")


def _build_transformer(config: dict) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_config(config)
    prepare_blocks(transformer)
    transformer.patch_embedding = PatchEmbedding(transformer.patch_embedding)
    return transformer


def _build_vae(config: dict) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    if config.get("is_residual") or config.get("patch_size"):
        raise CheckpointError(
            "expected the video autoencoder of Wan 2.1 and of Wan 2.2 A14B; got one with is_residual or patch_size in "
            "its config, as Wan 2.2 TI2V 5B has. Choose a checkpoint of one of the former."
        )
    return AutoencoderKLWan.from_config(config)


def _encode_text(encoder, input_ids, attention_mask):
    return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _denoise(transformer, hidden_states, timestep, encoder_hidden_states, **inputs):
    """The stock forward; latents that go with two branches' texts are the same for both."""
    branches = encoder_hidden_states.shape[0] // hidden_states.shape[0]
    both = {name: x.repeat(branches, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
    return transformer(
        hidden_states=hidden_states.repeat(branches, 1, 1, 1, 1),
        timestep=timestep.repeat(branches),
        encoder_hidden_states=encoder_hidden_states,
        return_dict=False,
        **both,
    )[0]


def _encode_chunk(vae, x, state=None):
    """Frames ``[B, 3, T, H, W]`` → moments ``[B, 32, T/4, H/8, W/8]`` (one from the first frame) and new state."""
    cache = [None] * vae._cached_conv_counts["encoder"] if state is None else list(state)
    moments = vae.encoder(x, feat_cache=cache, feat_idx=[0])
    return vae.quant_conv(moments), cache


TEXT_ENCODER = ComponentSpec(
    name="text_encoder",
    build=_build_text_encoder,
    methods={"encode": _encode_text},
    plans=plans.of_t5,
    config_class="UMT5EncoderModel",
    stacked=("encoder.block",),
)

TRANSFORMER = ComponentSpec(
    name="transformer",
    build=_build_transformer,
    methods={"denoise": _denoise},
    plans=plans.of_video_transformer,
    config_class="WanTransformer3DModel",
    stacked=("blocks",),
    # WanTransformer3DModel._keep_in_fp32_modules of Diffusers 0.42
    keep_float32=("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    unused=(r"norm_added_q",),
)

# Wan 2.2's second expert, for the timesteps with little noise.
TRANSFORMER_2 = dataclasses.replace(TRANSFORMER, name="transformer_2")

VAE = ComponentSpec(
    name="vae",
    build=_build_vae,
    methods={
        "decode_first": wan_decoder.decode,
        "decode_next": wan_decoder.decode,
        "encode_first": _encode_chunk,
        "encode_next": _encode_chunk,
    },
    plans=plans.of_autoencoder,
    config_class="AutoencoderKLWan",
    # The pipelines load this autoencoder in float32: bfloat16 shows as colour banding.
    always_float32=True,
)


class WanTextEncoder(DeviceModule):
    """Called as ``UMT5EncoderModel``: ids and mask ``[B, 512]`` → ``.last_hidden_state`` ``[B, 512, d_model]``."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        from transformers.modeling_outputs import BaseModelOutput

        out = self.run("encode", {"input_ids": input_ids, "attention_mask": attention_mask})
        return BaseModelOutput(last_hidden_state=bridge.to_torch(out))


class WanTransformer(DeviceModule):
    """Called as ``WanTransformer3DModel``: latents ``[B, C, T, h, w]`` → predicted velocity of the same shape."""

    _branches: Branches | None = None

    def for_run(self, options: Options, negative: torch.Tensor | None) -> WanTransformer:
        """A copy for one run; ``negative``: embeddings of its second branch, None without guidance."""
        other = self.with_options(options)
        if negative is not None and self.plan.splits_batch(2 * negative.shape[0]):
            other._branches = Branches(negative)
        return other

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if attention_kwargs:
            raise InvalidInput(f"attention_kwargs are not supported on the TPU; got {sorted(attention_kwargs)}.")
        inputs = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
        }
        if encoder_hidden_states_image is not None:
            inputs["encoder_hidden_states_image"] = encoder_hidden_states_image
        sample = self._denoised(inputs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _denoised(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        branches, embeds = self._branches, inputs["encoder_hidden_states"]
        call = inputs["hidden_states"], inputs["timestep"]
        if branches is not None and (found := branches.waiting(*call, embeds)) is not None:
            return found
        both = branches.joined(embeds) if branches is not None else None
        sample = self.run("denoise", inputs if both is None else {**inputs, "encoder_hidden_states": both})
        sample = bridge.to_torch(sample)
        return sample if both is None else branches.keep(*call, sample)


class WanVAE(SpreadAutoencoder):
    """Called as ``AutoencoderKLWan``: ``encode`` and ``decode``, chunk by chunk with progress and Cancel between."""

    @property
    def temperal_downsample(self) -> Any:  # Diffusers' spelling
        return self.skeleton.module.temperal_downsample

    def decode(self, z: torch.Tensor, return_dict: bool = True):
        """Latents ``[B, 16, T, h, w]`` (un-normalised) → frames ``[B, 3, 4·(T-1)+1, 8·h, 8·w]`` in -1..1."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        latents = self._chunk_latents(1, z.shape[3] * 8, z.shape[4] * 8, DECODE_BUDGET, MAX_DECODE_LATENTS)
        chunking = causal.Chunking("decode_first", "decode_next", 1, latents, lambda n: 4 * n, "decoding frames")
        frames = self.decoded(z, chunking)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        """Frames ``[B, 3, 4·n+1, H, W]`` in -1..1 → distribution of latents ``[B, 16, n+1, H/8, W/8]``."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        # As the stock encoder: frames past the last whole group of four are not encoded.
        x = x[:, :, : 1 + (x.shape[2] - 1) // 4 * 4]
        frames = 4 * self._chunk_latents(x.shape[0], x.shape[3], x.shape[4], ENCODE_BUDGET, MAX_ENCODE_LATENTS)
        chunking = causal.Chunking("encode_first", "encode_next", 1, frames, lambda n: n // 4, "encoding frames")
        posterior = DiagonalGaussianDistribution(causal.run(self, chunking, x.float()))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _chunk_latents(self, batch: int, height: int, width: int, budget: float, most: int) -> int:
        """Latent frames per chunk: as many as the activation budget allows, from 1 to ``most``."""
        pixels = batch * height * width * self.raw_config.get("base_dim", 96)
        per_latent = 4 * pixels * 4 / self.plan.chips
        return int(min(max(budget // per_latent, 1), most))


# --- text to video ----------------------------------------------------------------------------------------------------


class WanModel(OpenedModel):
    """What text-to-video and image-to-video share: components, text encoding, decoding."""

    pipeline_class: ClassVar[str]
    example: ClassVar[str]

    def __init__(self, folder: Path, devices: tuple | None = None, plans: Plans = DEFAULT_PLANS):
        self.folder = Path(folder)
        self.index = read_model_index(self.folder, self.pipeline_class, self.example)
        if self.index.get("expand_timesteps"):
            raise CheckpointError(f"{folder} is Wan 2.2 TI2V 5B, which these nodes do not run.")
        self.text_encoder = WanTextEncoder(TEXT_ENCODER, self.folder, devices=devices, plan=plans.text_encoder)
        self.transformer = WanTransformer(TRANSFORMER, self.folder, devices=devices, plan=plans.transformer)
        self.transformer_2: WanTransformer | None = None
        if (self.index.get("transformer_2") or [None])[0]:
            self.transformer_2 = WanTransformer(TRANSFORMER_2, self.folder, devices=devices, plan=plans.transformer)
        self.vae = WanVAE(VAE, self.folder, devices=devices, plan=plans.vae)

    @property
    def components(self) -> tuple[DeviceModule, ...]:
        found = (self.text_encoder, self.transformer, self.transformer_2, self.vae)
        return tuple(component for component in found if component is not None)

    @property
    def boundary_ratio(self) -> float | None:
        """Timesteps from this share of the schedule on belong to ``transformer``, those below to ``transformer_2``."""
        return self.index.get("boundary_ratio")

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings the transformer takes."""
        return self.transformer.raw_config.get("text_dim", 4096)

    @property
    def latent_channels(self) -> int:
        return self.vae.raw_config.get("z_dim", 16)

    def encode_prompt(self, prompt: str, negative_prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of both texts, each ``[1, 512, text_dim]`` float32."""
        embeds, negative = self._pipeline(tokenizer=self._tokenizer).encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=True,
            max_sequence_length=TEXT_TOKENS,
        )
        return finite(embeds.float(), "text encoder"), finite(negative.float(), "text encoder")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as ``sample`` returns them → frames ``[B·num_frames, H, W, 3]`` float32 in 0..1."""
        return video_frames(finite(self.vae.decode(latents.float(), return_dict=False)[0], "video autoencoder"))

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the autoencoder's latents, each ``[1, 16, 1, 1, 1]``."""
        config = self.vae.config
        return tuple(torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))

    def _denoise(self, pipeline: Any, on_step: Callable[[StepInfo], None] | None, seed: int, **inputs: Any):
        """Run the stock pipeline to its final latents; returns them in the autoencoder's own space."""
        total = inputs["num_inference_steps"]

        def after_step(pipe, index, timestep, tensors):
            if on_step is not None:
                latents = clean_latents(pipe.scheduler, tensors["latents"])
                on_step(StepInfo(index + 1, total, latents, self._expert(pipe.scheduler, float(timestep))))
            return {}

        latents = pipeline(
            **inputs,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
        )[0]
        mean, std = self.latent_statistics()
        return finite(latents.float() * std + mean, "transformer")

    def _expert(self, scheduler: Any, timestep: float) -> str:
        """Which of two experts the pipeline uses at ``timestep``, for people."""
        if self.transformer_2 is None or self.boundary_ratio is None:
            return ""
        boundary = self.boundary_ratio * scheduler.config.num_train_timesteps
        return "high-noise expert" if timestep >= boundary else "low-noise expert"

    def _rehearse_prompts(self) -> torch.Tensor:
        """The calls that encode a prompt and a negative one; returns embeddings of zeros."""
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
        for _ in ("prompt", "negative prompt"):
            self.text_encoder(ids, ids)
        return torch.zeros(1, TEXT_TOKENS, self.text_dim)

    def _pipeline(
        self,
        flow_shift: float | None = None,
        options: Options | None = None,
        cls: type | None = None,
        tokenizer: Any = None,
        negative: torch.Tensor | None = None,
    ):
        """The stock pipeline (or a subclass of it) around this checkpoint's device modules.

        Only encoding prompts needs a ``tokenizer``. ``negative``: the second branch's embeddings, if there is one.
        """
        import diffusers

        options = options or Options()
        extra = {}
        if self.transformer_2 is not None:
            extra = {
                "transformer_2": self.transformer_2.for_run(options, negative),
                "boundary_ratio": self.boundary_ratio,
            }
        pipeline = (cls or getattr(diffusers, self.pipeline_class))(
            tokenizer=tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            scheduler=self._scheduler(flow_shift),
            transformer=self.transformer.for_run(options, negative),
            **extra,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(self.folder)

    def _scheduler(self, flow_shift: float | None):
        """The checkpoint's own scheduler, fresh for each run, with the schedule's shift replaced if given."""
        plain = load_scheduler(self.folder)
        if flow_shift is None:
            return plain
        # UniPC calls it flow_shift, the flow-matching schedulers shift.
        key = "flow_shift" if "flow_shift" in plain.config else "shift"
        return type(plain).from_config(plain.config, **{key: flow_shift})


class WanTextToVideo(WanModel):
    """A Wan 2.1 text-to-video checkpoint (or Wan 2.2's A14B, whose two experts share the guidance scale)."""

    pipeline_class = "WanPipeline"
    example = "Wan-AI/Wan2.1-T2V-14B-Diffusers"

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
        flow_shift: float,
        k_smooth: bool = False,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> torch.Tensor:
        """Denoise; returns latents ``[B, 16, T, height/8, width/8]`` float32 in the autoencoder's own space.

        Args:
            prompt_embeds, negative_prompt_embeds: ``[B, 512, text_dim]``; the negative one counts when
                ``guidance_scale`` is above 1.
            flow_shift: the schedule's shift: 5.0 for 720p, 3.0 for 480p.
            k_smooth: subtract the mean key in attention (exact in theory, kinder to low precision).
            on_step: called after each step; may raise to stop.
        """
        check_video_size(height, width, num_frames)
        return self._denoise(
            self._pipeline(
                flow_shift,
                Options(smooth_keys=k_smooth),
                negative=negative_prompt_embeds if guidance_scale > 1 else None,
            ),
            on_step,
            seed,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def rehearse(self, task: Task) -> None:
        embeds = self._rehearse_prompts()
        latents = self.sample(
            embeds,
            embeds,
            **dataclasses.asdict(task),
            seed=0,
            flow_shift=REHEARSED_SHIFT,
        )
        self.vae.decode(latents, return_dict=False)
