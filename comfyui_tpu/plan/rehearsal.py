"""Which programs a task runs, and how often: learnt by letting the model do the task on described arrays.

The stock pipeline runs from end to end with production's own modules; each call that would go to the devices is written
down instead. So the planner's list of programs is production's, by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from comfyui_tpu.models.cogvideox import CogVideoX
from comfyui_tpu.models.common import OpenedModel, Plans, Task
from comfyui_tpu.models.flux2 import Flux2
from comfyui_tpu.models.wan import WanTextToVideo
from comfyui_tpu.models.wan_i2v import WanImageToVideo
from comfyui_tpu.runtime import program
from comfyui_tpu.runtime.checkpoint import read_config
from comfyui_tpu.runtime.device_module import DeviceModule
from comfyui_tpu.runtime.errors import CheckpointError, PlanError
from comfyui_tpu.runtime.plan import Plan

FAMILIES: dict[str, type[OpenedModel]] = {
    "Flux2Pipeline": Flux2,
    "CogVideoXPipeline": CogVideoX,
    "WanPipeline": WanTextToVideo,
    "WanImageToVideoPipeline": WanImageToVideo,
}


@dataclass
class Call:
    """One program and its part in the task.

    Attributes:
        module: a component that runs it.
        method, kept, given: as ``DeviceModule.run`` takes them, as ShapeDtypeStructs.
        count: how often the task calls it.
        components: names of all components that run it (two experts share one program).
    """

    module: DeviceModule
    method: str
    kept: dict[str, Any]
    given: dict[str, Any]
    count: int = 0
    components: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.components[0]} {self.method}"


def family_of(folder: Path) -> type[OpenedModel]:
    """What opens the checkpoint in ``folder``; CheckpointError: it is none of the families that run here."""
    name = read_config(folder, "model_index.json").get("_class_name")
    if name not in FAMILIES:
        raise CheckpointError(f"{folder} is a checkpoint for {name}; expected one for {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def open_model(folder: Path, devices: tuple, plan: str | None = None) -> OpenedModel:
    """The checkpoint in ``folder`` on described ``devices``; only its configs are read.

    Args:
        plan: name of the plan that its transformers run under; the one that production would choose when None.

    Raises:
        CheckpointError: it is none of the families that run here.
        PlanError: its transformer has no plan of that name for so many devices.
    """
    family = family_of(folder)
    model = family(folder, devices)
    if plan is None:
        return model
    plans = {each.name: each for each in transformer_plans(model)}
    if plan not in plans:
        raise PlanError(f"the plan must be one of {', '.join(plans)} on {len(devices)} devices; got {plan!r}.")
    return family(folder, devices, Plans(transformer=plans[plan]))


def transformer_plans(model: OpenedModel) -> tuple[Plan, ...]:
    """All plans that the model's transformer can run under on its devices."""
    return model.transformer.spec.plans(len(model.transformer.devices), model.transformer.raw_config)


def rehearse(model: OpenedModel, task: Task) -> list[Call]:
    """The programs of ``task``, in the order of their first call."""
    recorder = _Recorder()
    for component in model.components:
        component.rehearsal = recorder
    model.rehearse(task)
    return list(recorder.calls.values())


class _Recorder:
    def __init__(self) -> None:
        self.calls: dict[tuple, Call] = {}
        self._outputs: dict[tuple, Any] = {}

    def __call__(self, module: DeviceModule, method: str, placed: Mapping[str, Any], donate: tuple[str, ...]) -> Any:
        described = program.abstract(dict(placed))
        kept = {name: value for name, value in described.items() if name not in donate}
        given = {name: value for name, value in described.items() if name in donate}
        key = module.program_key(method, kept, given)
        call = self.calls.setdefault(key, Call(module, method, kept, given))
        call.count += 1
        if module.spec.name not in call.components:
            call.components.append(module.spec.name)
        if key not in self._outputs:
            self._outputs[key] = jax.tree.map(module.describe, module.output_shapes(method, described))
        return self._outputs[key]
