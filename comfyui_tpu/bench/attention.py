"""Comparing our attention kernel with others, by the compiler's schedules."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from comfyui_tpu.bench.compiling import Compiled
from comfyui_tpu.bench.kernels import JAX_SPLASH, OURS, TOKAMAX_SPLASH, Count, Job, Shape, count, head_dim_bound
from comfyui_tpu.plan.hardware import Topology

ESTIMATE = "Compiler estimate from static schedules: nothing was measured on a TPU."

RATIOS = {
    "ratio_to_jax_splash": "whole kernel: {} × JAX splash",
    "ratio_per_tile": "full tile: {} × JAX splash",
    "ratio_with_surroundings": "with XLA's operations around the kernel: {} × JAX splash",
    "ratio_to_tokamax": "whole kernel: {} × tokamax's splash",
}
WITHOUT_TOKAMAX = "tokamax is not installed, and so not compared: pip install tokamax"


def row(done: Compiled, topology: Topology, online: bool = False) -> dict[str, Any]:
    """What a compiled kernel comes to, as in the JSON."""
    job, counted = done.job, count(done.job, done.schedule, online)
    peak_cycles = job.shape.flops / topology.generation.flops_per_cycle
    of_peak, bound = peak_cycles / counted.total, head_dim_bound(topology, job.shape.head_dim)
    return {
        "kernel": job.kernel,
        "block_q": job.blocks.queries,
        "block_kv": job.blocks.keys,
        "cycles_per_tile": round(counted.tile),
        "cycles_total": round(counted.total),
        "pct_of_peak": round(100 * of_peak, 2),
        "pct_of_head_dim_bound": round(100 * of_peak / bound, 2),
        "limiting_unit": counted.limiting_unit,
        "limiting_unit_pct": round(100 * counted.utilisation[counted.limiting_unit], 1),
        "compile_seconds": round(done.seconds, 1),
        "cycles_around_kernel": round(done.cycles_around),
        "cycles_with_surroundings": round(counted.total + done.cycles_around),
        **_details(job, counted),
    }


def _details(job: Job, counted: Count) -> dict[str, Any]:
    return {
        "cycles_per_1024_logits": round(
            counted.tile * 1024 / (job.heads_together * job.blocks.queries * job.blocks.keys), 4
        ),
        "tiles": math.ceil(job.shape.heads / job.heads_together) * job.query_blocks * job.tiles,
        "blocks": asdict(job.blocks),
        "utilisation_pct": {unit: round(100 * share, 1) for unit, share in counted.utilisation.items()},
        "notes": list(counted.notes),
    }


def compare(done: list[Compiled], topology: Topology, shape: Shape, online: bool = False) -> dict[str, Any]:
    """The report: our kernel, and each peer's with the tile that is fastest for this shape."""
    rows = [row(each, topology, online) for each in done if each.schedule]
    ours = [each for each in rows if each["kernel"] == OURS]
    peers, tokamax = _fastest_first(rows, JAX_SPLASH), _fastest_first(rows, TOKAMAX_SPLASH)
    return {
        "rows": [*ours, *peers[:1], *tokamax[:1]],
        "ratio_to_jax_splash": _ratio(ours, peers, "cycles_total"),
        "ratio_per_tile": _ratio(ours, peers, "cycles_per_1024_logits"),
        "ratio_with_surroundings": _ratio(ours, peers, "cycles_with_surroundings"),
        "ratio_to_tokamax": _ratio(ours, tokamax, "cycles_total"),
        "topology": topology.name,
        "shape": asdict(shape),
        "dtype": "bfloat16",
        "softmax": "online" if online else "bounded",
        "head_dim_bound_pct": round(100 * head_dim_bound(topology, shape.head_dim), 1),
        "versions": versions(),
        "basis": ESTIMATE,
        "jax_splash_candidates": peers,
        "tokamax_splash_candidates": tokamax,
        "notes": [] if any(each.job.kernel == TOKAMAX_SPLASH for each in done) else [WITHOUT_TOKAMAX],
        "does_not_fit": [
            {"kernel": each.job.kernel, "blocks": asdict(each.job.blocks), "reason": each.reason}
            for each in done
            if not each.schedule
        ],
    }


def _fastest_first(rows: list[dict], kernel: str) -> list[dict]:
    return sorted((each for each in rows if each["kernel"] == kernel), key=lambda each: each["cycles_total"])


def _ratio(ours: list[dict], peers: list[dict], key: str) -> float | None:
    return round(peers[0][key] / ours[0][key], 3) if ours and peers else None


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; tokamax's only where there is one."""
    found = {name: _installed(name) for name in ("jax", "libtpu", "tokamax")}
    return found if found["tokamax"] else {name: found[name] for name in ("jax", "libtpu")}


def has_tokamax() -> bool:
    return _installed("tokamax") is not None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    shape = report["shape"]
    lines = [
        f"{report['topology']}, one chip: {shape['heads']} heads, {shape['queries']} queries × {shape['keys']} keys, "
        f"head_dim {shape['head_dim']}, {report['dtype']}; "
        + ", ".join(f"{package} {installed}" for package, installed in report["versions"].items()),
        report["basis"],
        "",
        *table([_cells(each) for each in report["rows"]]),
        "",
        f"head-dim bound: {report['head_dim_bound_pct']} % of peak",
    ]
    for name, what in RATIOS.items():
        if report[name] is not None:
            lines.append(what.format(report[name]))
    for each in report["rows"]:
        share = each["cycles_around_kernel"] / each["cycles_total"]
        lines.append(f"{each['kernel']}: XLA's operations around the kernel come on top, {100 * share:.1f} % of it")
    lines += report["notes"]
    lines += [f"{each['kernel']}: {note}" for each in report["rows"] for note in each["notes"]]
    lines += [f"{each['kernel']} {each['blocks']} does not fit: {each['reason']}" for each in report["does_not_fit"]]
    return "\n".join(lines)


def _cells(each: dict[str, Any]) -> dict[str, str]:
    return {
        "kernel": each["kernel"],
        "tile q × kv": f"{each['block_q']} × {each['block_kv']}",
        "cycles per tile": f"{each['cycles_per_tile']:,}",
        "cycles in all": f"{each['cycles_total']:,}",
        "% of peak": f"{each['pct_of_peak']:.1f}",
        "% of bound": f"{each['pct_of_head_dim_bound']:.1f}",
        "fullest unit": f"{each['limiting_unit']} {each['limiting_unit_pct']:.0f} %",
        "compile": f"{each['compile_seconds']:.0f} s",
    }


def table(rows: list[dict[str, str]]) -> list[str]:
    """Rows of equal keys as aligned lines, with a head."""
    if not rows:
        return ["(nothing fits)"]
    cells = [list(rows[0]), *(list(each.values()) for each in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
