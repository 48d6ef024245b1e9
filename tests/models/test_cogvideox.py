"""CogVideoX against the stock ``CogVideoXPipeline`` on torch CPU float32, on one device and on eight."""

import importlib.util
import json
import logging
import shutil
import threading

import jax
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline

from comfyui_tpu.models import cogvideox, cogvideox_preview
from comfyui_tpu.models.cogvideox_components import CogVideoXTransformer
from comfyui_tpu.runtime import program
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, NumericsError
from comfyui_tpu.runtime.registry import registry
from tests.checkpoints import cogvideox as checkpoints
from tests.checkpoints.checks import edited
from tests.checkpoints.tokenizer import CORPUS
from tests.models.plans import sharded
from tests.models.reference import COMPONENT_BOUND, FRAME_BOUND, LATENT_BOUND, relative_error

SETTINGS = {
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "num_inference_steps": 8,
    "guidance_scale": 6.0,
    "seed": 2025,
}
PROMPTS = ("A red fox runs through fresh snow, 雪", "blurred, low quality")
BFLOAT16_BOUND = 0.1  # no parity, only: everything is cast where it must be


def open_on(devices, folder):
    return sharded(cogvideox.CogVideoX, folder, devices)


def stock(folder):
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cogvideox")
    return {variant: checkpoints.write(root / variant, variant=variant) for variant in checkpoints.VARIANTS}


@pytest.fixture(scope="module")
def references(folders):
    return {variant: stock(folder) for variant, folder in folders.items()}


@pytest.fixture(scope="module")
def reference(references):
    return references["1.5-5b"]


@pytest.fixture(scope="module")
def reference_embeds(reference):
    with torch.no_grad():
        return reference.encode_prompt(*PROMPTS, True)


def stock_sample(pipeline, embeds, **changes):
    """Final latents of the stock pipeline in the autoencoder's own space, as ``sample`` returns them."""
    settings = {**SETTINGS, **changes}
    generator = torch.Generator("cpu").manual_seed(settings.pop("seed"))
    frames = (settings["num_frames"] - 1) // 4 + 1
    latents = pipeline(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=generator, output_type="latent", **settings
    ).frames
    return latents[:, latents.shape[1] - frames :].movedim(1, 2) / pipeline.vae.config.scaling_factor


@torch.no_grad()
def stock_frames(pipeline, latents):
    video = pipeline.vae.decode(latents).sample
    return pipeline.video_processor.postprocess_video(video, output_type="pt").permute(0, 1, 3, 4, 2).flatten(0, 1)


# --- components -------------------------------------------------------------------------------------------------------


def test_text_encoder_agrees_with_the_reference(devices, folders, reference_embeds):
    model = open_on(devices, folders["1.5-5b"])
    for ours, expected in zip(model.encode_prompt(*PROMPTS), reference_embeds, strict=True):
        assert ours.shape == (1, 226, model.text_dim)
        assert ours.dtype == torch.float32
        assert relative_error(ours, expected) <= COMPONENT_BOUND


