"""Rotary embedding of neighbouring elements, in operations that suit a TPU."""

from __future__ import annotations

import torch


def rotate_pairs(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbouring elements: (a, b) → (a·cos − b·sin, a·sin + b·cos).

    Args:
        x: ``[..., D]``; the result has its dtype.
        cosines, sines: broadcastable to ``x``, each angle twice, in the dtype that the rotation is computed in.
    """
    return (x * cosines + _turned(x) * sines).type_as(x)


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Each pair turned by a right angle: (a, b) → (−b, a).

    Elements that change places within a vector register cost a TPU far more than a product with a matrix of ones and
    zeros, which the matrix unit does in passing and, for bfloat16, exactly. Float32 would be rounded there.
    """
    if x.dtype == torch.bfloat16:
        return x @ _exchanged(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    return _exchanged(x)


def _exchanged(x: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)
