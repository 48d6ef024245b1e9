"""Estimates for the terminal, from their JSON form."""

from __future__ import annotations

from typing import Any

from comfyui_tpu.plan.costs import LABELS
from comfyui_tpu.plan.hardware import GIB

_BAR = 30


def render(estimate: dict[str, Any]) -> str:
    """One estimate as text."""
    task = estimate["task"]
    frames = f" × {task['num_frames']} frames" if task["num_frames"] > 1 else ""
    lines = [
        f"{estimate['model']} on {estimate['topology']} ({estimate['devices']} JAX devices): "
        f"{task['width']} × {task['height']}{frames}, {task['num_inference_steps']} steps, guidance "
        f"{task['guidance_scale']:g}",
        "compiler estimates; nothing was measured on a TPU",
        "",
        *_memory(estimate),
        "",
        *(_time(estimate) if estimate["seconds_per_step_estimate"] is not None else _failures(estimate)),
        "",
        *_programs(estimate),
    ]
    if estimate["warnings"]:
        lines += ["", "notes", *(f"  {warning}" for warning in estimate["warnings"])]
    return "\n".join(lines)


def verdict(estimate: dict[str, Any]) -> str:
    """Does it fit, in one sentence."""
    available = estimate["hbm_bytes_available"]
    if not estimate["fits"]:
        short = estimate["hbm_bytes_missing"]
        by = f" by {gib(short)}" if short else ""
        others = estimate.get("topologies_that_fit")
        fitting = ", ".join(others) if others else "none of up to 8 chips"
        hint = f" Topologies that fit (weights exact, temporaries scaled): {fitting}." if others is not None else ""
        return f"DOES NOT FIT{by} a chip (each component alone, of {gib(available)}).{hint}"
    if not estimate["fits_resident"]:
        return f"FITS, but not all at once in {gib(available)}: components take turns and are loaded again each time."
    return f"FITS: {gib(estimate['hbm_bytes_per_chip'])} of {gib(available)} a chip with everything resident."


def _memory(estimate: dict[str, Any]) -> list[str]:
    lines = [verdict(estimate), "HBM a chip"]
    for name, size in estimate["hbm_map"].items():
        lines.append(f"  {name:44s} {gib(size):>10s}  {_bar(size / estimate['hbm_bytes_available'])}")
    return [*lines, f"  {'all resident':44s} {gib(estimate['hbm_bytes_per_chip']):>10s}"]


def _time(estimate: dict[str, Any]) -> list[str]:
    clock = estimate["assumptions"]["clock_hz"]
    total = sum(estimate["cycles"].values()) or 1
    step, roofline = estimate["seconds_per_step_estimate"], estimate["roofline_seconds"]
    lines = [f"one denoising step (both guidance branches, if any): {readable_seconds(step)}"]
    for category, cycles in sorted(estimate["cycles"].items(), key=lambda item: -item[1]):
        lines.append(
            f"  {LABELS[category]:30s} {cycles / 1e6:10,.1f} M cycles {readable_seconds(cycles / clock):>10s} "
            f"{cycles / total:6.1%}  {_bar(cycles / total)}"
        )
    lines.append(
        f"matmul peak reached: {estimate['mfu_estimate']:.1%} (at the peak: {readable_seconds(roofline['compute'])}; "
        f"this program's HBM traffic alone: {readable_seconds(roofline['memory'])})"
    )
    lines.append(f"whole task: {readable_seconds(estimate['seconds_per_task_estimate'])}, without the host's share:")
    for name, seconds in estimate["seconds_by_component"].items():
        lines.append(f"  {name:30s} {readable_seconds(seconds):>10s}")
    return lines


def _failures(estimate: dict[str, Any]) -> list[str]:
    return [f"{p['label']}: {p['failure']}" for p in estimate["programs"] if p["failure"]]


def _programs(estimate: dict[str, Any]) -> list[str]:
    lines = [f"{'program':28s} {'calls':>5s} {'a call':>10s} {'activations':>12s} {'compilation':>12s}  inputs"]
    for program in estimate["programs"]:
        a_call = "-" if program["failure"] else readable_seconds(program["seconds_per_call"])
        seconds = program["trace_seconds"] + program["compile_seconds"]
        lines.append(
            f"{program['label']:28s} {program['calls']:5d} {a_call:>10s} {gib(program['working_bytes']):>12s} "
            f"{seconds:10.0f} s  {program['inputs']}"
        )
    return [*lines, f"compilation, one after the other: {estimate['compile_seconds']:.0f} s"]


def compare(estimates: list[dict[str, Any]]) -> str:
    """Several estimates side by side."""
    rows = comparison_rows(estimates)
    width = max(14, *(len(cell) for _, cells in rows for cell in cells)) + 2
    return "\n".join(["", *(f"{name:32s}" + "".join(f"{cell:>{width}s}" for cell in cells) for name, cells in rows)])


def comparison_rows(estimates: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """What is compared, and its value for each estimate; the first row names them."""
    return [
        ("", [f"{e['model']} {e['topology']}" for e in estimates]),
        ("plan", [e["plans"].get("transformer", "") for e in estimates]),
        ("fits", ["resident" if e["fits_resident"] else "in turns" if e["fits"] else "NO" for e in estimates]),
        ("HBM a chip", [gib(e["hbm_bytes_per_chip"]) for e in estimates]),
        ("HBM available", [gib(e["hbm_bytes_available"]) for e in estimates]),
        ("a step", [readable_seconds(e["seconds_per_step_estimate"]) for e in estimates]),
        ("whole task", [readable_seconds(e["seconds_per_task_estimate"]) for e in estimates]),
        ("matmul peak reached", [_share(e["mfu_estimate"]) for e in estimates]),
        *(
            (f"  {label}", [readable_seconds(e["cycles"][category] / e["assumptions"]["clock_hz"]) for e in estimates])
            for category, label in LABELS.items()
        ),
        ("compilation", [readable_seconds(e["compile_seconds"]) for e in estimates]),
    ]


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def readable_seconds(seconds: float | None) -> str:
    """Seconds for people; None is a dash."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _bar(share: float) -> str:
    return "█" * round(_BAR * min(share, 1))
