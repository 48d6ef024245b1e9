"""The plans that production uses, with nothing too small to be sharded, so that tiny weights are."""

import dataclasses

from comfyui_tpu.models.common import Plans


def sharded(model_class, folder, devices, transformer=0):
    """The checkpoint in ``folder`` on ``devices``; ``transformer``: which of its plans the transformer runs under."""
    usual = {component.spec.name: component for component in model_class(folder, devices).components}
    parts = ("text_encoder", "transformer", "vae")
    plans = {name: admitted(usual[name])[transformer if name == "transformer" else 0] for name in parts}
    return model_class(folder, devices, Plans(**plans))


def admitted(component):
    """All plans of ``component`` for the devices it has."""
    plans = component.spec.plans(len(component.devices), component.raw_config)
    return [dataclasses.replace(plan, min_sharded_elements=1) for plan in plans]
