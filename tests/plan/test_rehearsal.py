"""The planner's programs are production's: the same task, rehearsed and run, asks for the same programs as often."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import torch

from comfyui_tpu.models.common import Task
from comfyui_tpu.plan.rehearsal import open_model, rehearse
from comfyui_tpu.runtime import program
from tests.checkpoints import write

CASES = {
    "wan21-tiny": Task(256, 256, 17, 3, 5.0),
    "wan22-i2v-tiny": Task(256, 256, 17, 4, 3.5),
    "cogvideox-tiny": Task(64, 64, 17, 3, 6.0),
    "flux2-tiny": Task(256, 256, 1, 3, 4.0),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return write(request.param, tmp_path / request.param), CASES[request.param]


def test_rehearsal_and_production_call_the_same_programs_equally_often(case, monkeypatch):
    folder, task = case
    devices = tuple(jax.devices()[:2])
    expected = Counter()
    for call in rehearse(open_model(folder, devices), task):
        expected[call.module.program_key(call.method, call.kept, call.given)] += call.count

    asked, programs = Counter(), {}

    def counting(key, label, make_lowered, options):
        asked[key] += 1
        if key not in programs:
            outputs = make_lowered().out_info
            # What a program computes does not matter here, and compiling it would take most of the time.
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), outputs)
            programs[key] = program.Program(lambda params, kept, given: zeros, 0.0, 0.0)
        return programs[key]

    monkeypatch.setattr(program, "program", counting)
    _run(open_model(folder, devices), task)
    assert asked == expected


def _run(model, task):
    """What the nodes do with this task, prompts and all."""
    size = {"height": task.height, "width": task.width}
    steps = {"num_inference_steps": task.num_inference_steps, "guidance_scale": task.guidance_scale, "seed": 1}
    name = type(model).__name__
    if name == "Flux2":
        latents = model.sample(model.encode_prompt("a cat"), **size, **steps)
        model.decode(latents)
        return
    embeds = model.encode_prompt("a cat", "blurry")
    if name == "WanImageToVideo":
        condition = model.encode_image(torch.rand(1, 64, 64, 3), **size, num_frames=task.num_frames)
        latents = model.sample(*embeds, condition, **steps, shift=5.0)
    else:
        shift = {"flow_shift": 5.0} if name == "WanTextToVideo" else {}
        latents = model.sample(*embeds, **size, **steps, **shift, num_frames=task.num_frames)
    model.decode(latents)


def test_a_rehearsal_needs_neither_weights_nor_tokenizer(tmp_path):
    folder = write("wan21-tiny", tmp_path / "tiny")
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" or path.parent.name == "tokenizer":
            path.unlink()
    calls = rehearse(open_model(folder, tuple(jax.devices()[:1])), CASES["wan21-tiny"])
    assert [call.label for call in calls] == [
        "text_encoder encode",
        "transformer denoise",
        "vae decode_first",
        "vae decode_next",
    ]


def test_without_guidance_the_transformer_runs_once_a_step(tmp_path):
    folder = write("wan21-tiny", tmp_path / "tiny")
    task = Task(256, 256, 17, 3, 1.0)
    calls = {call.label: call.count for call in rehearse(open_model(folder, tuple(jax.devices()[:1])), task)}
    assert calls["transformer denoise"] == 3
