"""Checkpoints that run through the same code: Wan 2.1 image-to-video (CLIP embeddings) and Wan 2.2 text-to-video."""

import json

import jax
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from comfyui_tpu.models.wan import WanTextToVideo
from comfyui_tpu.models.wan_i2v import WanImageToVideo
from comfyui_tpu.runtime.errors import InvalidInput
from tests.checkpoints import wan21
from tests.checkpoints.weights import randomize
from tests.models.reference import COMPONENT_BOUND, LATENT_BOUND, relative_error

SIZE = {"height": 256, "width": 256, "num_frames": 17}
STEPS = 3
PROMPTS = ("The fox turns its head", "still picture")
ONE = tuple(jax.devices()[:1])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def statistics(pipeline):
    config = pipeline.vae.config
    return (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))


def stock_latents(pipeline, **inputs):
    pipeline.set_progress_bar_config(disable=True)
    embeds, negative = pipeline.encode_prompt(*PROMPTS, True, max_sequence_length=512)
    latents = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        generator=torch.Generator("cpu").manual_seed(3),
        num_inference_steps=STEPS,
        output_type="latent",
        **SIZE,
        **inputs,
    ).frames
    mean, std = statistics(pipeline)
    return latents * std + mean


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Wan 2.1 I2V in small: a CLIP image encoder, and a transformer that attends to its 257 tokens."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = wan21.write(
        tmp_path_factory.mktemp("models") / "wan21-i2v",
        transformer={"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 96, "num_layers": 2},
    )
    with torch.random.fork_rng(devices=[]):
        config = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=8,
            image_size=224,
            patch_size=14,
        )
        encoder = CLIPVisionModel(config)
    randomize(encoder, 0)
    encoder.save_pretrained(folder / "image_encoder")
    CLIPImageProcessor().save_pretrained(folder / "image_processor")
    edit_json(
        folder / "model_index.json",
        _class_name="WanImageToVideoPipeline",
        image_encoder=["transformers", "CLIPVisionModel"],
        image_processor=["transformers", "CLIPImageProcessor"],
    )
    return folder


def picture():
    coarse = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(256, 256), mode="bilinear").movedim(1, -1)


def test_wan_21_image_to_video_agrees_with_the_pipeline(clip_folder):
    pipeline = WanImageToVideoPipeline.from_pretrained(clip_folder)
    model = WanImageToVideo(clip_folder, ONE)
    condition = model.encode_image(picture(), **SIZE)
    # What the stock encode_image makes of a PIL picture: values 0..1, resized and normalised by the image processor.
    pixels = pipeline.image_processor(images=[picture()[0].movedim(-1, 0)], return_tensors="pt", do_rescale=False)
    with torch.no_grad():
        embeds = pipeline.image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]
    assert condition.image_embeds.shape == (1, 257, 64)
    assert relative_error(condition.image_embeds, embeds) <= COMPONENT_BOUND
    pipeline.encode_image = lambda image, device=None: embeds
    expected = stock_latents(pipeline, image=picture().movedim(-1, 1), guidance_scale=3.5)
    ours = model.sample(
        *model.encode_prompt(*PROMPTS), condition, num_inference_steps=STEPS, guidance_scale=3.5, seed=3, shift=3.0
    )
    assert relative_error(ours, expected) <= LATENT_BOUND


def test_wan_21_image_to_video_takes_one_picture(clip_folder):
    with pytest.raises(InvalidInput, match="one picture at a time; got 2"):
        WanImageToVideo(clip_folder, ONE).encode_image(picture().expand(2, -1, -1, -1), **SIZE)


def test_wan_22_text_to_video_with_two_experts_agrees_with_the_pipeline(tmp_path):
    folder = wan21.write(tmp_path / "wan22-t2v", transformer={"num_layers": 2})
    with torch.random.fork_rng(devices=[]):
        second = WanTransformer3DModel(**{**wan21.TRANSFORMER, "num_layers": 2})
    randomize(second, 99)
    second.save_pretrained(folder / "transformer_2")
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
    expected = stock_latents(WanPipeline.from_pretrained(folder), guidance_scale=4.0)
    model = WanTextToVideo(folder, ONE)
    experts = []
    ours = model.sample(
        *model.encode_prompt(*PROMPTS),
        **SIZE,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        seed=3,
        flow_shift=3.0,
        on_step=lambda info: experts.append(info.expert),
    )
    assert relative_error(ours, expected) <= LATENT_BOUND
    assert len(set(experts)) == 2
