"""Bad inputs in a real server: refused with both values and what to do, at the right node, before weights load."""

import shutil

import pytest

from tests.comfy.server import Refused

pytestmark = pytest.mark.server

ENCODER, SAMPLER, DECODER = "2", "3", "4"


@pytest.fixture(autouse=True)
def _server_survives(server):
    yield
    assert server.is_alive()


def refusal(server, prompt):
    """Node id → message of a prompt that is refused when queued."""
    with pytest.raises(Refused) as refused:
        server.run(prompt)
    errors = refused.value.body["node_errors"]
    for node in errors.values():
        assert len(node["errors"]) == 1, "the user must not read the same message twice"
    return {node_id: node["errors"][0]["details"] for node_id, node in errors.items()}


@pytest.mark.parametrize(
    ("node_id", "name", "value", "parts"),
    [
        (SAMPLER, "num_frames", 20, ["num_frames must be 4n", "20"]),
        (SAMPLER, "num_frames", 125, ["num_frames", "121", "125"]),
        (SAMPLER, "width", 1281, ["width must be a multiple of 16", "1280", "1281"]),
        (SAMPLER, "height", 0, ["height must be a multiple of 16", "256", "got 0"]),
        (SAMPLER, "height", 264, ["height must be a multiple of 16", "264"]),
        (ENCODER, "model_id", "../etc", ["'../etc' is not accepted", "models/diffusers", "repo id"]),
        (SAMPLER, "model_id", "/etc", ["'/etc' is not accepted"]),
        (DECODER, "model_id", "..\\etc", ["is not accepted"]),
        (ENCODER, "model_id", "no-such-model", ["'no-such-model'", "Folders there: ", "wan21-tiny"]),
    ],
)
def test_a_wrong_constant_is_refused_when_the_prompt_is_queued(server, demo, node_id, name, value, parts):
    demo[node_id]["inputs"][name] = value
    messages = refusal(server, demo)
    assert list(messages) == [node_id]
    for part in parts:
        assert part in messages[node_id]


def test_core_still_checks_the_inputs_we_do_not(server, demo):
    demo[SAMPLER]["inputs"]["num_inference_steps"] = 101
    with pytest.raises(Refused) as refused:
        server.run(demo)
    assert refused.value.body["node_errors"][SAMPLER]["errors"][0]["type"] == "value_bigger_than_max"


def test_an_empty_folder_is_refused(server, demo, models_folder):
    (models_folder / "empty").mkdir(exist_ok=True)
    demo[SAMPLER]["inputs"]["model_id"] = "empty"
    assert "has no model_index.json" in refusal(server, demo)[SAMPLER]


def execution_error(server, prompt, node_id):
    """The message of the node that fails. No weights may have been loaded for that node."""
    run = server.run(prompt)
    assert run.error is not None, "the prompt should have failed"
    assert run.error["node_id"] == node_id
    assert not [text for text in run.texts_of(node_id) if text.startswith("loading")]
    assert run.error["exception_type"].startswith("comfyui_tpu.")
    return run.error["exception_message"]


@pytest.mark.parametrize(
    ("name", "core_node", "value", "part"),
    [
        ("num_frames", "PrimitiveInt", 20, "num_frames must be 4n"),
        ("width", "PrimitiveInt", 1281, "width must be a multiple of 16"),
        ("num_inference_steps", "PrimitiveInt", 101, "num_inference_steps must be between 1 and 100, but 101 came"),
        ("flow_shift", "PrimitiveFloat", 0.5, "flow_shift must be between 1.0 and 10.0, but 0.5 came"),
        ("model_id", "PrimitiveString", "../etc", "'../etc' is not accepted"),
    ],
)
def test_a_wrong_value_from_a_link_is_refused_by_the_node(server, demo, name, core_node, value, part):
    demo["20"] = {"class_type": core_node, "inputs": {"value": value}}
    demo[SAMPLER]["inputs"][name] = ["20", 0]
    assert part in execution_error(server, demo, SAMPLER)


def test_a_repo_that_cannot_be_fetched_says_what_to_do(server, demo):
    # tests/conftest.py sets HF_HUB_OFFLINE=1
    demo[SAMPLER]["inputs"]["model_id"] = "nobody/nothing"
    message = execution_error(server, demo, SAMPLER)
    assert "nobody/nothing" in message
    assert "HF_HUB_OFFLINE" in message
    assert "models/diffusers/NAME" in message


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
def test_a_truncated_shard_is_named(server, demo, models_folder, component):
    broken = models_folder / f"truncated-{component}"
    shutil.copytree(models_folder / "wan21-tiny", broken)
    shard = max((broken / component).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    node_id = {"text_encoder": ENCODER, "transformer": SAMPLER, "vae": DECODER}[component]
    demo[node_id]["inputs"]["model_id"] = broken.name
    assert shard.name in execution_error(server, demo, node_id)


@pytest.mark.parametrize(
    ("core_node", "inputs", "part"),
    [
        ("EmptyLatentImage", {"width": 256, "height": 256, "batch_size": 1}, "image latents [1, 4, 32, 32] came"),
        ("EmptyMochiLatentVideo", {"width": 256, "height": 256, "length": 25, "batch_size": 1}, "12 channels came"),
    ],
)
def test_latents_of_another_model_are_refused(server, demo, core_node, inputs, part):
    demo["20"] = {"class_type": core_node, "inputs": inputs}
    demo[DECODER]["inputs"]["latents"] = ["20", 0]
    assert part in execution_error(server, demo, DECODER)


def test_combined_prompts_are_refused(server, demo):
    combine = {"conditioning_1": [ENCODER, 0], "conditioning_2": [ENCODER, 1]}
    demo["20"] = {"class_type": "ConditioningCombine", "inputs": combine}
    demo[SAMPLER]["inputs"]["prompt_embeds"] = ["20", 0]
    assert "prompt_embeds must hold one prompt, but 2 came" in execution_error(server, demo, SAMPLER)


def test_latents_of_core_are_decoded(server, demo):
    demo["20"] = {
        "class_type": "EmptyHunyuanLatentVideo",
        "inputs": {"width": 256, "height": 256, "length": 17, "batch_size": 1},
    }
    demo[DECODER]["inputs"]["latents"] = ["20", 0]
    for unused in (ENCODER, SAMPLER):
        del demo[unused]
    run = server.run(demo)
    assert run.succeeded, run.why