def transformer_inputs(pipeline, frames, height=8, width=12, batch=2):
    """Latents of a size whose tokens, with the 226 of the text, do not divide by 8."""
    rotary = None
    if pipeline.transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, "cpu")
    width_of_text = pipeline.transformer.config.text_embed_dim
    return {
        "hidden_states": torch.randn(batch, frames, 16, height, width, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(batch, 226, width_of_text, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([731] * batch),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


@pytest.mark.parametrize(("variant", "frames"), [("1.5-5b", 4), ("1.0-5b", 3), ("1.0-2b", 3)])
def test_transformer_agrees_with_the_reference(devices, folders, references, variant, frames):
    inputs = transformer_inputs(references[variant], frames)
    with torch.no_grad():
        expected = references[variant].transformer(**inputs)[0]
    ours = open_on(devices, folders[variant]).transformer(**inputs)[0]
    assert relative_error(ours, expected) <= COMPONENT_BOUND


def test_heads_that_do_not_divide_over_the_chips(tmp_path, references):
    folder = checkpoints.write(tmp_path / "six-heads", transformer={"num_attention_heads": 6, "num_layers": 2})
    from diffusers import CogVideoXTransformer3DModel

    inputs = transformer_inputs(references["1.5-5b"], frames=4)
    with torch.no_grad():
        expected = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")(**inputs)[0]
    ours = open_on(tuple(jax.devices()), folder).transformer
    assert relative_error(ours(**inputs)[0], expected) <= COMPONENT_BOUND


# One latent frame, an even number, an odd one, an odd one with a second chunk; 6 × 10 does not divide by 2 × 2 × 2.
@pytest.mark.parametrize("size", [(1, 8, 12), (2, 6, 10), (3, 8, 12), (5, 8, 12)], ids=str)
def test_vae_decode_agrees_with_the_reference(devices, folders, reference, size):
    if len(devices) > 1 and size[0] in (1, 3):
        pytest.skip("compiling for eight virtual devices is slow; the other lengths cover these programs")
    latents = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.vae.decode(latents).sample
    assert expected.shape[2] == cogvideox.decoded_frames(size[0])
    ours = open_on(devices, folders["1.5-5b"]).vae.decode(latents).sample
    assert relative_error(ours, expected) <= COMPONENT_BOUND


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_vae_encode_agrees_with_the_reference(devices, folders, reference, frames):
    if len(devices) > 1 and frames != 17:
        pytest.skip("compiling for eight virtual devices is slow; 17 frames cover these programs")
    video = torch.rand(1, 3, frames, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        expected = reference.vae.encode(video).latent_dist
    ours = open_on(devices, folders["1.5-5b"]).vae.encode(video).latent_dist
    assert relative_error(ours.parameters, expected.parameters) <= COMPONENT_BOUND
    assert relative_error(ours.mode(), expected.mode()) <= COMPONENT_BOUND


def test_weights_are_spread_over_the_chips(folders):
    transformer = open_on(tuple(jax.devices()), folders["1.5-5b"]).transformer
    with registry().lease(transformer.key, "test", transformer._load) as arrays:
        weight = arrays["transformer_blocks.0.block.ff.net.0.proj.weight"]
        assert weight.shape == (3, 512, 128)
        assert {shard.data.shape for shard in weight.addressable_shards} == {(3, 64, 128)}


def test_components_run_in_bfloat16_as_on_a_tpu(folders, reference, reference_embeds):
    model = open_on(tuple(jax.devices()[:1]), folders["1.5-5b"])
    for component in model.components:
        component.compute_dtype = jax.numpy.dtype("bfloat16")  # what _compute_dtype says for TPU devices
        assert {str(shape.dtype) for shape in component.parameter_shapes().values()} == {"bfloat16"}
    embeds = model.encode_prompt(*PROMPTS)[0]
    inputs = transformer_inputs(reference, frames=2, batch=1)
    latents = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        velocity, frames = reference.transformer(**inputs)[0], reference.vae.decode(latents).sample
    for ours, expected in (
        (embeds, reference_embeds[0]),
        (model.transformer(**inputs)[0], velocity),
        (model.vae.decode(latents).sample, frames),
    ):
        assert ours.dtype == torch.float32
        assert 1e-4 < relative_error(ours, expected) <= BFLOAT16_BOUND


# --- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["1.5-5b", "1.0-5b"])
def test_final_latents_and_frames_agree_with_the_pipeline(devices, folders, references, reference_embeds, variant):
    """Text to frames as ComfyUI runs it: from a worker thread, under inference mode."""
    model, result = open_on(devices, folders[variant]), {}

    def work():
        with torch.inference_mode():
            latents = model.sample(*model.encode_prompt(*PROMPTS), **SETTINGS)
            result.update(latents=latents, frames=model.decode(latents, SETTINGS["num_frames"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    expected = stock_sample(references[variant], reference_embeds)
    assert relative_error(result["latents"], expected) <= LATENT_BOUND
    frames = stock_frames(references[variant], expected)
    assert result["frames"].shape == frames.shape == (9, 64, 96, 3)
    assert float((result["frames"] - frames).abs().max()) <= FRAME_BOUND
    assert frames.std() > 0.02, "the reference shows nothing"


# --- behaviour that does not depend on the number of chips ------------------------------------------------------------


@pytest.fixture(scope="module")
def single(folders):
    return open_on(tuple(jax.devices()[:1]), folders["1.5-5b"])


@pytest.fixture(scope="module")
def single_2b(folders):
    return open_on(tuple(jax.devices()[:1]), folders["1.0-2b"])


def few_steps(model, embeds, **changes):
    return model.sample(*embeds, **{**SETTINGS, "num_inference_steps": 2, **changes})


@pytest.mark.parametrize("frames", [9, 17, 21, 49, 81])
def test_exactly_as_many_frames_as_asked_for_come_out(single, reference_embeds, frames):
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    latents = single.sample(*reference_embeds, **{**SETTINGS, **size, "num_frames": frames})
    assert latents.shape[2] % 2 == 1, "an even number of latent frames would not begin with a single frame"
    assert latents.shape[2:] == (cogvideox.latent_frames(frames), 4, 4)
    assert single.decode(latents, frames).shape == (frames, 32, 32, 3)


def test_every_number_of_frames_has_enough_latents():
    for frames in range(cogvideox.MIN_FRAMES, cogvideox.MAX_FRAMES + 1):
        latents = cogvideox.latent_frames(frames)
        assert 0 <= cogvideox.decoded_frames(latents) - frames < 8
        assert latents % 2 == 1


def test_frames_that_are_too_many_are_cut_off_the_end_of_the_stock_video(single, reference, reference_embeds):
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    ours = single.sample(*reference_embeds, **{**SETTINGS, **size, "num_frames": 21})
    expected = stock_sample(reference, reference_embeds, **{**size, "num_frames": 25})
    assert relative_error(ours, expected) <= LATENT_BOUND
    frames = stock_frames(reference, expected)
    assert float((single.decode(ours, 21) - frames[:21]).abs().max()) <= FRAME_BOUND
    assert float((single.decode(ours) - frames).abs().max()) <= FRAME_BOUND


def test_more_frames_than_the_latents_hold_are_refused(single):
    with pytest.raises(InvalidInput, match=r"num_frames must be from 1 to 9, .* 3 latent frames .* got 17"):
        single.decode(torch.zeros(1, 16, 3, 4, 4), 17)


def test_several_videos_follow_one_another(single, reference):
    latents = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    expected = stock_frames(reference, latents).unflatten(0, (2, 8))[:, :7].flatten(0, 1)
    assert float((single.decode(latents, 7) - expected).abs().max()) <= FRAME_BOUND


def test_a_seed_gives_the_same_latents_again_and_another_seed_others(single, reference_embeds):
    first = few_steps(single, reference_embeds)
    assert torch.equal(first, few_steps(single, reference_embeds))
    assert relative_error(few_steps(single, reference_embeds, seed=1), first) > 0.1


def test_smoothing_keys_changes_nothing_in_exact_arithmetic(single, reference_embeds):
    plain, smooth = (few_steps(single, reference_embeds, k_smooth=flag) for flag in (False, True))
    assert not torch.equal(plain, smooth), "the option is not passed on"
    assert relative_error(smooth, plain) <= LATENT_BOUND


def test_without_guidance_the_negative_prompt_is_not_run(single, reference, reference_embeds, monkeypatch):
    batches = []
    original = CogVideoXTransformer.__call__

    def counting(self, hidden_states, **kwargs):
        batches.append(hidden_states.shape[0])
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer, "__call__", counting)
    ours = few_steps(single, reference_embeds, guidance_scale=1.0)
    assert batches == [1, 1]
    expected = stock_sample(reference, reference_embeds, guidance_scale=1.0, num_inference_steps=2)
    assert relative_error(ours, expected) <= LATENT_BOUND


def test_sin_cos_positions_are_made_once_a_run(single_2b, reference_embeds, monkeypatch):
    embed, made = single_2b.transformer.skeleton.module.patch_embed, []
    original = embed._get_positional_embeddings
    monkeypatch.setattr(embed, "_get_positional_embeddings", lambda *size: made.append(size) or original(*size))
    with torch.inference_mode():
        few_steps(single_2b, reference_embeds)
    assert made == [(8, 12, 9)]
    assert single_2b.transformer._placed_positions is None, "a run must not leave its tables on the devices"


def test_dynamic_guidance_agrees_with_the_pipeline(single, reference, reference_embeds):
    ours = few_steps(single, reference_embeds, dynamic_cfg=True)
    expected = stock_sample(reference, reference_embeds, use_dynamic_cfg=True, num_inference_steps=2)
    assert relative_error(ours, expected) <= LATENT_BOUND
    assert relative_error(ours, few_steps(single, reference_embeds)) > 0.01


@pytest.mark.parametrize(
    ("choice", "scheduler"),
    [
        ("checkpoint", CogVideoXDDIMScheduler),
        ("ddim", CogVideoXDDIMScheduler),
        ("dpm", CogVideoXDPMScheduler),
    ],
)
def test_the_scheduler_can_be_chosen(single_2b, folders, references, reference_embeds, choice, scheduler):
    reference = references["1.0-2b"]
    assert type(reference.scheduler) is CogVideoXDDIMScheduler
    chosen = CogVideoXPipeline(
        **{**reference.components, "scheduler": scheduler.from_config(reference.scheduler.config)}
    )
    chosen.set_progress_bar_config(disable=True)
    ours = few_steps(single_2b, reference_embeds, scheduler=choice, num_inference_steps=3)
    expected = stock_sample(chosen, reference_embeds, num_inference_steps=3)
    assert relative_error(ours, expected) <= LATENT_BOUND


def test_an_unknown_scheduler_is_refused_before_any_weights_load(single, reference_embeds):
    registry().release_all()
    with pytest.raises(InvalidInput, match="one of checkpoint, dpm, ddim; got 'euler'"):
        few_steps(single, reference_embeds, scheduler="euler")
    assert registry().bytes_in_use == 0


def test_each_step_reports_the_predicted_clean_latents(single, reference_embeds):
    steps = []
    final = few_steps(single, reference_embeds, on_step=steps.append, num_inference_steps=3)
    assert [(s.step, s.total) for s in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(s.latents.shape == final.shape for s in steps)
    # The schedule ends without noise, where the clean prediction is the result itself.
    assert relative_error(steps[-1].latents, final) <= LATENT_BOUND
    assert relative_error(steps[0].latents, final) > 0.01


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
    few_steps(single, reference_embeds, seed=77, scheduler="ddim")
    assert set(program._programs) == before


def test_released_weights_come_back_with_the_same_result(single, reference_embeds):
    first = few_steps(single, reference_embeds)
    assert registry().release_all() > 0
    assert torch.equal(few_steps(single, reference_embeds), first)


def test_nan_is_an_error_that_names_the_stage(single, reference_embeds):
    with pytest.raises(NumericsError, match="video autoencoder"):
        single.decode(torch.full((1, 16, 3, 4, 4), float("nan")))
    poisoned = torch.full_like(reference_embeds[0], float("nan"))
    with pytest.raises(NumericsError, match="transformer"):
        few_steps(single, (poisoned, reference_embeds[1]))


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sentencepiece_folder(folders, tmp_path):
    """The checkpoint with the tokenizer files of the real repositories: no tokenizer.json."""
    import sentencepiece

    folder = tmp_path / "real-tokenizer"
    shutil.copytree(folders["1.5-5b"], folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_prefix=str(folder / "tokenizer" / "spiece"),
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer" / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "legacy": True, "model_max_length": 226}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_real_repositories_tokenizer_gives_sentencepieces_ids(sentencepiece_folder):
    import sentencepiece

    tokenizer = cogvideox.CogVideoX(sentencepiece_folder)._tokenizer
    pieces = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "tokenizer" / "spiece.model"))
    text = "A red fox runs through deep snow."
    assert tokenizer(text).input_ids == [*pieces.encode(text), 1]


def test_without_protobuf_the_real_tokenizer_says_what_to_install(sentencepiece_folder, monkeypatch):
    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "google.protobuf" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    registry().release_all()
    with pytest.raises(CheckpointError, match="pip install protobuf"):
        cogvideox.CogVideoX(sentencepiece_folder).encode_prompt(*PROMPTS)
    assert registry().bytes_in_use == 0


# --- previews ---------------------------------------------------------------------------------------------------------


def test_previews_are_fitted_to_the_latents_of_this_checkpoint(single, reference):
    pictures = cogvideox_preview.synthetic_pictures()
    latents = cogvideox_preview.encode(single.vae.folder, single.vae.raw_config, pictures)
    with torch.no_grad():
        expected = reference.vae.encode(pictures.unsqueeze(2)).latent_dist.mode().squeeze(2)
    assert relative_error(latents, expected) <= COMPONENT_BOUND
    with torch.inference_mode():  # as ComfyUI runs nodes
        factors, bias = cogvideox_preview.rgb_factors(single.vae.folder, single.vae.raw_config)
    assert (factors.shape, bias.shape) == ((16, 3), (3,))
    colours = torch.nn.functional.avg_pool2d(pictures, 8).movedim(1, -1)
    # The tiny encoder is random and keeps little of a picture; what it keeps must be found.
    assert (latents.movedim(1, -1) @ factors + bias - colours).var() < 0.9 * colours.var()


def test_preview_factors_recover_a_linear_relation_exactly():
    pictures = cogvideox_preview.synthetic_pictures()
    colours = torch.nn.functional.adaptive_avg_pool2d(pictures, 8)
    mixing = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) * 10
    latents = torch.einsum("nchw,ck->nkhw", colours, mixing) + 3
    factors, bias = cogvideox_preview.fit(latents, pictures)
    assert relative_error(torch.einsum("nkhw,kc->nchw", latents, factors) + bias.view(1, 3, 1, 1), colours) < 1e-3


def test_preview_factors_are_fitted_once(single, monkeypatch):
    first = single.latent_rgb_factors()
    monkeypatch.setattr(cogvideox_preview, "encode", None)
    assert single.latent_rgb_factors() is first


def test_a_failing_fit_is_logged_and_gives_grey(folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        factors, bias = cogvideox_preview.rgb_factors(
            tmp_path, json.loads((folders["1.5-5b"] / "vae/config.json").read_text())
        )
    assert not factors.any()
    assert not bias.any()
    assert "Previews of CogVideoX stay grey" in caplog.text


# --- rules and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((720, 1281, 81), r"width must be a multiple of 16 from 16 to 2048; got 1281\. Nearest: 1280"),
        ((0, 1280, 81), r"height .* got 0\. Nearest: 16"),
        ((720, 1280, 8), r"num_frames must be from 9 to 161; got 8\. Nearest: 9"),
        ((720, 1280, 162), r"num_frames .* got 162\. Nearest: 161"),
    ],
)
def test_sizes_cogvideox_cannot_make_are_refused_with_both_values(size, message):
    with pytest.raises(InvalidInput, match=message):
        cogvideox.check_video_size(*size)


def test_sizes_cogvideox_can_make_are_accepted():
    for size in ((720, 1280, 81), (768, 1360, 161), (480, 720, 49), (256, 256, 9), (720, 1280, 50)):
        cogvideox.check_video_size(*size)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            lambda v: v.update(_class_name="CogVideoXImageToVideoPipeline"),
            "for CogVideoXImageToVideoPipeline; .* CogVideoXPipeline",
        ),
        ("transformer/config.json", lambda v: v.update(_class_name="Other"), "describes a Other"),
        ("transformer/config.json", lambda v: v.update(in_channels=32), "takes 32 channels; .* 16"),
        ("text_encoder/config.json", lambda v: v.update(d_model=32), "width 64, but .* makes 32"),
        ("text_encoder/config.json", lambda v: v.update(architectures=["T5Model"]), "must be a T5EncoderModel"),
    ],
)
def test_another_kind_of_checkpoint_is_refused_before_any_weights_load(folders, tmp_path, file, change, message):
    folder = edited(folders["1.5-5b"], tmp_path / "edited", file, change)
    registry().release_all()
    with pytest.raises(CheckpointError, match=message):
        cogvideox.CogVideoX.open(folder)
    assert registry().bytes_in_use == 0


def test_a_truncated_file_of_the_last_component_is_found_before_any_weights_load(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders["1.5-5b"], folder)
    shard = next((folder / "vae").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    registry().release_all()
    with pytest.raises(CheckpointError, match=shard.name):
        cogvideox.CogVideoX.open(folder)
    assert registry().bytes_in_use == 0


def test_a_scheduler_of_another_family_is_refused_unless_one_is_chosen(folders, tmp_path, reference_embeds):
    name = "scheduler/scheduler_config.json"
    folder = edited(folders["1.5-5b"], tmp_path / "edited", name, lambda v: v.update(_class_name="DDIMScheduler"))
    model = cogvideox.CogVideoX.open(folder)
    with pytest.raises(CheckpointError, match=r"names the scheduler DDIMScheduler; .* Choose dpm or ddim"):
        model._scheduler("checkpoint")
    assert type(model._scheduler("dpm")) is CogVideoXDPMScheduler


def test_opening_again_gives_the_same_model_until_its_files_change(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders["1.5-5b"], folder)
    first = cogvideox.CogVideoX.open(folder)
    assert cogvideox.CogVideoX.open(folder) is first
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert cogvideox.CogVideoX.open(folder) is not first
