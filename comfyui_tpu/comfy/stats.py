"""The monitor's sample, for nodes."""

from __future__ import annotations

import asyncio

TIMEOUT_SECONDS = 30


def take_sample() -> dict:
    """One sample of the running monitor as plain JSON. For the worker thread that runs nodes."""
    from server import PromptServer

    server = PromptServer.instance
    # The monitor lives on the server's event loop, which is not the loop that runs nodes.
    coming = asyncio.run_coroutine_threadsafe(server.tpu_monitor.sample(), server.loop)
    try:
        return coming.result(TIMEOUT_SECONDS).to_json()
    except TimeoutError:
        coming.cancel()
        raise TimeoutError(
            f"the machine's figures did not come within {TIMEOUT_SECONDS} s; see the server's log"
        ) from None


def describe_sample(sample: dict) -> str:
    """A few lines for people."""
    lines = [f"CPU {sample['cpu']:g} %", f"RAM {_space(sample['ram'])}"]
    lines += [f"Disk {disk['path']} {_space(disk)}" for disk in sample["disks"]]
    lines += [_chip(chip) for chip in sample["chips"]]
    lines += [f"In memory: {label} {size / 2**30:.2f} GiB" for label, size in sample.get("held", {}).items()]
    reasons = {reason["text"] for reason in sample["unavailable"].values()}
    if not sample["chips"]:
        lines.append("TPU: not available")
    return "\n".join(lines + sorted(reasons))


def _space(space: dict) -> str:
    gib = 2**30
    return f"{space['used'] / gib:.1f} of {space['total'] / gib:.1f} GiB"


def _chip(chip: dict) -> str:
    parts = []
    if chip["hbm_used"] is not None and chip["hbm_total"]:
        parts.append("HBM " + _space({"used": chip["hbm_used"], "total": chip["hbm_total"]}))
    for name, label in (("duty_cycle", "duty cycle"), ("tensorcore_utilization", "TensorCore")):
        if chip[name] is not None:
            parts.append(f"{label} {chip[name]:g} %")
    return f"Chip {chip['index']}: " + (", ".join(parts) or "not available")
