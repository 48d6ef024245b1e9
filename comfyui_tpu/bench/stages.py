"""The stages of each family's pipeline, called as its nodes call them: ``bench run`` times these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from comfyui_tpu.models.cogvideox import CogVideoX
from comfyui_tpu.models.common import OpenedModel, StepInfo, Task
from comfyui_tpu.models.flux2 import Flux2
from comfyui_tpu.models.wan import WanTextToVideo
from comfyui_tpu.models.wan_i2v import WanImageToVideo
from comfyui_tpu.plan import catalogue
from comfyui_tpu.plan.rehearsal import family_of
from comfyui_tpu.runtime.checkpoint import read_config

OnStep = Callable[[StepInfo], None]

# Another prompt in each run: Flux.2 keeps the embeddings of the last ones.
PROMPT = "A red fox walks through fresh snow at dawn, take {run}"
NEGATIVE_PROMPT = "blurry, low quality"
SEED = 0
SHIFT = 5.0  # the schedule's shift for 720p; it changes noise levels, not the work of a step
# What a machine without a TPU is asked for: the smallest size that all families make.
SMALL = {"height": 256, "width": 256, "num_frames": 17}


def open_checkpoint(folder: Path) -> OpenedModel:
    """The checkpoint in ``folder`` on all devices of this machine; weights load when a stage first needs them.

    Raises:
        CheckpointError: it is none of the families that run here, or is not complete.
    """
    return family_of(folder).open(folder)


def usual_task(model: OpenedModel) -> Task:
    """What people ask of this model: the catalogue's task for the published model that it is, or is most like."""
    pipeline = read_config(model.folder, "model_index.json")["_class_name"]
    same_pipeline = [
        entry for entry in catalogue.CATALOGUE.values() if entry.configs["model_index.json"]["_class_name"] == pipeline
    ]
    return max(same_pipeline, key=lambda entry: _agreement(entry, model.transformer.raw_config)).task


def _agreement(entry: catalogue.Entry, config: dict[str, Any]) -> int:
    """How many of the transformer's settings are those of ``entry``."""
    return sum(config.get(key) == value for key, value in entry.configs["transformer/config.json"].items())


def small_task(usual: Task) -> Task:
    """``usual`` at a size that a processor manages; a picture stays a picture."""
    return dataclasses.replace(usual, **{**SMALL, "num_frames": min(SMALL["num_frames"], usual.num_frames)})


Stages = dict[str, Callable[[dict[str, Any]], Any]]


def stages(model: OpenedModel, task: Task, run: int, on_step: OnStep) -> Stages:
    """Stage → what does it, in order. Each takes the results so far (stage → result) and returns its own.

    Args:
        run: number of the run; its prompt differs from every other run's.
        on_step: called after each denoising step.
    """
    return _STAGES[type(model)](model, task, PROMPT.format(run=run), on_step)


def _flux2(model: Flux2, task: Task, prompt: str, on_step: OnStep) -> Stages:
    size = {"height": task.height, "width": task.width}
    return {
        "encode text": lambda _: model.encode_prompt(prompt),
        "denoise": lambda done: model.sample(done["encode text"], **size, **_sampling(task), on_step=on_step),
        "decode": lambda done: model.decode(done["denoise"]),
    }


def _cogvideox(model: CogVideoX, task: Task, prompt: str, on_step: OnStep) -> Stages:
    return {
        "encode text": lambda _: model.encode_prompt(prompt, NEGATIVE_PROMPT),
        "denoise": lambda done: model.sample(*done["encode text"], **_size(task), **_sampling(task), on_step=on_step),
        "decode": lambda done: model.decode(done["denoise"], task.num_frames),
    }


def _wan(model: WanTextToVideo, task: Task, prompt: str, on_step: OnStep) -> Stages:
    return {
        "encode text": lambda _: model.encode_prompt(prompt, NEGATIVE_PROMPT),
        "denoise": lambda done: model.sample(
            *done["encode text"], **_size(task), **_sampling(task), flow_shift=SHIFT, on_step=on_step
        ),
        "decode": lambda done: model.decode(done["denoise"]),
    }


def _wan_i2v(model: WanImageToVideo, task: Task, prompt: str, on_step: OnStep) -> Stages:
    picture = torch.linspace(0, 1, task.width).expand(1, task.height, task.width).unsqueeze(-1).expand(-1, -1, -1, 3)
    return {
        "encode picture": lambda _: model.encode_image(picture, **_size(task)),
        "encode text": lambda _: model.encode_prompt(prompt, NEGATIVE_PROMPT),
        "denoise": lambda done: model.sample(
            *done["encode text"], done["encode picture"], **_sampling(task), shift=SHIFT, on_step=on_step
        ),
        "decode": lambda done: model.decode(done["denoise"]),
    }


def _size(task: Task) -> dict[str, int]:
    return {"height": task.height, "width": task.width, "num_frames": task.num_frames}


def _sampling(task: Task) -> dict[str, Any]:
    return {
        "num_inference_steps": task.num_inference_steps,
        "guidance_scale": task.guidance_scale,
        "seed": SEED,
    }


_STAGES: dict[type[OpenedModel], Callable[[Any, Task, str, OnStep], Stages]] = {
    Flux2: _flux2,
    CogVideoX: _cogvideox,
    WanTextToVideo: _wan,
    WanImageToVideo: _wan_i2v,
}
