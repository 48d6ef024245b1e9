"""Wan 2.1 against the stock ``WanPipeline`` on torch CPU float32, on one device and on eight."""

import shutil
import threading

import jax
import pytest
import torch

from comfyui_tpu.models import wan
from comfyui_tpu.runtime import program
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, NumericsError
from comfyui_tpu.runtime.registry import registry
from tests.checkpoints import wan21
from tests.checkpoints.checks import edited
from tests.models.plans import sharded
from tests.models.reference import COMPONENT_BOUND, FRAME_BOUND, LATENT_BOUND, relative_error

SETTINGS = {
    "height": 256,
    "width": 256,
    "num_frames": 17,
    "num_inference_steps": 8,
    "guidance_scale": 5.0,
    "seed": 2025,
    "flow_shift": 3.0,
}
PROMPTS = ("A red fox runs through fresh snow, 雪", "blurred, low quality")


def open_on(devices, folder):
    return sharded(wan.WanTextToVideo, folder, devices)


@pytest.fixture(scope="module")
def model(devices, wan_folder):
    return open_on(devices, wan_folder)


@pytest.fixture(scope="module")
def reference_embeds(wan_reference):
    return wan_reference.encode_prompt(*PROMPTS, True, max_sequence_length=512)


@pytest.fixture(scope="module")
def reference_latents(wan_reference, reference_embeds):
    """Final latents of the stock pipeline, in its normalised space."""
    return stock_sample(wan_reference, reference_embeds)


def stock_sample(pipeline, embeds, **changes):
    settings = {**SETTINGS, **changes}
    generator = torch.Generator("cpu").manual_seed(settings.pop("seed"))
    assert settings.pop("flow_shift") == pipeline.scheduler.config.flow_shift
    return pipeline(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=generator, output_type="latent", **settings
    ).frames


def denormalised(pipeline, latents):
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    return latents * std + mean


@torch.no_grad()
def stock_frames(pipeline, latents):
    video = pipeline.vae.decode(latents).sample
    return pipeline.video_processor.postprocess_video(video, output_type="pt").permute(0, 1, 3, 4, 2).flatten(0, 1)


# --- components -------------------------------------------------------------------------------------------------------


def test_text_encoder_agrees_with_the_reference(model, reference_embeds):
    for ours, reference in zip(model.encode_prompt(*PROMPTS), reference_embeds, strict=True):
        assert ours.shape == (1, 512, model.text_dim)
        assert relative_error(ours, reference) <= COMPONENT_BOUND


@pytest.mark.parametrize("size", [(5, 32, 32), (5, 34, 34)], ids=["tokens-divide", "1445-tokens-do-not-divide-by-8"])
def test_transformer_agrees_with_the_reference(model, wan_reference, reference_embeds, size):
    latents = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0))
    inputs = {
        "hidden_states": latents,
        "timestep": torch.tensor([731]),
        "encoder_hidden_states": reference_embeds[0],
        "return_dict": False,
    }
    with torch.no_grad():
        reference = wan_reference.transformer(**inputs)[0]
    assert relative_error(model.transformer(**inputs)[0], reference) <= COMPONENT_BOUND


