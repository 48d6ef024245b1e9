"""One row of the planner's matrix: a model on a topology. A module of its own, because rows run in other processes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from comfyui_tpu.models.common import Task
from comfyui_tpu.plan import catalogue
from comfyui_tpu.plan.estimate import AUTO, Job, ProgramEstimate, estimate
from comfyui_tpu.plan.hardware import describe_devices, parse
from comfyui_tpu.plan.rehearsal import Call, open_model, rehearse

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
SMALL = {"height": 256, "width": 256, "num_inference_steps": 1, "guidance_scale": 5.0}
# Narrow autoencoders: what takes the compiler long is the number of convolutions and their size.
NARROW = {
    "AutoencoderKLWan": {"base_dim": 16, "num_res_blocks": 1},
    "AutoencoderKLCogVideoX": {"block_out_channels": [32] * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "AutoencoderKLFlux2": {"block_out_channels": [32] * 4, "layers_per_block": 1, "norm_num_groups": 8},
}


def small_configs(model: str) -> dict[str, dict]:
    """Real widths, two blocks of each kind, and a narrow autoencoder."""
    configs = catalogue.with_blocks(catalogue.entry(model).configs, 2)
    vae = configs["vae/config.json"]
    return {**configs, "vae/config.json": {**vae, **NARROW[vae["_class_name"]]}}


def small_task(model: str) -> Task:
    return Task(num_frames=1 if model.startswith("flux") else 17, **SMALL)


def row(which: tuple[str, str], full: bool) -> dict[str, ProgramEstimate | None]:
    """Label → estimate of each program; None for one that was only lowered."""
    model, topology = which[0], parse(which[1])
    configs, task = small_configs(model), small_task(model)
    if full:
        configs, task = catalogue.entry(model).configs, catalogue.entry(model).task
    with tempfile.TemporaryDirectory() as temporary:
        folder = catalogue.write(configs, Path(temporary))
        calls = rehearse(open_model(folder, describe_devices(topology)), task)
        compiled = [call for call in calls if full or _compiled_in_ci(call, *which)]
        for call in calls:
            if call not in compiled:
                call.module.lower(call.method, call.kept, call.given)
        found = estimate(
            Job(folder, task, topology), compiled, effort=AUTO if full else "quickest", use_cache=False, workers=1
        )
    return {**{call.label: None for call in calls}, **{program.label: program for program in found}}


def _compiled_in_ci(call: Call, model: str, topology: str) -> bool:
    """Transformers everywhere; text encoders and the autoencoders' repeated programs on one topology, each once."""
    component = call.components[0]
    if component.startswith("transformer"):
        return True
    file = f"{component}/config.json"
    config = small_configs(model)[file]
    first = next(name for name in catalogue.CATALOGUE if small_configs(name).get(file) == config)
    return topology == "v6e:2x4" and model == first and call.method in ("encode", "decode", "decode_next")
