"""Cycles of our Pallas kernels, for the cost reader: the compiler gives none to custom kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from comfyui_tpu.ops.splash_blocks import estimated_cycles
from comfyui_tpu.plan import hlo

_RESULTS = re.compile(r"\w+\[(\d+),(\d+),(\d+)\].*?\w+\[(\d+),(\d+),\d+\]")


@dataclass(frozen=True)
class OurKernels:
    """A ``kernel_cycles`` for :func:`comfyui_tpu.plan.costs.read`, for one generation."""

    generation: str

    def __call__(self, instruction: hlo.Instruction) -> int | None:
        """Of ``splash_attention``, from the flop it declares and its results: ``[batch, queries, channels]``, and a
        number for each query, ``[groups of heads, heads in a group, queries]``."""
        results = _RESULTS.search(instruction.shape)
        if instruction.kernel_name != "splash_attention" or not results or not instruction.kernel_flops:
            return None
        batch, queries, channels, groups, together = map(int, results.groups())
        keys = instruction.kernel_flops // (4 * batch * queries * channels)
        heads = groups * together
        return round(estimated_cycles(self.generation, heads, queries, keys, batch * channels // heads))
