"""Cycles of our Pallas kernels, for the cost reader: the compiler gives none to custom kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from comfyui_tpu.ops import column_kernels, row_kernels
from comfyui_tpu.ops.splash_blocks import estimated_cycles
from comfyui_tpu.plan import hlo
from comfyui_tpu.plan.hardware import GENERATIONS

_ROWS = re.compile(r"\w+\[(\d+),(\d+),(\d+)\]")
_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"?(\d+)')
_RESULTS = re.compile(r"\w+\[(\d+),(\d+),(\d+)\].*?\w+\[(\d+),(\d+),\d+\]")


@dataclass(frozen=True)
class OurKernels:
    """A ``kernel_cycles`` for :func:`comfyui_tpu.plan.costs.read`, for one generation."""

    generation: str

    def __call__(self, instruction: hlo.Instruction) -> int | None:
        """Of a kernel in ``comfyui_tpu/ops``; None for another."""
        return self._of_rows(instruction) or self._of_columns(instruction) or self._of_attention(instruction)

    def _of_rows(self, instruction: hlo.Instruction) -> int | None:
        """Of one in ``row_kernels``, from its rows ``[B, S, C]``."""
        rows, name = _ROWS.search(instruction.shape), instruction.kernel_name
        shape = map(int, rows.groups()) if rows else ()
        return self._while_moving(instruction, rows and row_kernels.estimated_cycles(name, self.generation, *shape))

    def _of_columns(self, instruction: hlo.Instruction) -> int | None:
        """Of the one in ``column_kernels``, from the flop it declares."""
        name, flops = instruction.kernel_name, instruction.kernel_flops or 0
        return self._while_moving(instruction, column_kernels.estimated_cycles(name, self.generation, flops))

    def _while_moving(self, instruction: hlo.Instruction, computing: float | None) -> int | None:
        """Of a kernel that computes while its bytes move to and from HBM."""
        moved, generation = _BYTES.search(instruction.attributes), GENERATIONS[self.generation]
        if not computing or not moved:
            return None
        return round(max(computing, int(moved.group(1)) / generation.hbm_bandwidth * generation.clock))

    def _of_attention(self, instruction: hlo.Instruction) -> int | None:
        """Of ``splash_attention``, from the flop it declares and its results: ``[batch, queries, channels]``, and a
        number for each query, ``[groups of heads, heads in a group, queries]``."""
        results = _RESULTS.search(instruction.shape)
        if instruction.kernel_name != "splash_attention" or not results or not instruction.kernel_flops:
            return None
        batch, queries, channels, groups, together = map(int, results.groups())
        keys = instruction.kernel_flops // (4 * batch * queries * channels)
        heads = groups * together
        return round(estimated_cycles(self.generation, heads, queries, keys, batch * channels // heads))
