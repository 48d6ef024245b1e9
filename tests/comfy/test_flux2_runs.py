"""Flux.2 prompts that work, in a real server: the PNG, repeatability, references, batches, schedules, Cancel."""

import json
import re

import pytest
import torch
from PIL import Image

from tests.comfy.cancel import check_cancelled, run_and_cancel, steps_done
from tests.comfy.contract import example_prompts
from tests.comfy.server import REPOSITORY

pytestmark = pytest.mark.server

ENCODER, SAMPLER, DECODER, SAVE = "2", "3", "4", "5"
STEPS = 3


@pytest.fixture
def flux2_demo(object_info) -> dict:
    """The demo workflow as an API prompt: 2 text encoder, 3 sampler, 4 VAE decoder, 5 Save Image."""
    return example_prompts(object_info, "flux2_demo.json")["flux2_demo"]


@pytest.fixture
def nodes(flux2_demo):
    """The three nodes with probes instead of a PNG; a few steps are enough to compare."""
    prompt = {node_id: flux2_demo[node_id] for node_id in (ENCODER, SAMPLER, DECODER)}
    prompt[SAMPLER]["inputs"]["num_inference_steps"] = STEPS
    prompt["10"] = probe(SAMPLER, "flux2_latents")
    prompt["11"] = probe(DECODER, "flux2_images")
    return prompt


@pytest.fixture
def sampling(nodes):
    """Only text encoder and sampler."""
    return {node_id: nodes[node_id] for node_id in (ENCODER, SAMPLER, "10")}


def probe(node_id, name):
    return {"class_type": "ProbeSave", "inputs": {"value": [node_id, 0], "name": name}}


def full_pipeline(nodes, **changes):
    inputs = {**nodes[ENCODER]["inputs"], **nodes[SAMPLER]["inputs"], **changes}
    del inputs["prompt_embeds"]
    return {"1": {"class_type": "Flux2TPUPipeline", "inputs": inputs}, "2": probe("1", "flux2_pipeline")}


def run(server, prompt):
    done = server.run(prompt)
    assert done.succeeded, done.why
    return done


def load(server, name):
    return torch.load(server.base / "output" / f"{name}.pt", weights_only=True)


def latents_of(server, prompt, **changes):
    """Latents of a run of ``prompt`` that no node's cache answers."""
    prompt[SAMPLER]["inputs"].update(changes)
    server.post("/free", {"free_memory": True})
    run(server, prompt)
    return load(server, "flux2_latents")["samples"]


def test_the_demo_saves_a_png_with_prompt_and_workflow_and_shows_what_it_does(server, flux2_demo):
    workflow = json.loads((REPOSITORY / "examples" / "flux2_demo.json").read_text(encoding="utf-8"))
    done = server.run(flux2_demo, workflow=workflow)
    assert done.succeeded, done.why
    (saved,) = done.outputs[SAVE]["images"]
    with Image.open(server.base / "output" / saved["subfolder"] / saved["filename"]) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (256, 256), "RGB")
        assert json.loads(picture.text["prompt"]) == flux2_demo
        assert json.loads(picture.text["workflow"]) == workflow
        assert len(picture.getcolors(2**16)) > 100

    steps = [data["value"] for data in done.of("progress") if data["node"] == SAMPLER and data["max"] == 8]
    assert steps[-8:] == list(range(1, 9))
    texts = done.texts_of(SAMPLER)
    assert any(re.fullmatch(r"step 8/8 · [\d.]+ s/step · ETA 0:00", text) for text in texts)
    assert re.fullmatch(r"8 steps · [\d.]+ s/step · .+", texts[-1])
    assert done.texts_of(DECODER)[-1] == "1 × 256×256"
    assert [image.format for image in done.previews] == ["JPEG"] * 8
    assert all(len(image.getcolors(2**20)) > 100 for image in done.previews)


