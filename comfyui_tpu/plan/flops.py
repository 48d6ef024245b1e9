"""Floating-point operations of a program, counted in its jaxpr: what the model asks for, before any compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def count(jaxpr: Any) -> int:
    """Flop of all matmuls and convolutions over all devices; a multiply-add counts two.

    Loops count as often as they run (a ``while`` of unknown length once), of a ``cond`` the dearest branch. A Pallas
    kernel counts its own cost estimate, or without one its body once for each grid step.
    """
    return sum(_equation_flops(equation) for equation in _open(jaxpr).eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _conv_flops(equation)
    if name == "cond":
        return max(count(branch) for branch in params["branches"])
    inner = sum(count(jaxpr) for jaxpr in _inner(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        return params["mesh"].size * inner
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return estimate.flops if estimate is not None else math.prod(params["grid_mapping"].grid) * inner
    return inner


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_flops(equation: Any) -> int:
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    output_channels = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // output_channels


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Every jaxpr among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(item), "eqns"):
                yield item


def _open(jaxpr: Any) -> Any:
    """The jaxpr within a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)
