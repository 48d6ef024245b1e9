"""Which chips a node may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfyui_tpu.runtime.errors import InvalidInput

if TYPE_CHECKING:
    import jax


def first_devices(num_devices: int) -> tuple[jax.Device, ...] | None:
    """The first ``num_devices`` chips; 0 → None, which means all of them."""
    if num_devices == 0:
        return None
    import jax

    found = tuple(jax.devices())
    if num_devices > len(found):
        kind = "CPU (no TPU found)" if found[0].platform == "cpu" else found[0].device_kind
        raise InvalidInput(
            f"num_devices must be at most {len(found)}, as many as this machine has ({len(found)} × {kind}), but "
            f"{num_devices} came. Set it to 0 to use all."
        )
    return found[:num_devices]
