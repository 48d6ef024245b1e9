"""Flux.2 against the stock ``Flux2Pipeline`` on torch CPU float32, on one device and on eight."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline

from comfyui_tpu.models import flux2, flux2_components
from comfyui_tpu.runtime import program
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, NumericsError
from comfyui_tpu.runtime.registry import registry
from tests.checkpoints import flux2 as tiny
from tests.checkpoints import write
from tests.checkpoints.checks import edited
from tests.models.plans import sharded
from tests.models.reference import COMPONENT_BOUND, FRAME_BOUND, LATENT_BOUND, relative_error

PROMPT = "A red fox runs through fresh snow, 雪"
# 17 × 21 picture tokens beside 512 of text: 8 chips divide neither those, nor all, nor the autoencoder's 34 × 42.
SETTINGS = {"height": 272, "width": 336, "num_inference_steps": 8, "guidance_scale": 4.0, "seed": 42}
ROWS, COLUMNS = SETTINGS["height"] // 16, SETTINGS["width"] // 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write("flux2-tiny", tmp_path_factory.mktemp("models") / "flux2-tiny")


@pytest.fixture(scope="module")
def reference(folder):
    pipeline = Flux2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_on(devices, folder):
    return sharded(flux2.Flux2, folder, devices)


@pytest.fixture(scope="module")
def model(devices, folder):
    return open_on(devices, folder)


@pytest.fixture(scope="module")
def single(folder):
    return open_on(tuple(jax.devices()[:1]), folder)


@pytest.fixture(scope="module")
def embeds(reference):
    with torch.no_grad():
        return reference.encode_prompt(PROMPT)[0]


@pytest.fixture(scope="module")
def pictures():
    """Two reference images of different sizes, neither a multiple of 16, with 8-bit values as cameras make them."""
    generator = torch.Generator().manual_seed(9)
    coarse = [torch.rand(1, 3, rows, columns, generator=generator) for rows, columns in ((5, 7), (9, 3))]
    sizes = ((200, 330), (250, 140))
    smooth = [torch.nn.functional.interpolate(c, s, mode="bicubic") for c, s in zip(coarse, sizes, strict=True)]
    return [(picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round() / 255 for picture in smooth]


def unpacked(tokens):
    return tokens.transpose(1, 2).unflatten(2, (ROWS, COLUMNS))


def stock(pipeline, embeds, pictures=(), output_type="latent", **changes):
    """Every step's latents ``[B, 128, h, w]`` of the stock pipeline, and its image."""
    settings = {**SETTINGS, **changes}
    steps = []
    image = pipeline(
        image=[flux2._to_pil(picture) for picture in pictures] or None,
        prompt_embeds=embeds,
        generator=torch.Generator("cpu").manual_seed(settings.pop("seed")),
        output_type=output_type,
        callback_on_step_end=lambda pipe, index, timestep, tensors: steps.append(unpacked(tensors["latents"])) or {},
        **settings,
    ).images
    return steps, image


@pytest.fixture(scope="module")
def stock_result(reference, embeds):
    """Final latents and image."""
    steps, image = stock(reference, embeds, output_type="np")
    return steps[-1], torch.from_numpy(image)


@pytest.fixture(scope="module")
def stock_edit(reference, embeds, pictures):
    return stock(reference, embeds, pictures)[0][-1]


@pytest.fixture(scope="module")
def stock_two_steps(reference, embeds):
    return stock(reference, embeds, num_inference_steps=2)[0]


# --- components -------------------------------------------------------------------------------------------------------


def test_text_encoder_agrees_with_the_reference(model, embeds):
    ours = model.encode_prompt(PROMPT)
    assert ours.shape == (1, 512, model.text_dim)
    assert ours.dtype == torch.float32
    for ours_state, state in zip(ours.chunk(3, dim=2), embeds.chunk(3, dim=2), strict=True):
        assert relative_error(ours_state, state) <= COMPONENT_BOUND


