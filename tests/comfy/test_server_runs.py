"""Prompts that work, in a real server: the video, what is shown meanwhile, repeatability, Cancel, unloading."""

import re

import av
import pytest
import torch

from tests.comfy.cancel import check_cancelled, run_and_cancel, steps_done

pytestmark = pytest.mark.server

SAMPLER, DECODER = "3", "4"
LOADING = r"loading {}( \(shard \d+ of \d+\))? \d+/\d+"


def run_and_load(server, prompt, *names):
    """Run ``prompt`` with a fresh node cache; the probed tensors by name."""
    server.post("/free", {"free_memory": True})
    run = server.run(prompt)
    assert run.succeeded, run.why
    return [torch.load(server.base / "output" / f"{name}.pt", weights_only=True) for name in names]


def probe(node_id, slot, name):
    return {"class_type": "ProbeSave", "inputs": {"value": [node_id, slot], "name": name}}


@pytest.fixture
def nodes(demo):
    """The three nodes of the demo with probes instead of a video file; four steps are enough to compare."""
    prompt = {node_id: demo[node_id] for node_id in ("2", SAMPLER, DECODER)}
    prompt[SAMPLER]["inputs"]["num_inference_steps"] = 4
    prompt["10"] = probe(SAMPLER, 0, "latents")
    prompt["11"] = probe(DECODER, 0, "frames")
    return prompt


def only_sampler(nodes):
    del nodes["11"], nodes[DECODER]


def full_pipeline(nodes):
    inputs = {**nodes["2"]["inputs"], **nodes[SAMPLER]["inputs"], **nodes[DECODER]["inputs"]}
    for linked in ("prompt_embeds", "negative_prompt_embeds", "latents"):
        inputs.pop(linked)
    pipeline = {"class_type": "Wan21TPUPipeline", "inputs": inputs}
    return {"1": pipeline, "2": probe("1", 0, "pipeline_frames"), "3": probe("1", 1, "pipeline_fps")}


def test_the_demo_makes_the_video_and_shows_what_it_does(server, demo):
    run = server.run(demo)
    assert run.succeeded, run.why

    (saved,) = run.outputs["6"]["images"]
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        stream = video.streams.video[0]
        frames = list(video.decode(stream))
    assert saved["filename"].endswith(".mp4")
    assert (len(frames), stream.width, stream.height, stream.average_rate) == (17, 256, 256, 16)

    steps = [data["value"] for data in run.of("progress") if data["node"] == SAMPLER and data["max"] == 8]
    assert steps[-8:] == list(range(1, 9))
    texts = run.texts_of(SAMPLER)
    assert any(re.fullmatch(r"step 8/8 · [\d.]+ s/step · ETA 0:00", text) for text in texts)
    assert re.fullmatch(r"8 steps · [\d.]+ s/step · .+", texts[-1])
    assert any(re.fullmatch(r"decoding frames \d+/\d+", text) for text in run.texts_of(DECODER))
    assert run.texts_of(DECODER)[-1] == "17 frames, 256×256"
    assert len(run.previews) == 8
    assert {image.format for image in run.previews} == {"JPEG"}


def test_a_first_run_shows_compiling_and_loading_before_the_steps(server, nodes):
    server.release()
    only_sampler(nodes)
    # The one run of this session with k_smooth: its program is not compiled yet.
    nodes[SAMPLER]["inputs"].update(num_inference_steps=2, k_smooth=True)
    run = server.run(nodes)
    assert run.succeeded, run.why
    assert any(re.fullmatch(LOADING.format("text_encoder"), text) for text in run.texts_of("2"))
    texts = run.texts_of(SAMPLER)
    loading = [i for i, text in enumerate(texts) if re.fullmatch(LOADING.format("transformer"), text)]
    compiling = [i for i, text in enumerate(texts) if text.startswith("compiling transformer")]
    # The compiler's figures decide whether there is room for the weights.
    assert compiling[0] < loading[0] < texts.index("step 1/2")


def test_the_full_pipeline_gives_the_frames_of_the_three_nodes(server, nodes):
    latents, frames = run_and_load(server, nodes, "latents", "frames")
    pipeline_frames, fps = run_and_load(server, full_pipeline(nodes), "pipeline_frames", "pipeline_fps")
    assert latents["samples"].shape == (1, 16, 5, 32, 32)
    assert frames.shape == (17, 256, 256, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert frames.std() > 0.01
    assert torch.equal(frames, pipeline_frames)
    assert fps == 16.0
    assert isinstance(fps, float)


def test_seed_and_flow_shift_decide_the_latents(server, nodes):
    only_sampler(nodes)

    def latents(**changes):
        nodes[SAMPLER]["inputs"].update(changes)
        return run_and_load(server, nodes, "latents")[0]["samples"]

    first = latents(seed=1, flow_shift=3.0)
    other_seed = latents(seed=2)
    other_shift = latents(seed=1, flow_shift=5.0)
    again = latents(flow_shift=3.0)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other_seed, atol=1e-2)
    assert not torch.allclose(first, other_shift, atol=1e-3)


def test_cancel_stops_within_a_step_and_the_next_prompt_works(server, nodes):
    total = 100
    only_sampler(nodes)
    nodes[SAMPLER]["inputs"].update(num_inference_steps=total, seed=77)
    run, late = run_and_cancel(server, nodes, SAMPLER, lambda run: steps_done(run, SAMPLER, total) >= 3)
    check_cancelled(run, late, SAMPLER, total)

    nodes[SAMPLER]["inputs"]["num_inference_steps"] = 2
    run = server.run(nodes)
    assert run.succeeded, run.why


def test_free_releases_the_devices_and_the_next_prompt_loads_again(server, nodes):
    only_sampler(nodes)
    run = server.run(nodes)
    assert run.succeeded, run.why
    assert server.release(120, free_memory=False) > 0

    nodes[SAMPLER]["inputs"]["seed"] = 4711
    run = server.run(nodes)
    assert run.succeeded, run.why
    assert any(text.startswith("loading transformer") for text in run.texts_of(SAMPLER))
    # The second run at this size is already compiled.
    assert not any(text.startswith("compiling") for text in run.texts_of(SAMPLER))
