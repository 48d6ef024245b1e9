"""Bad inputs to the Flux.2 nodes in a real server: refused with both values and what to do, before weights load."""

import pytest

from tests.comfy.test_flux2_runs import (
    DECODER,
    ENCODER,
    SAMPLER,
    filled,
    flux2_demo,
    full_pipeline,
    nodes,
    picture,
    sampling,
)
from tests.comfy.test_server_errors import execution_error, refusal

pytestmark = pytest.mark.server

__all__ = ["flux2_demo", "nodes", "sampling"]  # fixtures


@pytest.mark.parametrize(
    ("node_id", "name", "value", "parts"),
    [
        (SAMPLER, "height", 1000, ["height must be a multiple of 16 from 256 to 2048", "got 1000", "Nearest: "]),
        (SAMPLER, "width", 2064, ["width must be a multiple of 16", "2048", "2064"]),
        (SAMPLER, "height", 0, ["height must be a multiple of 16", "256", "got 0"]),
        (ENCODER, "model_id", "../etc", ["'../etc' is not accepted", "models/diffusers", "repo id"]),
        (DECODER, "model_id", "no-such-model", ["'no-such-model'", "Folders there: ", "flux2-tiny"]),
    ],
)
def test_a_wrong_constant_is_refused_when_the_prompt_is_queued(server, flux2_demo, node_id, name, value, parts):
    flux2_demo[node_id]["inputs"][name] = value
    messages = refusal(server, flux2_demo)
    assert list(messages) == [node_id]
    for part in parts:
        assert part in messages[node_id]


@pytest.mark.parametrize(
    ("name", "core_node", "value", "part"),
    [
        ("height", "PrimitiveInt", 1000, "height must be a multiple of 16 from 256 to 2048; got 1000"),
        ("num_inference_steps", "PrimitiveInt", 101, "num_inference_steps must be between 1 and 100, but 101 came"),
        ("guidance_scale", "PrimitiveFloat", -1.0, "guidance_scale must be between 0.0 and 20.0, but -1.0 came"),
        ("batch_size", "PrimitiveInt", 65, "batch_size must be between 1 and 64, but 65 came"),
        ("model_id", "PrimitiveString", "/etc", "'/etc' is not accepted"),
    ],
)
def test_a_wrong_value_from_a_link_is_refused_by_the_node(server, sampling, name, core_node, value, part):
    sampling["20"] = {"class_type": core_node, "inputs": {"value": value}}
    sampling[SAMPLER]["inputs"][name] = ["20", 0]
    assert part in execution_error(server, sampling, SAMPLER)


def test_a_checkpoint_of_another_family_is_refused(server, sampling):
    sampling[ENCODER]["inputs"]["model_id"] = "wan21-tiny"
    message = execution_error(server, sampling, ENCODER)
    assert "WanPipeline" in message
    assert "Flux2Pipeline" in message


@pytest.mark.parametrize(
    ("hints", "part"),
    [
        (
            {"height": 1024, "width": 1024},
            "height and width say 1024×1024, but the latents are those of a picture 256×272",
        ),
        ({"height": 272, "width": 256}, "Set height to 256 and width to 272"),
        ({"height": 0, "width": 256}, "or both to 0"),
    ],
)
def test_a_decoder_hint_that_contradicts_the_latents_names_both_sizes(server, flux2_demo, hints, part):
    flux2_demo["20"] = empty_latent("EmptyFlux2LatentImage", width=272, height=256)
    flux2_demo[DECODER]["inputs"].update(latents=["20", 0], **hints)
    assert part in execution_error(server, flux2_demo, DECODER)


def empty_latent(kind, **inputs):
    return {"class_type": kind, "inputs": {"batch_size": 1, **inputs}}


