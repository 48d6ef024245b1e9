"""What to show of arrays when any value is shown: type, shape, range."""

from __future__ import annotations

import numpy as np
import torch

from comfyui_tpu.metadata import summary
from comfyui_tpu.metadata.reading import Metadata

MAX_WHOLE = 16  # elements that are shown themselves


def show(value: object) -> str:
    """``value`` as text; see ``comfyui_tpu.metadata.summary``."""
    return summary.show(value, summarize)


def to_jsonable(value: object) -> object:
    return summary.summary(value, summarize)


def summarize(value: object) -> dict | None:
    """Arrays and tensors in a few figures; None for everything else."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        facts = {"array": f"numpy.{value.dtype}", "shape": list(value.shape)}
        return facts | (_range(torch.from_numpy(np.array(value))) if _in_torch(value.dtype) else {})
    if isinstance(value, Metadata):
        return summary.summary(value.as_dict())
    if type(value).__module__.partition(".")[0] in ("jax", "jaxlib") and hasattr(value, "sharding"):
        # On the device: its values stay there, looking at them would cost a program and a transfer.
        return {"array": f"jax.{value.dtype}", "shape": list(value.shape), "sharding": str(value.sharding)}
    return None


def _in_torch(dtype: np.dtype) -> bool:
    """Whether torch has this type: no texts, dates, foreign byte orders, long doubles or wide unsigned integers."""
    return dtype.isnative and ((dtype.kind in "bif" and dtype.itemsize <= 8) or dtype == np.uint8)


def _tensor(tensor: torch.Tensor) -> dict:
    facts = {"tensor": str(tensor.dtype), "shape": list(tensor.shape), "device": str(tensor.device)}
    if tensor.is_meta or tensor.is_sparse or tensor.is_quantized or tensor.is_complex():
        return facts
    return facts | _range(tensor.detach())


def _range(tensor: torch.Tensor) -> dict:
    if not tensor.numel():
        return {}
    if tensor.dtype == torch.bool:
        return {"true": int(tensor.count_nonzero()), "of": tensor.numel()}
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float64 if not tensor.is_floating_point() else torch.float32)
    finite = tensor.isfinite()
    bad = tensor.numel() - int(finite.count_nonzero())
    facts = {"not finite": bad} if bad else {}
    if bad == tensor.numel():
        return facts
    known = tensor[finite] if bad else tensor
    facts |= {"min": _figure(known.min()), "max": _figure(known.max()), "mean": _figure(known.mean())}
    return facts | (
        {"values": [_figure(each) for each in known.flatten()]} if tensor.numel() <= MAX_WHOLE and not bad else {}
    )


def _figure(value: torch.Tensor) -> float | int:
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else float(f"{number:.6g}")
