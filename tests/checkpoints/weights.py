"""Random weights with which every part of a network does something and nothing explodes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

# Lets a module pick another standard deviation for parameters whose name ends so.
StdBySuffix = Mapping[str, float]


def randomize(module: torch.nn.Module, seed: int, std_by_suffix: StdBySuffix | None = None) -> None:
    """Fill every parameter of ``module`` in place with seeded values; torch's global generator is not used.

    Matrices and kernels keep the variance of what passes through them (standard deviation 1/sqrt(fan in)); norm
    scales vary around 1 and biases around 0, so that leaving one out changes the result. A parameter's values depend
    on its name and shape only, not on its neighbours: another depth keeps the first layers as they were.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=_generator(seed, name))
            parameter.copy_(_center(name, parameter) + values * _std(name, parameter, std_by_suffix or {}))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _is_norm_scale(name: str, parameter: torch.nn.Parameter) -> bool:
    # A norm's scale has one axis longer than 1 (the VAE's "gamma" is [C, 1, 1, 1]).
    one_axis = parameter.numel() == max(parameter.shape, default=1)
    return name.endswith(("norm.weight", "gamma")) or (one_axis and name.endswith("weight"))


def _center(name: str, parameter: torch.nn.Parameter) -> float:
    return 1.0 if _is_norm_scale(name, parameter) else 0.0


def _std(name: str, parameter: torch.nn.Parameter, std_by_suffix: StdBySuffix) -> float:
    for suffix, std in std_by_suffix.items():
        if name.endswith(suffix):
            return std
    if _is_norm_scale(name, parameter) or parameter.ndim < 2:
        return 0.1
    return 1 / math.sqrt(math.prod(parameter.shape[1:]))
