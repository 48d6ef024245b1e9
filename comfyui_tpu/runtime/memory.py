"""How much memory a device has and how much of it is taken.

A TPU keeps count itself. A device that computes in host memory does not; there the environment variable
``COMFYUI_TPU_HBM_BUDGET`` (bytes for each device) stands in for a chip's capacity, so that everything that happens when
memory is short can be seen, and tested, on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from comfyui_tpu.runtime.errors import InvalidInput

BUDGET_VARIABLE = "COMFYUI_TPU_HBM_BUDGET"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device's memory: taken (by anybody), and there at all."""

    used: int
    limit: int

    @property
    def free(self) -> int:
        return self.limit - self.used


def budget() -> int | None:
    """Bytes for each device from ``COMFYUI_TPU_HBM_BUDGET``; None where it is not set.

    Raises:
        InvalidInput: it is no positive whole number.
    """
    text = os.environ.get(BUDGET_VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InvalidInput(
            f"{BUDGET_VARIABLE} must be a number of bytes for each device (for example 17179869184 for 16 GiB), but "
            f"{text[:40]!r} came. Correct or unset it, and restart ComfyUI."
        )
    return int(text)


def device_memory(device: jax.Device) -> DeviceMemory | None:
    """What is known of the memory of one of this process's devices; None: nothing.

    On a TPU the budget lowers the capacity that is planned with; it cannot raise it.
    """
    limit, stats = budget(), device.memory_stats() or {}
    if "bytes_limit" in stats and "bytes_in_use" in stats:
        capacity = stats["bytes_limit"] if limit is None else min(limit, stats["bytes_limit"])
        return DeviceMemory(stats["bytes_in_use"], capacity)
    return None if limit is None else DeviceMemory(live_bytes(device), limit)


def live_bytes(device: jax.Device) -> int:
    """Bytes of all of this process's arrays that live on ``device``, whoever made them."""
    arrays = jax.live_arrays(device.platform)
    return sum(bytes_on_each_device(array) for array in arrays if device in array.sharding.device_set)


def bytes_on_each_device(array: Any) -> int:
    """Bytes that an array (or its ShapeDtypeStruct) takes on each device it lies on."""
    size = array.dtype.itemsize
    for length in array.sharding.shard_shape(array.shape):
        size *= length
    return size


def simulate_allocation(devices: Iterable[jax.Device], nbytes: int) -> None:
    """Before ``nbytes`` are taken on each device: fail as a chip would, where only a budget stands for its memory.

    Raises:
        JaxRuntimeError: RESOURCE_EXHAUSTED, the error of a real device that has no such room.
    """
    limit = budget()
    if limit is None:
        return
    for device in devices:
        if device.platform == "cpu" and (used := live_bytes(device)) + nbytes > limit:
            raise jax.errors.JaxRuntimeError(
                f"RESOURCE_EXHAUSTED: Attempting to allocate {nbytes} bytes on {device}, of which {used} of {limit} "
                f"are in use ({BUDGET_VARIABLE})."
            )
