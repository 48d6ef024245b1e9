"""CogVideoX prompts that work, in a real server: the MP4, exact frame counts, repeatability, Cancel, unloading."""

import re

import av
import pytest
import torch

from tests.checkpoints import write
from tests.comfy.cancel import check_cancelled, run_and_cancel, steps_done
from tests.comfy.contract import example_prompts

pytestmark = pytest.mark.server

ENCODER, SAMPLER, DECODER, SAVE = "2", "3", "4", "6"
CHECKPOINT = "cogvideox15-tiny"
STEPS = 3


@pytest.fixture
def cogvideox_demo(object_info, models_folder) -> dict:
    """The demo workflow as an API prompt: 2 text encoder, 3 sampler, 4 VAE decoder, 5 Create Video, 6 Save Video."""
    write(CHECKPOINT, models_folder / CHECKPOINT)
    return example_prompts(object_info, "cogvideox_t2v_demo.json")["cogvideox_t2v_demo"]


@pytest.fixture
def nodes(cogvideox_demo):
    """The three nodes with probes instead of a video file; a few steps are enough to compare."""
    prompt = {node_id: cogvideox_demo[node_id] for node_id in (ENCODER, SAMPLER, DECODER)}
    prompt[SAMPLER]["inputs"]["num_inference_steps"] = STEPS
    prompt["10"] = probe(SAMPLER, 0, "cogvideox_latents")
    prompt["11"] = probe(SAMPLER, 1, "cogvideox_info")
    prompt["12"] = probe(DECODER, 0, "cogvideox_frames")
    return prompt


@pytest.fixture
def sampling(nodes):
    """Only text encoder and sampler."""
    return {node_id: nodes[node_id] for node_id in (ENCODER, SAMPLER, "10")}


def probe(node_id, slot, name):
    return {"class_type": "ProbeSave", "inputs": {"value": [node_id, slot], "name": name}}


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
    return load(server, "cogvideox_latents")["samples"]


def test_the_demo_makes_the_video_and_shows_what_it_does(server, cogvideox_demo):
    done = run(server, cogvideox_demo)

    (saved,) = done.outputs[SAVE]["images"]
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        stream = video.streams.video[0]
        frames = list(video.decode(stream))
    assert saved["filename"].endswith(".mp4")
    assert (len(frames), stream.width, stream.height, stream.average_rate) == (17, 128, 96, 16)

    steps = [data["value"] for data in done.of("progress") if data["node"] == SAMPLER and data["max"] == 8]
    assert steps[-8:] == list(range(1, 9))
    texts = done.texts_of(SAMPLER)
    assert any(re.fullmatch(r"step 8/8 · [\d.]+ s/step · ETA 0:00", text) for text in texts)
    assert re.fullmatch(r"8 steps · [\d.]+ s/step · .+", texts[-1])
    assert any(re.fullmatch(r"decoding frames \d+/\d+", text) for text in done.texts_of(DECODER))
    assert done.texts_of(DECODER)[-1] == "17 frames, 128×96"


def test_the_previews_show_colours(server, sampling):
    server.post("/free", {"free_memory": True})
    done = run(server, sampling)
    assert len(done.previews) == STEPS
    for image in done.previews:
        assert (image.format, image.size) == ("JPEG", (512, 384))
        assert len(image.getcolors(2**20)) > 10


@pytest.mark.parametrize("num_frames", [20, 21])
def test_exactly_the_frames_asked_for_come_out(server, nodes, num_frames):
    """20 is what the model cannot make itself: the stock pipeline gives 17."""
    nodes[SAMPLER]["inputs"].update(num_frames=num_frames)
    run(server, nodes)
    latents, frames, info = (load(server, f"cogvideox_{name}") for name in ("latents", "frames", "info"))
    assert latents["samples"].shape[:2] == (1, 16)
    assert latents["samples"].shape[3:] == (12, 16)
    assert (latents["model_id"], latents["num_frames"]) == (CHECKPOINT, num_frames)
    assert frames.shape == (num_frames, 96, 128, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert frames.std() > 0.01
    assert re.fullmatch(rf"{num_frames} frames, 128×96 · {STEPS} steps · [\d.e-]+ s/step · .*CPU.*", info)


def test_seed_scheduler_and_dynamic_guidance_decide_the_latents(server, sampling):
    first = latents_of(server, sampling, seed=1)
    assert torch.equal(latents_of(server, sampling), first)
    assert torch.equal(latents_of(server, sampling, num_devices=1), first)
    differences = {
        "seed": latents_of(server, sampling, seed=2),
        "ddim": latents_of(server, sampling, seed=1, scheduler="ddim"),
        "dpm": latents_of(server, sampling, scheduler="dpm"),
        "dynamic guidance": latents_of(server, sampling, scheduler="checkpoint", dynamic_cfg=True),
    }
    same = [name for name, latents in differences.items() if torch.allclose(latents, first, atol=1e-3)]
    # One of the two is the checkpoint's own.
    assert len(same) == 1
    assert same[0] in ("ddim", "dpm")
    assert torch.equal(differences[same[0]], first)


def test_at_guidance_1_the_negative_prompt_is_not_computed(server, sampling):
    guided = latents_of(server, sampling)
    unguided = latents_of(server, sampling, guidance_scale=1.0)
    sampling[ENCODER]["inputs"]["negative_prompt"] = "blurry, grey, still"
    assert torch.equal(latents_of(server, sampling), unguided)
    assert not torch.allclose(latents_of(server, sampling, guidance_scale=6.0), guided, atol=1e-3)
    assert not torch.allclose(guided, unguided, atol=1e-3)


def test_latents_of_other_nodes_are_decoded_with_the_model_that_is_connected(server, nodes):
    nodes["20"] = {
        "class_type": "EmptyHunyuanLatentVideo",
        "inputs": {"width": 128, "height": 96, "length": 17, "batch_size": 1},
    }
    nodes["21"] = {"class_type": "PrimitiveString", "inputs": {"value": CHECKPOINT}}
    nodes[DECODER]["inputs"].update(latents=["20", 0], model_id=["21", 0])
    run(server, {node_id: nodes[node_id] for node_id in ("20", "21", DECODER, "12")})
    assert load(server, "cogvideox_frames").shape == (17, 96, 128, 3)


def test_cancel_stops_within_a_step_and_the_next_prompt_works(server, sampling):
    total = 100
    sampling[SAMPLER]["inputs"].update(num_inference_steps=total, seed=77)
    done, late = run_and_cancel(server, sampling, SAMPLER, lambda done: steps_done(done, SAMPLER, total) >= 3)
    check_cancelled(done, late, SAMPLER, total)
    latents_of(server, sampling, num_inference_steps=2)


def test_free_releases_the_devices_and_the_next_prompt_loads_again(server, sampling):
    # Without `latents_of`, whose own request to unload may be carried out after its run.
    sampling[SAMPLER]["inputs"]["seed"] = 4710
    run(server, sampling)
    assert server.release(120, free_memory=False) > 0

    sampling[SAMPLER]["inputs"]["seed"] = 4711
    texts = run(server, sampling).texts_of(SAMPLER)
    assert any(text.startswith("loading transformer") for text in texts)
    # The second run at this size is already compiled.
    assert not any(text.startswith("compiling") for text in texts)