@pytest.mark.parametrize(
    ("latent", "parts"),
    [
        (empty_latent("EmptySD3LatentImage", width=256, height=256), ["[batch, 128, height/16", "16 channels came"]),
        (
            empty_latent("EmptyHunyuanLatentVideo", width=256, height=256, length=9),
            ["video latents [1, 16, 3, 32, 32]"],
        ),
        (filled("LATENT", "1,128,16,16", "nan"), ["latents hold NaN"]),
    ],
)
def test_latents_that_are_not_flux2s_are_refused(server, flux2_demo, latent, parts):
    flux2_demo["20"] = latent
    flux2_demo[DECODER]["inputs"]["latents"] = ["20", 0]
    message = execution_error(server, flux2_demo, DECODER)
    for part in parts:
        assert part in message


def test_conditioning_of_another_width_and_nan_are_refused(server, flux2_demo):
    wan_prompt = {"prompt": "a fox", "negative_prompt": "", "model_id": "wan21-tiny"}
    flux2_demo["20"] = {"class_type": "Wan21TextEncoder", "inputs": wan_prompt}
    flux2_demo[SAMPLER]["inputs"]["prompt_embeds"] = ["20", 0]
    message = execution_error(server, flux2_demo, SAMPLER)
    assert "64 wide" in message
    assert "240 wide" in message
    flux2_demo["20"] = filled("CONDITIONING", "1,512,240", "nan")
    assert "prompt_embeds holds NaN" in execution_error(server, flux2_demo, SAMPLER)


@pytest.mark.parametrize(
    ("core_node", "inputs", "part"),
    [
        ("FluxGuidance", {"guidance": 3.5}, "Set the sampler's guidance_scale instead"),
        ("FluxDisableGuidance", {}, "Set the sampler's guidance_scale instead"),
        ("ReferenceLatent", {"latent": ["21", 0]}, "Connect the pictures to the sampler's reference_images instead"),
    ],
)
def test_what_core_adds_to_conditioning_is_not_ignored_silently(server, sampling, core_node, inputs, part):
    sampling["21"] = empty_latent("EmptyFlux2LatentImage", width=256, height=256)
    sampling["20"] = {"class_type": core_node, "inputs": {"conditioning": [ENCODER, 0], **inputs}}
    sampling[SAMPLER]["inputs"]["prompt_embeds"] = ["20", 0]
    assert part in execution_error(server, sampling, SAMPLER)


def test_eleven_reference_images_are_refused_and_counted(server, nodes):
    references = {"20": picture(64, 64, 0, count=9), "21": picture(64, 80, 0, count=2)}
    links = {"reference_images": ["20", 0], "reference_images_3": ["21", 0]}
    prompt = {**full_pipeline(nodes, **links, prompt="a prompt never encoded"), **references}
    message = execution_error(server, prompt, "1")
    assert "up to 10 reference images, but 11 came (9 in reference_images + 2 in reference_images_3)" in message


@pytest.mark.parametrize(("width", "height"), [(48, 64), (64, 576)])
def test_a_reference_image_the_model_cannot_take_is_named(server, sampling, width, height):
    sampling["20"] = picture(width, height, 0)
    sampling[SAMPLER]["inputs"]["reference_images_2"] = ["20", 0]
    message = execution_error(server, sampling, SAMPLER)
    assert "reference_images_2 must be at least 64 pixels" in message
    assert f"but {width}×{height} came" in message


@pytest.mark.parametrize(
    ("slot", "step", "part"),
    [
        (0, 2, "sigmas must end with 0"),
        (1, 2, "sigmas must begin with 1"),
        (1, 4, "sigmas must be SIGMAS"),
    ],
)
def test_a_part_of_a_schedule_is_refused(server, sampling, slot, step, part):
    sampling["20"] = {"class_type": "Flux2Scheduler", "inputs": {"steps": 4, "width": 256, "height": 256}}
    sampling["21"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["20", 0], "step": step}}
    sampling[SAMPLER]["inputs"]["sigmas"] = ["21", slot]
    assert part in execution_error(server, sampling, SAMPLER)