def test_the_full_pipeline_gives_the_picture_of_the_three_nodes(server, nodes):
    run(server, nodes)
    latents, images = load(server, "flux2_latents")["samples"], load(server, "flux2_images")
    run(server, full_pipeline(nodes))
    assert latents.shape == (1, 128, 16, 16)
    assert images.shape == (1, 256, 256, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01
    assert torch.equal(images, load(server, "flux2_pipeline"))


def test_another_seed_does_not_encode_the_prompt_again(server, nodes):
    def last_text(**changes):
        return run(server, full_pipeline(nodes, **changes)).texts_of("1")[-1]

    assert "prompt from memory" not in last_text(prompt="a cat on a wall", seed=1)
    assert "prompt from memory" in last_text(prompt="a cat on a wall", seed=2)
    assert "prompt from memory" not in last_text(prompt="a dog on a wall", seed=2)

    nodes[SAMPLER]["inputs"]["seed"] = 1
    run(server, nodes)
    nodes[SAMPLER]["inputs"]["seed"] = 2
    again = run(server, nodes)
    assert ENCODER in again.of("execution_cached")[0]["nodes"]
    assert not again.texts_of(ENCODER)


def test_a_seed_means_the_same_picture_and_another_seed_another(server, sampling):
    first = latents_of(server, sampling, seed=1)
    other = latents_of(server, sampling, seed=2)
    again = latents_of(server, sampling, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_prompt_guidance_and_key_smoothing(server, sampling):
    first = latents_of(server, sampling)
    assert not torch.allclose(first, latents_of(server, sampling, guidance_scale=8.0), atol=1e-4)
    smoothed = latents_of(server, sampling, guidance_scale=4.0, k_smooth=True)
    assert torch.allclose(first, smoothed, atol=1e-3)
    assert not torch.equal(first, smoothed)
    sampling[ENCODER]["inputs"]["prompt"] = "a bridge in fog"
    assert not torch.allclose(first, latents_of(server, sampling, k_smooth=False), atol=1e-4)


def filled(kind, shape, value, **inputs):
    return {"class_type": "ProbeFill", "inputs": {"kind": kind, "shape": shape, "value": value, **inputs}}


def test_a_shorter_prompt_counts_as_core_pads_it(server, sampling):
    sampling["20"] = filled("CONDITIONING", "1,77,240", "0.5")
    short = latents_of(server, sampling, prompt_embeds=["20", 0])
    sampling["20"] = filled("CONDITIONING", "1,77,240", "0.5", tokens_before=512 - 77)
    assert torch.equal(short, latents_of(server, sampling))


def picture(width, height, colour, count=1):
    inputs = {"width": width, "height": height, "batch_size": count, "color": colour}
    return {"class_type": "EmptyImage", "inputs": inputs}


def test_reference_images_of_several_sizes_change_the_picture(server, nodes):
    plain = latents_of(server, nodes)
    nodes["20"], nodes["21"] = picture(128, 96, 0xFF0000, count=2), picture(64, 160, 0x0000FF)
    one_size = latents_of(server, nodes, reference_images=["20", 0])
    both = latents_of(server, nodes, reference_images_2=["21", 0])
    images = load(server, "flux2_images")
    assert not torch.allclose(plain, one_size, atol=1e-3)
    assert not torch.allclose(one_size, both, atol=1e-3)
    assert both.shape == plain.shape
    run(server, {**full_pipeline(nodes), "20": nodes["20"], "21": nodes["21"]})
    assert torch.equal(images, load(server, "flux2_pipeline"))


def test_the_edit_example_runs_with_a_loaded_picture(server, object_info):
    prompt = example_prompts(object_info, "flux2_edit.json")["flux2_edit"]
    Image.new("RGBA", (200, 120), (255, 0, 0, 128)).save(server.base / "input" / prompt["6"]["inputs"]["image"])
    for node in prompt.values():
        small = {"model_id": "flux2-tiny", "height": 256, "width": 256, "num_inference_steps": STEPS}
        node["inputs"].update({name: value for name, value in small.items() if name in node["inputs"]})
    done = run(server, prompt)
    assert len(done.outputs[SAVE]["images"]) == 1


def test_a_batch_makes_different_pictures_at_a_size_that_is_not_square(server, nodes):
    nodes[SAMPLER]["inputs"].update(batch_size=3, height=256, width=272)
    nodes[DECODER]["inputs"].update(height=0, width=272)
    done = run(server, nodes)
    images = load(server, "flux2_images")
    assert load(server, "flux2_latents")["samples"].shape == (3, 128, 16, 17)
    assert images.shape == (3, 256, 272, 3)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    assert not torch.allclose(images[1], images[2], atol=1e-2)
    assert done.texts_of(DECODER)[-1] == "3 × 272×256"


def test_sigmas_replace_the_schedule(server, sampling):
    own = latents_of(server, sampling)
    sampling["20"] = {"class_type": "Flux2Scheduler", "inputs": {"steps": STEPS, "width": 256, "height": 256}}
    same = latents_of(server, sampling, sigmas=["20", 0], num_inference_steps=50)
    assert torch.allclose(own, same, atol=1e-4)

    sampling["20"]["inputs"].update(width=1024, height=1024)
    assert not torch.allclose(own, latents_of(server, sampling), atol=1e-3)

    sampling["20"]["inputs"]["steps"] = STEPS + 2
    done = run(server, sampling)
    assert steps_done(done, SAMPLER, STEPS + 2) == STEPS + 2
    assert done.texts_of(SAMPLER)[-1].startswith(f"{STEPS + 2} steps · ")


def test_cancel_stops_within_a_step_and_the_next_prompt_works(server, sampling):
    total = 100
    sampling[SAMPLER]["inputs"].update(num_inference_steps=total, seed=77)
    done, late = run_and_cancel(server, sampling, SAMPLER, lambda done: steps_done(done, SAMPLER, total) >= 3)
    check_cancelled(done, late, SAMPLER, total)
    run(
        server,
        {
            **sampling,
            SAMPLER: {**sampling[SAMPLER], "inputs": {**sampling[SAMPLER]["inputs"], "num_inference_steps": 2}},
        },
    )


def test_a_latent_of_core_is_decoded(server, nodes):
    nodes["20"] = {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 320, "height": 256, "batch_size": 1}}
    nodes[DECODER]["inputs"].update(latents=["20", 0], height=256, width=320)
    run(server, {node_id: nodes[node_id] for node_id in ("20", DECODER, "11")})
    assert load(server, "flux2_images").shape == (1, 256, 320, 3)
