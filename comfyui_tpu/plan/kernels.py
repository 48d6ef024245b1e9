"""Cycles of our Pallas kernels, for the cost reader: the compiler gives none to custom kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from comfyui_tpu.ops.splash_blocks import estimated_cycles
from comfyui_tpu.plan import hlo

_RESULT = re.compile(r"\w+\[(\d+),(\d+),(\d+)\]")


@dataclass(frozen=True)
class OurKernels:
    """A ``kernel_cycles`` for :func:`comfyui_tpu.plan.costs.read`, for one generation."""

    generation: str

    def __call__(self, instruction: hlo.Instruction) -> int | None:
        """Of ``splash_attention``: from its result ``[heads, queries, head_dim]`` and the flop it declares."""
        result = _RESULT.search(instruction.shape)
        if instruction.kernel_name != "splash_attention" or not result or not instruction.kernel_flops:
            return None
        heads, queries, head_dim = map(int, result.groups())
        keys = instruction.kernel_flops // (4 * heads * queries * head_dim)
        return round(estimated_cycles(self.generation, heads, queries, keys, head_dim))
