"""Topologies that a model would fit, when the one asked for is too small.

Nothing is compiled for them. Weights are exact (from the plan's own rules); what programs need besides is scaled from
the compiled topology by the number of chips, as activations are spread over all of them. Close calls deserve a plan.
"""

from __future__ import annotations

import math
from pathlib import Path

from comfyui_tpu.plan import hardware
from comfyui_tpu.plan.hardware import Topology
from comfyui_tpu.plan.rehearsal import open_model
from comfyui_tpu.plan.report import ModelEstimate

_SHAPES = {2: ((1, 1), (2, 2), (2, 4)), 3: ((1, 1, 1), (2, 2, 1), (2, 2, 2))}


def topologies_that_fit(estimate: ModelEstimate, folder: Path) -> list[str]:
    """Names of topologies of up to 8 chips, the smallest of each generation that holds the neediest component.

    Args:
        estimate: of a topology that is too small.
        folder: the model's checkpoint.
    """
    fitting = []
    weights: dict[int, dict[str, int]] = {}  # by number of devices: plans ask for nothing else
    for generation in hardware.GENERATIONS.values():
        for shape in _SHAPES[generation.axes]:
            topology = Topology(generation, shape)
            if topology.devices not in weights:
                weights[topology.devices] = _weights(folder, topology)
            if needed_bytes(estimate, weights[topology.devices], topology) <= generation.hbm_bytes:
                fitting.append(topology.name)
                break
    return fitting


def needed_bytes(estimate: ModelEstimate, weights: dict[str, int], topology: Topology) -> int:
    """Estimated need of the neediest component on each chip of ``topology``, with ``weights`` there."""
    scale = estimate.topology.devices / topology.devices
    return max(
        weights[component] + math.ceil(program.working_bytes * scale)
        for program in estimate.programs
        for component in program.components
    )


def _weights(folder: Path, topology: Topology) -> dict[str, int]:
    model = open_model(folder, hardware.describe_devices(topology))
    return {component.spec.name: component.bytes_per_device for component in model.components}