@pytest.mark.parametrize("latent_frames", [5, 6], ids=["whole-chunk", "chunk-filled-up"])
def test_vae_decode_agrees_with_the_reference(model, wan_reference, latent_frames):
    latents = torch.randn(1, 16, latent_frames, 18, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = wan_reference.vae.decode(latents).sample
    assert reference.shape[2] == 4 * (latent_frames - 1) + 1
    assert relative_error(model.vae.decode(latents).sample, reference) <= COMPONENT_BOUND


def test_vae_decode_does_not_depend_on_the_chunk_size(wan_folder, wan_reference, monkeypatch):
    model = open_on(tuple(jax.devices()[:1]), wan_folder)
    latents = torch.randn(1, 16, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(wan, "DECODE_BUDGET", 1)
    assert model.vae._chunk_latents(1, 128, 128, wan.DECODE_BUDGET, wan.MAX_DECODE_LATENTS) == 1
    with torch.no_grad():
        reference = wan_reference.vae.decode(latents).sample
    assert relative_error(model.vae.decode(latents).sample, reference) <= COMPONENT_BOUND


@pytest.mark.parametrize("frames", [1, 21], ids=["one-picture", "21-frames"])
def test_vae_encode_agrees_with_the_reference(model, wan_reference, frames):
    video = torch.rand(1, 3, frames, 144, 256, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        reference = wan_reference.vae.encode(video).latent_dist
    ours = model.vae.encode(video).latent_dist
    assert relative_error(ours.parameters, reference.parameters) <= COMPONENT_BOUND
    assert relative_error(ours.mode(), reference.mode()) <= COMPONENT_BOUND


def test_heads_that_do_not_divide_over_the_chips(tmp_path):
    folder = wan21.write(tmp_path / "six-heads", transformer={"num_attention_heads": 6})
    from diffusers import WanTransformer3DModel

    reference = WanTransformer3DModel.from_pretrained(folder / "transformer")
    ours = open_on(tuple(jax.devices()), folder).transformer
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 10, 14, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([17, 900]),
        "encoder_hidden_states": torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(1)),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = reference(**inputs)[0]
    assert relative_error(ours(**inputs)[0], expected) <= COMPONENT_BOUND


def test_weights_are_spread_over_the_chips(wan_folder, reference_embeds):
    model = open_on(tuple(jax.devices()), wan_folder)
    with registry().lease(model.transformer.key, "test", model.transformer._load) as arrays:
        weight = arrays["blocks.0.block.ffn.net.0.proj.weight"]
        assert weight.shape == (4, 256, 96)
        assert {shard.data.shape for shard in weight.addressable_shards} == {(4, 32, 96)}


def test_the_real_class_keeps_the_same_weights_in_float32():
    from diffusers import WanTransformer3DModel

    assert set(wan.TRANSFORMER.keep_float32) == set(WanTransformer3DModel._keep_in_fp32_modules)


def test_on_a_tpu_weights_are_bfloat16_except_those_the_pipeline_keeps_in_float32(wan_folder):
    model = open_on(tuple(jax.devices()[:1]), wan_folder)
    transformer, vae = model.transformer, model.vae
    transformer.compute_dtype = jax.numpy.dtype("bfloat16")  # what _compute_dtype says for TPU devices
    dtypes = {name: str(shape.dtype) for name, shape in transformer.parameter_shapes().items()}
    assert dtypes["blocks.0.block.attn1.to_q.weight"] == "bfloat16"
    for name in ("blocks.0.block.scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] == "float32"
    assert {str(shape.dtype) for shape in vae.parameter_shapes().values()} == {"float32"}


# --- pipeline ---------------------------------------------------------------------------------------------------------


def test_final_latents_and_frames_agree_with_the_pipeline(model, wan_reference, reference_latents):
    """Text to frames as ComfyUI runs it: from a worker thread, under inference mode."""
    result = {}

    def work():
        with torch.inference_mode():
            latents = model.sample(*model.encode_prompt(*PROMPTS), **SETTINGS)
            result.update(latents=latents, frames=model.decode(latents))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected = denormalised(wan_reference, reference_latents)
    assert relative_error(result["latents"], expected) <= LATENT_BOUND
    frames = stock_frames(wan_reference, expected)
    assert result["frames"].shape == frames.shape == (17, 256, 256, 3)
    assert float((result["frames"] - frames).abs().max()) <= FRAME_BOUND
    assert frames.std() > 0.02, "the reference shows nothing"


# --- behaviour that does not depend on the number of chips ------------------------------------------------------------


@pytest.fixture(scope="module")
def single(wan_folder):
    return open_on(tuple(jax.devices()[:1]), wan_folder)


def few_steps(model, embeds, **changes):
    return model.sample(*embeds, **{**SETTINGS, "num_inference_steps": 2, **changes})


def test_a_seed_gives_the_same_latents_again_and_another_seed_others(single, reference_embeds):
    first = few_steps(single, reference_embeds)
    assert torch.equal(first, few_steps(single, reference_embeds))
    assert relative_error(few_steps(single, reference_embeds, seed=1), first) > 0.1


def test_a_changed_flow_shift_takes_effect_at_once(single, reference_embeds):
    assert (
        relative_error(few_steps(single, reference_embeds, flow_shift=5.0), few_steps(single, reference_embeds)) > 0.01
    )


def test_smoothing_keys_changes_nothing_in_exact_arithmetic(single, reference_embeds):
    plain, smooth = (few_steps(single, reference_embeds, k_smooth=flag) for flag in (False, True))
    assert not torch.equal(plain, smooth), "the option is not passed on"
    assert relative_error(smooth, plain) <= LATENT_BOUND


def test_without_guidance_the_negative_prompt_is_not_run(single, wan_reference, reference_embeds):
    ours = few_steps(single, reference_embeds, guidance_scale=1.0)
    stock = stock_sample(wan_reference, reference_embeds, guidance_scale=1.0, num_inference_steps=2)
    assert relative_error(ours, denormalised(wan_reference, stock)) <= LATENT_BOUND


def test_each_step_reports_the_predicted_clean_latents(single, wan_reference, reference_embeds):
    steps = []
    final = few_steps(single, reference_embeds, on_step=steps.append)
    assert [(s.step, s.total) for s in steps] == [(1, 2), (2, 2)]
    # The schedule ends at sigma 0, where the clean prediction is the result itself.
    assert relative_error(denormalised(wan_reference, steps[-1].latents), final) <= LATENT_BOUND


def test_an_exception_in_a_step_stops_the_run_and_the_next_one_works(single, reference_embeds):
    calls = []

    def stop(info):
        calls.append(info.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        few_steps(single, reference_embeds, on_step=stop)
    assert calls == [1]
    assert few_steps(single, reference_embeds).isfinite().all()


def test_a_second_run_compiles_nothing(single, reference_embeds):
    few_steps(single, reference_embeds)
    before = set(program._programs)
    few_steps(single, reference_embeds, seed=77)
    assert set(program._programs) == before


def test_released_weights_come_back_with_the_same_result(single, reference_embeds):
    first = few_steps(single, reference_embeds)
    assert registry().release_all() > 0
    assert registry().bytes_in_use == 0
    assert torch.equal(few_steps(single, reference_embeds), first)


def test_nan_is_an_error_that_names_the_stage(single, reference_embeds):
    with pytest.raises(NumericsError, match="video autoencoder"):
        single.decode(torch.full((1, 16, 2, 16, 16), float("nan")))
    poisoned = torch.full_like(reference_embeds[0], float("nan"))
    with pytest.raises(NumericsError, match="transformer"):
        few_steps(single, (poisoned, reference_embeds[1]))


# --- rules and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((720, 1281, 81), r"width must be a multiple of 16 from 256 to 1280; got 1281\. Nearest: 1280"),
        ((100, 1280, 81), r"height .* got 100\. Nearest: 256"),
        ((720, 1280, 20), r"num_frames must be 4n \+ 1 .* got 20\. Nearest: 21"),
        ((720, 1280, 125), r"num_frames .* got 125\. Nearest: 121"),
    ],
)
def test_sizes_wan_cannot_make_are_refused_with_both_values(size, message):
    with pytest.raises(InvalidInput, match=message):
        wan.check_video_size(*size)


def test_sizes_wan_can_make_are_accepted():
    for size in ((720, 1280, 81), (480, 832, 81), (256, 256, 17), (1280, 720, 121)):
        wan.check_video_size(*size)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", lambda v: v.update(_class_name="FluxPipeline"), "for FluxPipeline; .* WanPipeline"),
        ("model_index.json", lambda v: v.update(expand_timesteps=True), "TI2V 5B"),
        ("transformer/config.json", lambda v: v.update(_class_name="Other"), "describes a Other"),
        (
            "text_encoder/config.json",
            lambda v: v.update(architectures=["T5EncoderModel"]),
            "must be a UMT5EncoderModel",
        ),
    ],
)
def test_another_kind_of_checkpoint_is_refused_before_any_weights_load(wan_folder, tmp_path, file, change, message):
    folder = edited(wan_folder, tmp_path / "edited", file, change)
    registry().release_all()
    with pytest.raises(CheckpointError, match=message):
        wan.WanTextToVideo.open(folder)
    assert registry().bytes_in_use == 0


def test_a_truncated_file_of_the_last_component_is_found_before_any_weights_load(wan_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(wan_folder, folder)
    shard = next((folder / "vae").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    registry().release_all()
    with pytest.raises(CheckpointError, match=shard.name):
        wan.WanTextToVideo.open(folder)
    assert registry().bytes_in_use == 0


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        wan.WanTextToVideo.open(tmp_path)


def test_a_scheduler_that_diffusers_does_not_have_is_an_error(wan_folder, tmp_path):
    folder = edited(
        wan_folder, tmp_path / "edited", "scheduler/scheduler_config.json", lambda v: v.update(_class_name="os")
    )
    with pytest.raises(CheckpointError, match="names the scheduler 'os'"):
        wan.WanTextToVideo.open(folder).encode_prompt(*PROMPTS)


def test_opening_again_gives_the_same_model_until_its_files_change(wan_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(wan_folder, folder)
    first = wan.WanTextToVideo.open(folder)
    assert wan.WanTextToVideo.open(folder) is first
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert wan.WanTextToVideo.open(folder) is not first
