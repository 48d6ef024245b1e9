"""Wan 2.2 image-to-video against the stock ``WanImageToVideoPipeline`` on torch CPU float32."""

import shutil

import jax
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from comfyui_tpu.models import wan
from comfyui_tpu.models.wan_i2v import WanImageToVideo, fit_picture
from comfyui_tpu.runtime import program
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput
from tests.checkpoints import wan22, write
from tests.models.plans import sharded
from tests.models.reference import FRAME_BOUND, LATENT_BOUND, relative_error

SIZE = {"height": 256, "width": 272, "num_frames": 17}
SETTINGS = {"num_inference_steps": 8, "guidance_scale": 3.5, "guidance_scale_2": 2.0, "seed": 7, "shift": 5.0}
PROMPTS = ("The fox turns its head", "still picture")


def open_on(devices, folder):
    return sharded(WanImageToVideo, folder, devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write("wan22-i2v-tiny", tmp_path_factory.mktemp("models") / "wan22-i2v-tiny")


@pytest.fixture(scope="module")
def reference(folder):
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def embeds(reference):
    return reference.encode_prompt(*PROMPTS, True, max_sequence_length=512)


@pytest.fixture(scope="module")
def single(folder):
    return open_on(tuple(jax.devices()[:1]), folder)


def picture(height=SIZE["height"], width=SIZE["width"], seed=0, batch=1, channels=3):
    """A smooth coloured picture ``[B, H, W, C]`` in 0..1."""
    coarse = torch.rand(batch, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").movedim(1, -1)


def stock_latents(pipeline, embeds, image, last=None, **changes):
    settings = {**SETTINGS, **changes}
    generator = torch.Generator("cpu").manual_seed(settings.pop("seed"))
    shift = settings.pop("shift")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)
    latents = pipeline(
        image=image.movedim(-1, 1),
        last_image=None if last is None else last.movedim(-1, 1),
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        generator=generator,
        output_type="latent",
        **SIZE,
        **settings,
    ).frames
    config = pipeline.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return latents * std + mean


@torch.no_grad()
def stock_frames(pipeline, latents):
    video = pipeline.vae.decode(latents).sample
    return pipeline.video_processor.postprocess_video(video, output_type="pt").permute(0, 1, 3, 4, 2).flatten(0, 1)


def test_final_latents_and_frames_agree_with_the_pipeline(devices, folder, reference, embeds):
    model = open_on(devices, folder)
    with torch.inference_mode():
        condition = model.encode_image(picture(), **SIZE)
        assert condition.latents.shape == (1, 20, 5, 32, 34)
        latents = model.sample(*model.encode_prompt(*PROMPTS), condition, **SETTINGS)
        frames = model.decode(latents)
    expected = stock_latents(reference, embeds, picture())
    assert relative_error(latents, expected) <= LATENT_BOUND
    assert float((frames - stock_frames(reference, expected)).abs().max()) <= FRAME_BOUND


def few(model, embeds, condition, **changes):
    return model.sample(*embeds, condition, **{**SETTINGS, **changes})


def test_an_end_image_agrees_with_the_pipeline_and_marks_the_last_frame(single, reference, embeds):
    last = picture(seed=5)
    condition = single.encode_image(picture(), **SIZE, end_image=last)
    mask = condition.latents[0, :4]
    assert mask[:, 0].min() == 1, "the first latent frame is given"
    assert mask[:3, -1].max() == 0
    assert mask[3, -1].min() == 1, "of the last group of four frames only the last is given"
    ours = few(single, embeds, condition, num_inference_steps=3)
    expected = stock_latents(reference, embeds, picture(), last, num_inference_steps=3)
    assert relative_error(ours, expected) <= LATENT_BOUND


def experts_used(monkeypatch, model, embeds, condition, **changes):
    """Which expert ran in each step."""
    used = []
    run = wan.WanTransformer.run

    def spy(self, method, inputs, **kwargs):
        used.append((self.spec.name, float(inputs["timestep"][0])))
        return run(self, method, inputs, **kwargs)

    monkeypatch.setattr(wan.WanTransformer, "run", spy)
    few(model, embeds, condition, **changes)
    return used[::2]  # each step runs the prompt and the negative prompt


def test_the_second_expert_takes_over_at_the_boundary(monkeypatch, single, embeds):
    condition = single.encode_image(picture(), **SIZE)
    used = experts_used(monkeypatch, single, embeds, condition)
    assert len(used) == 8
    assert {name for name, _ in used} == {"transformer", "transformer_2"}
    for name, timestep in used:
        assert name == ("transformer" if timestep >= 900 else "transformer_2")


def test_both_experts_run_the_same_compiled_program(single, embeds):
    condition = single.encode_image(picture(), **SIZE)
    few(single, embeds, condition, num_inference_steps=3)
    transformer, second = single.transformer, single.transformer_2
    assert transformer.key != second.key
    before = len(program._programs)
    few(single, embeds, condition, num_inference_steps=4)
    denoising = [key for key in program._programs if key[0] is transformer.spec.build and "denoise" in key]
    assert len(program._programs) == before
    assert sum(key[1] == second._config_fingerprint and key[3] == second.devices for key in denoising) == 1


def test_checkpoints_with_links_to_the_same_files_share_the_weights(tmp_path, folder):
    t2v = write("wan21-tiny", tmp_path / "t2v")
    linked = tmp_path / "linked"
    shutil.copytree(folder, linked)
    for path in (t2v / "vae").iterdir():
        target = linked / "vae" / path.name
        target.unlink(missing_ok=True)
        target.symlink_to(path)
    devices = tuple(jax.devices()[:1])
    one, other = wan.WanTextToVideo(t2v, devices), WanImageToVideo(linked, devices)
    assert one.vae.key == other.vae.key
    assert one.transformer.key != other.transformer.key


@pytest.mark.parametrize(("ratio", "expert"), [(0.0, "transformer"), (1.0, "transformer_2")])
def test_a_boundary_at_either_end_uses_one_expert(monkeypatch, tmp_path, embeds, ratio, expert):
    folder = wan22.write(tmp_path / "edge", boundary_ratio=ratio)
    model = open_on(tuple(jax.devices()[:1]), folder)
    condition = model.encode_image(picture(), **SIZE)
    used = experts_used(monkeypatch, model, embeds, condition, num_inference_steps=4)
    # UniPC starts at timestep 999 of 1000: a boundary of 1.0 leaves nothing to the first expert.
    assert {name for name, _ in used} == {expert}


def test_each_expert_has_its_own_guidance(single, embeds):
    condition = single.encode_image(picture(), **SIZE)
    base = few(single, embeds, condition, num_inference_steps=3)
    same = few(single, embeds, condition, num_inference_steps=3, guidance_scale_2=None)
    assert relative_error(same, base) > 1e-3
    explicit = few(single, embeds, condition, num_inference_steps=3, guidance_scale_2=SETTINGS["guidance_scale"])
    assert torch.equal(same, explicit)


def test_a_batch_of_pictures_gives_a_batch_of_videos(single, embeds):
    batch = single.encode_image(picture(batch=2), **SIZE)
    alone = single.encode_image(picture(batch=2)[:1], **SIZE)
    assert batch.latents.shape[0] == 2
    assert torch.equal(batch.latents[:1], alone.latents)
    videos = few(single, embeds, batch, num_inference_steps=2)
    assert videos.shape == (2, 16, 5, 32, 34)
    assert relative_error(videos[:1], few(single, embeds, alone, num_inference_steps=2)) <= LATENT_BOUND
    assert not torch.equal(videos[0], videos[1])


def test_the_condition_is_made_without_touching_the_global_random_state(single):
    before = torch.get_rng_state()
    first = single.encode_image(picture(), **SIZE).latents
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(single.encode_image(picture(), **SIZE).latents, first)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_crop_keeps_the_aspect_ratio_of_a_portrait_picture():
    """A circle stays a circle."""
    y, x = torch.meshgrid(torch.arange(640.0), torch.arange(360.0), indexing="ij")
    circle = (((y - 320) ** 2 + (x - 180) ** 2) < 60**2).float()[None, :, :, None].expand(-1, -1, -1, 3)
    out = fit_picture(circle, 256, 512, "crop")[0, :, :, 0] > 0.5
    assert out.shape == (256, 512)
    assert abs(int(out.any(0).sum()) - int(out.any(1).sum())) <= 2


def test_pad_shows_the_whole_picture_between_black_borders():
    out = fit_picture(torch.ones(1, 640, 320, 3), 256, 512, "pad")[0, :, :, 0]
    assert out[:, 192:320].min() > 0.999
    assert out[:, :192].max() == 0
    assert out[:, 320:].max() == 0


def test_stretch_fills_the_frame():
    assert fit_picture(torch.ones(1, 640, 320, 3), 256, 512, "stretch").min() > 0.999


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_a_picture_of_the_right_size_is_left_alone(mode):
    image = picture()
    assert torch.equal(fit_picture(image, SIZE["height"], SIZE["width"], mode), image)


def test_alpha_is_dropped_and_grey_repeated():
    rgba = picture(channels=4)
    assert torch.equal(fit_picture(rgba, SIZE["height"], SIZE["width"]), rgba[..., :3])
    assert fit_picture(rgba[..., :1], 256, 256).shape == (1, 256, 256, 3)


def test_pictures_that_cannot_be_used_are_refused(single):
    with pytest.raises(InvalidInput, match="at least 16×16 pixels; got 1×1"):
        fit_picture(torch.zeros(1, 1, 1, 3), 256, 256)
    with pytest.raises(InvalidInput, match="one of crop, pad, stretch; got 'zoom'"):
        fit_picture(picture(), 256, 256, "zoom")
    with pytest.raises(InvalidInput, match=r"\[batch, height, width, 3\]"):
        fit_picture(torch.zeros(256, 256, 3), 256, 256)
    with pytest.raises(InvalidInput, match=r"one picture or as many as image \(1\); got 2"):
        single.encode_image(picture(), **SIZE, end_image=picture(batch=2))


def test_a_text_to_video_checkpoint_is_refused(tmp_path, folder):
    text_to_video = write("wan21-tiny", tmp_path / "t2v")
    with pytest.raises(CheckpointError, match="WanPipeline; this node needs one for WanImageToVideoPipeline"):
        WanImageToVideo.open(text_to_video)
    with pytest.raises(CheckpointError, match="WanImageToVideoPipeline; this node needs one for WanPipeline"):
        wan.WanTextToVideo.open(folder)
