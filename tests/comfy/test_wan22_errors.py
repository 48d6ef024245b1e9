"""Bad inputs to the Wan 2.2 I2V nodes in a real server: refused with both values, before weights load."""

import pytest

from tests.comfy.test_server_errors import execution_error, refusal
from tests.comfy.test_wan22_runs import (
    DECODER,
    ENCODER,
    IMAGE_ENCODER,
    LOAD,
    SAMPLER,
    _checkpoint,
    i2v_demo,
    load_image,
    picture,
    sampling,
)

pytestmark = pytest.mark.server

__all__ = ["_checkpoint", "i2v_demo", "sampling"]  # fixtures


@pytest.fixture(autouse=True)
def _server_survives(server):
    yield
    assert server.is_alive()


@pytest.mark.parametrize(
    ("node_id", "name", "value", "parts"),
    [
        (IMAGE_ENCODER, "num_frames", 20, ["num_frames must be 4n", "20"]),
        (IMAGE_ENCODER, "width", 1281, ["width must be a multiple of 16", "1280", "1281"]),
        (IMAGE_ENCODER, "model_id", "../etc", ["'../etc' is not accepted", "models/diffusers", "repo id"]),
        (IMAGE_ENCODER, "resize_mode", "zoom", ["resize_mode must be one of crop, pad, stretch, but 'zoom' came"]),
        (SAMPLER, "model_id", "no-such-model", ["'no-such-model'", "Folders there: ", "wan22-i2v-tiny"]),
        (DECODER, "model_id", "/etc", ["'/etc' is not accepted"]),
    ],
)
def test_a_wrong_constant_is_refused_when_the_prompt_is_queued(server, i2v_demo, node_id, name, value, parts):
    i2v_demo[node_id]["inputs"][name] = value
    messages = refusal(server, i2v_demo)
    assert list(messages) == [node_id]
    for part in parts:
        assert part in messages[node_id]


@pytest.mark.parametrize(
    ("node_id", "name", "core_node", "value", "part"),
    [
        (IMAGE_ENCODER, "height", "PrimitiveInt", 264, "height must be a multiple of 16"),
        (SAMPLER, "shift", "PrimitiveFloat", 0.5, "shift must be between 1.0 and 20.0, but 0.5 came"),
        (SAMPLER, "guidance_scale_2", "PrimitiveFloat", -2.0, "guidance_scale_2 must be between -1.0 and 20.0"),
    ],
)
def test_a_wrong_value_from_a_link_is_refused_by_the_node(server, sampling, node_id, name, core_node, value, part):
    sampling["20"] = {"class_type": core_node, "inputs": {"value": value}}
    sampling[node_id]["inputs"][name] = ["20", 0]
    assert part in execution_error(server, sampling, node_id)


def test_guidance_for_the_second_expert_alone_is_refused_because_it_would_have_no_effect(server, sampling):
    sampling[SAMPLER]["inputs"].update(guidance_scale=1.0, guidance_scale_2=3.0)
    message = execution_error(server, sampling, SAMPLER)
    assert "guidance_scale_2 is 3, but with guidance_scale 1 " in message
    assert "Set guidance_scale above 1" in message


@pytest.mark.parametrize("name", ["image", "end_image"])
def test_a_picture_of_one_pixel_is_refused(server, sampling, name):
    sampling["20"] = load_image(server.upload("one.png", picture(size=(1, 1))))
    sampling[IMAGE_ENCODER]["inputs"][name] = ["20", 0]
    message = execution_error(server, sampling, IMAGE_ENCODER)
    assert f"{name} must be at least 16×16 pixels" in message
    assert "1×1" in message


def test_several_end_images_for_one_picture_are_refused(server, sampling):
    sampling["20"] = {"class_type": "ImageBatch", "inputs": {"image1": [LOAD, 0], "image2": [LOAD, 0]}}
    sampling[IMAGE_ENCODER]["inputs"]["end_image"] = ["20", 0]
    message = execution_error(server, sampling, IMAGE_ENCODER)
    assert "end_image must hold one picture or as many as image (1); got 2" in message


def test_condition_and_latent_info_of_two_encoders_are_refused(server, sampling):
    other = dict(sampling[IMAGE_ENCODER]["inputs"], num_frames=21)
    sampling["20"] = {"class_type": "Wan22I2VImageEncoder", "inputs": other}
    sampling[SAMPLER]["inputs"]["latent_info"] = ["20", 1]
    message = execution_error(server, sampling, SAMPLER)
    assert "condition must have the shape [batch, 20, 6, 32, 32]" in message
    assert "[1, 20, 5, 32, 32] came" in message
    assert "same image encoder" in message


@pytest.mark.parametrize("node_id", [IMAGE_ENCODER, ENCODER, SAMPLER, DECODER])
def test_a_text_to_video_checkpoint_is_refused(server, i2v_demo, node_id):
    i2v_demo[SAMPLER]["inputs"]["num_inference_steps"] = 2
    i2v_demo[node_id]["inputs"]["model_id"] = "wan21-tiny"
    message = execution_error(server, i2v_demo, node_id)
    assert "WanPipeline; this node needs one for WanImageToVideoPipeline" in message
    assert "Wan-AI/Wan2.2-I2V-A14B-Diffusers" in message
