"""Bad inputs to the CogVideoX nodes in a real server: refused with both values and what to do, before weights load."""

import pytest

from tests.comfy.test_cogvideox_runs import CHECKPOINT, DECODER, ENCODER, SAMPLER, cogvideox_demo, nodes, sampling
from tests.comfy.test_server_errors import execution_error, refusal

pytestmark = pytest.mark.server

__all__ = ["cogvideox_demo", "nodes", "sampling"]  # fixtures


@pytest.mark.parametrize(
    ("node_id", "name", "value", "parts"),
    [
        (SAMPLER, "height", 100, ["height must be a multiple of 16", "100"]),
        (SAMPLER, "width", 0, ["width must be a multiple of 16", "got 0"]),
        (SAMPLER, "num_frames", 8, ["num_frames must be", "9", "161", "8"]),
        (SAMPLER, "num_frames", 162, ["num_frames must be", "9", "161", "162"]),
        (ENCODER, "model_id", "../etc", ["'../etc' is not accepted", "models/diffusers", "repo id"]),
        (ENCODER, "model_id", "no-such-model", ["'no-such-model'", "Folders there: ", CHECKPOINT]),
    ],
)
def test_a_wrong_constant_is_refused_when_the_prompt_is_queued(server, cogvideox_demo, node_id, name, value, parts):
    cogvideox_demo[node_id]["inputs"][name] = value
    messages = refusal(server, cogvideox_demo)
    assert list(messages) == [node_id]
    for part in parts:
        assert part in messages[node_id]


@pytest.mark.parametrize(
    ("name", "core_node", "value", "part"),
    [
        ("num_frames", "PrimitiveInt", 8, "num_frames must be"),
        ("height", "PrimitiveInt", 100, "height must be a multiple of 16"),
        ("num_inference_steps", "PrimitiveInt", 0, "num_inference_steps must be between 1 and 100, but 0 came"),
        ("guidance_scale", "PrimitiveFloat", 0.5, "guidance_scale must be between 1.0 and 20.0, but 0.5 came"),
        ("num_devices", "PrimitiveInt", -1, "num_devices must be between 0 and 1024, but -1 came"),
        ("model_id", "PrimitiveString", "/etc", "'/etc' is not accepted"),
    ],
)
def test_a_wrong_value_from_a_link_is_refused_by_the_node(server, sampling, name, core_node, value, part):
    sampling["20"] = {"class_type": core_node, "inputs": {"value": value}}
    sampling[SAMPLER]["inputs"][name] = ["20", 0]
    assert part in execution_error(server, sampling, SAMPLER)


def test_more_devices_than_there_are_are_refused_with_both_numbers(server, sampling):
    sampling[SAMPLER]["inputs"]["num_devices"] = 99
    message = execution_error(server, sampling, SAMPLER)
    assert "num_devices must be at most 1" in message
    assert "99 came" in message


def test_latents_without_a_model_say_what_to_connect(server, nodes):
    nodes["20"] = {
        "class_type": "EmptyHunyuanLatentVideo",
        "inputs": {"width": 128, "height": 128, "length": 17, "batch_size": 1},
    }
    nodes[DECODER]["inputs"]["latents"] = ["20", 0]
    message = execution_error(server, {node_id: nodes[node_id] for node_id in ("20", DECODER, "12")}, DECODER)
    assert "latents carry no model_id" in message
    assert "Connect CogVideoX TPU Sampler" in message


def test_latents_of_another_model_are_refused(server, nodes):
    nodes["20"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}}
    nodes["21"] = {"class_type": "PrimitiveString", "inputs": {"value": CHECKPOINT}}
    nodes[DECODER]["inputs"].update(latents=["20", 0], model_id=["21", 0])
    prompt = {node_id: nodes[node_id] for node_id in ("20", "21", DECODER, "12")}
    assert "image latents [1, 4, 32, 32] came" in execution_error(server, prompt, DECODER)


def test_a_checkpoint_of_another_family_is_refused(server, sampling):
    sampling[ENCODER]["inputs"]["model_id"] = "wan21-tiny"
    message = execution_error(server, sampling, ENCODER)
    assert "WanPipeline" in message
    assert "CogVideoXPipeline" in message