def transformer_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, ROWS * COLUMNS, 128, generator=generator),
        "encoder_hidden_states": 3 * torch.randn(1, 512, 240, generator=generator),
        "timestep": torch.tensor([0.731]),
        "guidance": torch.tensor([4.0]),
        "img_ids": Flux2Pipeline._prepare_latent_ids(torch.empty(1, 128, ROWS, COLUMNS)),
        "txt_ids": Flux2Pipeline._prepare_text_ids(torch.empty(1, 512, 1)),
        "return_dict": False,
    }


def test_transformer_agrees_with_the_reference(model, reference):
    inputs = transformer_inputs()
    with torch.no_grad():
        expected = reference.transformer(**inputs)[0]
    assert relative_error(model.transformer(**inputs)[0], expected) <= COMPONENT_BOUND


def test_vae_decode_agrees_with_the_reference(model, reference):
    latents = torch.randn(1, 32, 2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.vae.decode(latents).sample
    assert relative_error(model.vae.decode(latents).sample, expected) <= COMPONENT_BOUND


def test_vae_encode_agrees_with_the_reference(model, reference):
    picture = torch.rand(1, 3, 192, 320, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected = reference.vae.encode(picture).latent_dist
    ours = model.vae.encode(picture).latent_dist
    assert relative_error(ours.parameters, expected.parameters) <= COMPONENT_BOUND
    assert relative_error(ours.mode(), expected.mode()) <= COMPONENT_BOUND


# --- pipeline ---------------------------------------------------------------------------------------------------------


def test_final_latents_and_image_agree_with_the_pipeline(model, stock_result):
    """Text to image as ComfyUI runs it: from a worker thread, under inference mode."""
    result = {}

    def work():
        with torch.inference_mode():
            latents = model.sample(model.encode_prompt(PROMPT), **SETTINGS)
            result.update(latents=latents, image=model.decode(latents))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    latents, image = stock_result
    assert relative_error(result["latents"], latents) <= LATENT_BOUND
    assert result["image"].shape == image.shape == (1, 272, 336, 3)
    assert float((result["image"] - image).abs().max()) <= FRAME_BOUND
    assert image.std() > 0.02, "the reference shows nothing"


def test_editing_with_two_reference_images_agrees_with_the_pipeline(model, embeds, pictures, stock_result, stock_edit):
    ours = model.sample(embeds, reference_images=pictures, **SETTINGS)
    assert relative_error(ours, stock_edit) <= LATENT_BOUND
    assert relative_error(ours, stock_result[0]) > 10 * LATENT_BOUND, "the reference images have no effect"


# --- behaviour that does not depend on the number of chips ------------------------------------------------------------


def few_steps(model, embeds, **changes):
    return model.sample(embeds, **{**SETTINGS, "num_inference_steps": 2, **changes})


@pytest.fixture(scope="module")
def two_steps(single, embeds):
    return few_steps(single, embeds)


def test_a_seed_gives_the_same_latents_again_and_another_seed_others(single, embeds, two_steps):
    assert two_steps.shape == (1, single.latent_channels, ROWS, COLUMNS)
    assert torch.equal(two_steps, few_steps(single, embeds))
    assert relative_error(few_steps(single, embeds, seed=1), two_steps) > 0.1


def test_guidance_and_prompt_have_an_effect(single, embeds, two_steps):
    assert relative_error(few_steps(single, embeds, guidance_scale=1.0), two_steps) > 1e-3
    assert relative_error(few_steps(single, single.encode_prompt("A green train")), two_steps) > 0.01


def test_a_batch_is_what_the_pipeline_makes_of_it(single, reference, embeds):
    ours = few_steps(single, embeds, batch_size=2)
    steps, _ = stock(reference, embeds, num_inference_steps=2, num_images_per_prompt=2)
    assert ours.shape == (2, 128, ROWS, COLUMNS)
    assert relative_error(ours, steps[-1]) <= LATENT_BOUND
    images = single.decode(ours)
    assert images.shape == (2, 272, 336, 3)
    assert torch.equal(images[1:], single.decode(ours[1:]))


def two_step_levels(reference):
    """The noise levels of two steps as the stock pipeline sets them for the size."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    reference.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=compute_empirical_mu(ROWS * COLUMNS, 2))
    return reference.scheduler.sigmas.tolist()


def test_sigmas_are_the_noise_levels_themselves(single, reference, embeds, two_steps):
    levels = two_step_levels(reference)
    assert len(levels) == 3
    assert levels[-1] == 0
    for sigmas in (levels, levels[:-1]):
        assert relative_error(few_steps(single, embeds, sigmas=sigmas, num_inference_steps=50), two_steps) <= 1e-5
    assert relative_error(few_steps(single, embeds, sigmas=[1.0, 0.3, 0.0]), two_steps) > 0.01


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, -0.1], [2.0, 1.0], [float("nan")]]
)
def test_sigmas_that_are_no_schedule_are_refused(single, embeds, sigmas):
    with pytest.raises(InvalidInput, match="sigmas must fall from at most 1 towards 0"):
        few_steps(single, embeds, sigmas=sigmas)


def test_smoothing_keys_changes_nothing_in_exact_arithmetic(single, embeds, two_steps):
    smooth = few_steps(single, embeds, k_smooth=True)
    assert not torch.equal(two_steps, smooth), "the option is not passed on"
    assert relative_error(smooth, two_steps) <= LATENT_BOUND


def test_each_step_reports_the_predicted_clean_latents(single, reference, embeds, stock_two_steps, two_steps):
    steps = []
    few_steps(single, embeds, on_step=steps.append)
    assert [(s.step, s.total, s.latents.shape) for s in steps] == [(n, 2, two_steps.shape) for n in (1, 2)]
    # The prediction is where the straight line from the initial noise through the latents after the first step ends.
    noise = torch.randn(two_steps.shape, generator=torch.Generator().manual_seed(SETTINGS["seed"]))
    ended = noise + (stock_two_steps[0] - noise) / (1 - two_step_levels(reference)[1])
    assert relative_error(steps[0].latents, ended) <= LATENT_BOUND
    assert relative_error(steps[1].latents, two_steps) <= 1e-5, "the schedule ends clean"


def test_an_exception_in_a_step_stops_the_run_and_the_next_one_works(single, embeds, two_steps):
    calls = []

    def stop(info):
        calls.append(info.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        few_steps(single, embeds, on_step=stop)
    assert calls == [1]
    assert torch.equal(few_steps(single, embeds), two_steps)


def test_a_second_run_compiles_nothing(single, embeds, two_steps):
    before = set(program._programs)
    few_steps(single, embeds, seed=77, guidance_scale=2.5)
    assert set(program._programs) == before


def test_released_weights_come_back_with_the_same_result(single, embeds, two_steps):
    assert registry().release_all() > 0
    assert registry().bytes_in_use == 0
    assert torch.equal(few_steps(single, embeds), two_steps)


def test_nan_is_an_error_that_names_the_stage(single, embeds):
    with pytest.raises(NumericsError, match="autoencoder"):
        single.decode(torch.full((1, 128, ROWS, COLUMNS), float("nan")))
    with pytest.raises(NumericsError, match="transformer"):
        few_steps(single, torch.full_like(embeds, float("nan")))


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(folder, monkeypatch):
    """A model with an empty prompt cache, and the ids of every run of its text encoder."""
    model = open_on(tuple(jax.devices()[:1]), folder)
    runs, run = [], model.text_encoder.run

    def counted(method, inputs):
        runs.append(inputs)
        return run(method, inputs)

    monkeypatch.setattr(model.text_encoder, "run", counted)
    return model, runs


def test_a_prompt_is_encoded_once(encoded):
    model, runs = encoded
    first = model.encode_prompt(PROMPT)
    expected = first.clone()
    first.zero_()  # a caller may do with its copy what it likes
    assert torch.equal(model.encode_prompt(PROMPT), expected)
    assert len(runs) == 1


def test_the_prompt_cache_is_bounded(encoded, monkeypatch):
    model, runs = encoded
    monkeypatch.setattr(flux2, "_PROMPTS_KEPT", 2)
    for prompt in ("a", "b", "a", "c", "a"):  # "a" is used again and stays, "b" goes
        model.encode_prompt(prompt)
    assert len(runs) == 3
    model.encode_prompt("b")
    assert len(runs) == 4
    assert len(model._embeddings) == 2


def test_a_failed_encoding_is_not_kept(encoded, monkeypatch):
    model, _ = encoded
    with monkeypatch.context() as broken:
        bad = lambda *args: [jax.numpy.full((1, 512, 80), np.nan)] * 3  # noqa: E731
        broken.setattr(model.text_encoder, "run", bad)
        with pytest.raises(NumericsError, match="text encoder"):
            model.encode_prompt(PROMPT)
    assert model.encode_prompt(PROMPT).isfinite().all()


def test_the_text_encoder_gets_the_template_and_512_tokens_padded_in_front(encoded):
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    model, runs = encoded
    model.encode_prompt("A fox")
    model.encode_prompt("fox " * 2000)
    (ids, mask), (long_ids, long_mask) = ((r["input_ids"], r["attention_mask"]) for r in runs)
    assert ids.shape == mask.shape == long_ids.shape == (1, 512)
    text = model._processor.tokenizer.decode(ids[0][mask[0].bool()])
    assert text == f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]A fox[/INST]"
    assert mask[0].tolist() == sorted(mask[0].tolist()), "padding comes first"
    assert not mask[0, 0]
    assert long_mask.all()


def real_tokenizer(vocabulary):
    """Mistral's vocabulary file as a tokenizer of the ``tokenizers`` library, which is what the real repository has."""
    import base64

    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from tests.checkpoints.mistral_tokenizer import SPECIAL_TOKENS

    content = json.loads(vocabulary.read_text())
    special, size = (content["config"][f"default_{name}"] for name in ("num_special_tokens", "vocab_size"))
    entries = content["vocab"][: size - special]
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda url: {base64.b64decode(e["token_bytes"]): e["rank"] for e in entries}
    ranks, merges = converter.extract_vocab_merges_from_model("")
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    ids |= {token: special + rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(content["config"]["pattern"]), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytewise])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def test_ids_of_the_real_vocabulary_are_those_of_mistral_common(folder, tmp_path, monkeypatch):
    """Mistral's own library builds the same conversation, from the same vocabulary, without any template."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV7
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    from tests.checkpoints.mistral_tokenizer import processor

    vocabulary = MistralTokenizer._data_path() / "tekken_240911.json"
    real = tmp_path / "real-vocabulary"
    shutil.copytree(folder, real)
    processor(real_tokenizer(vocabulary)).save_pretrained(real / "tokenizer")
    model, seen = open_on(tuple(jax.devices()[:1]), real), []

    def capture(method, inputs):
        seen.append(inputs)
        return [jax.numpy.zeros((1, 512, 80))] * 3

    monkeypatch.setattr(model.text_encoder, "run", capture)
    prompt = "Ein Fuchs läuft durch frischen Schnee: 雪!  (f/1.8,  35mm)\n“Zweite Zeile”, 1234 Bäume 🦊"
    model.encode_prompt(prompt)
    instruct = InstructTokenizerV7(Tekkenizer.from_file(vocabulary))
    messages = [SystemMessage(content=SYSTEM_MESSAGE), UserMessage(content=prompt)]
    expected = instruct.encode_instruct(InstructRequest(messages=messages)).tokens
    ids, mask = seen[0]["input_ids"][0], seen[0]["attention_mask"][0].bool()
    assert ids[mask].tolist() == expected
    assert set(ids[~mask].tolist()) == {11}, "<pad>"


# --- weights ----------------------------------------------------------------------------------------------------------


def test_only_30_text_layers_and_no_vision_tower_are_loaded(single):
    encoder = single.text_encoder
    with registry().lease(encoder.key, "test", encoder._load) as arrays:
        assert arrays["layers.0.block.mlp.up_proj.weight"].shape == (30, 160, 80)
        assert not [name for name in arrays if name.startswith(("norm", "lm_head")) or "vision" in name]
        assert len(arrays) == 9 + 1 + 2, "9 weights a layer, the embedding, two rotary tables"


def test_weights_are_found_under_the_names_of_newer_transformers(folder, tmp_path, embeds):
    renamed = tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    from safetensors.torch import load_file, save_file

    index = renamed / "text_encoder" / "model.safetensors.index.json"
    for shard in (renamed / "text_encoder").glob("*.safetensors"):
        save_file({new_name(name): tensor for name, tensor in load_file(shard).items()}, shard)
    content = json.loads(index.read_text())
    content["weight_map"] = {new_name(name): shard for name, shard in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    ours = open_on(tuple(jax.devices()[:1]), renamed).encode_prompt(PROMPT)
    assert relative_error(ours, embeds) <= COMPONENT_BOUND


def new_name(name):
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


def test_weights_are_spread_over_the_chips(folder):
    model = open_on(tuple(jax.devices()), folder)
    with registry().lease(model.transformer.key, "test", model.transformer._load) as arrays:
        weight = arrays["single_transformer_blocks.0.block.attn.to_qkv_mlp_proj.weight"]
        assert weight.shape == (3, 1152, 128)
        assert {shard.data.shape for shard in weight.addressable_shards} == {(3, 144, 128)}


def test_stored_bfloat16_weights_give_what_the_reference_makes_of_them(tmp_path):
    folder = tiny.write(tmp_path / "bf16", dtype=torch.bfloat16, transformer={"num_layers": 1, "num_single_layers": 1})
    pipeline = Flux2Pipeline.from_pretrained(folder, dtype=torch.float32)
    ours = open_on(tuple(jax.devices()[:1]), folder)
    inputs = transformer_inputs()
    with torch.no_grad():
        assert relative_error(ours.transformer(**inputs)[0], pipeline.transformer(**inputs)[0]) <= COMPONENT_BOUND
    torch.testing.assert_close(ours.vae.bn.running_var, pipeline.vae.bn.running_var)


def in_bfloat16(component):
    component.compute_dtype = jax.numpy.dtype("bfloat16")  # what _compute_dtype says for TPU devices
    return component


def test_on_a_tpu_everything_is_bfloat16(folder):
    for component in open_on(tuple(jax.devices()[:1]), folder).components:
        weights = in_bfloat16(component).skeleton.weights
        assert {str(component.parameter_shapes()[name].dtype) for name in weights} == {"bfloat16"}


def test_bfloat16_stays_near_the_reference_and_knows_neighbouring_timesteps(folder, reference):
    transformer = in_bfloat16(open_on(tuple(jax.devices()[:1]), folder).transformer)
    inputs = transformer_inputs()
    with torch.no_grad():
        expected = reference.transformer(**inputs)[0]
    assert relative_error(transformer(**inputs)[0], expected) <= 4e-2
    # In bfloat16 730.5 and 731.5 would both be 732.
    first, second = (transformer(**{**inputs, "timestep": torch.tensor([t])})[0] for t in (0.7305, 0.7315))
    assert not torch.equal(first, second)


def test_a_bfloat16_autoencoder_stays_near_the_reference(folder, reference):
    vae = in_bfloat16(open_on(tuple(jax.devices()[:1]), folder).vae)
    latents = torch.randn(1, 32, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.vae.decode(latents).sample
    assert relative_error(vae.decode(latents).sample, expected) <= 4e-2


# --- rules and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1024, 1030), r"width must be a multiple of 16 from 256 to 2048; got 1030\. Nearest: 1024"),
        ((100, 1024), r"height .* got 100\. Nearest: 256"),
        ((1024, 4096), r"width .* got 4096\. Nearest: 2048"),
    ],
)
def test_sizes_flux2_cannot_make_are_refused_with_both_values(size, message):
    with pytest.raises(InvalidInput, match=message):
        flux2.check_image_size(*size)


def test_sizes_flux2_can_make_are_accepted():
    for size in ((256, 256), (1024, 1024), (2048, 256), (1360, 768), (272, 2048)):
        flux2.check_image_size(*size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 250}, "height .* got 250"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"reference_images": [torch.rand(64, 64, 3)] * 11}, "Up to 10 reference images are possible; got 11"),
        ({"reference_images": [torch.rand(64, 64, 3), torch.rand(40, 90, 3)]}, r"image 2 must be .* got 40×90"),
        ({"reference_images": [torch.rand(64, 600, 3)]}, r"at most 8 times as long .* got 64×600"),
        ({"reference_images": [torch.rand(1, 64, 64, 3)]}, r"\[height, width, 3\]; got \[1, 64, 64, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_any_weights_load(single, embeds, changes, message):
    registry().release_all()
    with pytest.raises(InvalidInput, match=message):
        few_steps(single, embeds, **changes)
    assert registry().bytes_in_use == 0


def test_embeddings_of_another_model_are_refused_with_both_widths(single):
    with pytest.raises(InvalidInput, match=r"must be \[batch, tokens, 240\]; got \[1, 512, 4096\]"):
        few_steps(single, torch.zeros(1, 512, 4096))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", lambda v: v.update(_class_name="FluxPipeline"), "for FluxPipeline; .* Flux2Pipeline"),
        (
            "model_index.json",
            lambda v: v.update(_class_name="Flux2KleinPipeline"),
            "for Flux2KleinPipeline; .*FLUX.2-dev",
        ),
        ("transformer/config.json", lambda v: v.update(_class_name="Other"), "describes a Other"),
        (
            "text_encoder/config.json",
            lambda v: v.update(architectures=["T5EncoderModel"]),
            "must be a Mistral3ForConditionalGeneration",
        ),
        (
            "text_encoder/config.json",
            lambda v: v["text_config"].update(num_hidden_layers=30),
            "more than 30 layers .* got 30",
        ),
    ],
)
def test_another_kind_of_checkpoint_is_refused_before_any_weights_load(folder, tmp_path, file, change, message):
    copy = edited(folder, tmp_path / "edited", file, change)
    registry().release_all()
    with pytest.raises(CheckpointError, match=message):
        flux2.Flux2.open(copy)
    assert registry().bytes_in_use == 0


def test_an_autoencoder_without_statistics_is_refused_before_any_weights_load(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith("bn.")}, path)
    with pytest.raises(CheckpointError, match=r"has no bn\.running_mean"):
        flux2.Flux2.open(copy)


def test_a_truncated_file_is_found_before_any_weights_load(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = sorted((copy / "text_encoder").glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=shard.name):
        flux2.Flux2.open(copy)


@pytest.mark.parametrize(
    ("name", "message"), [("chat_template.jinja", "chat template"), ("tokenizer.json", "tokenizer")]
)
def test_an_incomplete_tokenizer_is_an_error(folder, tmp_path, name, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer" / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        flux2.Flux2.open(copy).encode_prompt(PROMPT)


def test_calls_the_device_modules_cannot_serve_are_refused(single):
    with pytest.raises(InvalidInput, match="only encodes prompts"):
        single.text_encoder(torch.zeros(1, 4), torch.ones(1, 4), pixel_values=None)
    with pytest.raises(InvalidInput, match=r"attention_kwargs are not supported on the TPU; got \['scale'\]"):
        single.transformer(**transformer_inputs(), joint_attention_kwargs={"scale": 0.5})


def test_opening_again_gives_the_same_model_until_its_files_change(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = flux2.Flux2.open(copy)
    assert flux2.Flux2.open(copy) is first
    assert "tensor over" in first.describe_plan()
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert flux2.Flux2.open(copy) is not first


def test_the_layers_that_are_used_are_those_of_the_stock_pipeline():
    import inspect

    defaults = inspect.signature(Flux2Pipeline.encode_prompt).parameters
    assert defaults["text_encoder_out_layers"].default == flux2_components.HIDDEN_STATES
    assert defaults["max_sequence_length"].default == flux2.TEXT_TOKENS
