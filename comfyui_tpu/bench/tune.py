"""Looking for the best tiles of our kernel: candidates compiled, ranked by the cycles of their schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from comfyui_tpu.bench.attention import ESTIMATE, row, table, versions
from comfyui_tpu.bench.compiling import Compiled
from comfyui_tpu.bench.kernels import OURS, Job, Shape, our_blocks
from comfyui_tpu.ops.splash_blocks import Blocks, heads_together, padded_head_dim
from comfyui_tpu.plan.hardware import Topology

FORMAT = "QUERIES,KEYS,COLUMNS,SLICE[,AHEAD,BEHIND[,VMEM_MIB]]"
SCHEDULES = ((1, 1), (4, 2))  # ahead, behind
START_AND_END = 150  # cycles of a tile that no property of it explains


def jobs(topology: Topology, shapes: list[Shape], candidates: list[Blocks] | None) -> list[Job]:
    """Every candidate for every shape."""
    return [
        Job(OURS, topology.name, shape, blocks)
        for shape in shapes
        for blocks in candidates or _variations(our_blocks(topology, shape))
    ]


def _variations(chosen: Blocks) -> list[Blocks]:
    """The tile in use, cut into parts in other ways."""

    def cuts() -> Iterator[Blocks]:
        yield chosen
        for columns in (chosen.queries, 512, 256):
            for size in (512, 256):
                if chosen.queries % columns == 0 and chosen.keys % size == 0:
                    for ahead, behind in SCHEDULES:
                        yield replace(chosen, columns=columns, slice=size, ahead=ahead, behind=behind)

    return list(dict.fromkeys(cuts()))


def rank(done: list[Compiled], topology: Topology, head_dim: int) -> dict[str, Any]:
    """The report: candidates of each length, fastest first, and what they say about the table of tiles."""
    rows = [row(each, topology) | {"seq": each.job.shape.queries} for each in done if each.schedule]
    rows.sort(key=lambda each: (each["seq"], each["cycles_total"]))
    return {
        "rows": rows,
        "topology": topology.name,
        "head_dim": head_dim,
        "versions": versions(),
        "basis": ESTIMATE,
        "limits": _limits(rows, head_dim),
        "does_not_fit": [
            {"seq": each.job.shape.queries, "blocks": astuple(each.job.blocks), "reason": each.reason}
            for each in done
            if not each.schedule
        ],
    }


def _limits(rows: list[dict[str, Any]], head_dim: int) -> str | None:
    """The line for ``comfyui_tpu/ops/splash_blocks.py``: how the fastest tile per logit is cut, and what tiles cost."""
    if not rows:
        return None
    best = min(rows, key=lambda each: each["cycles_per_1024_logits"])["blocks"]
    alike = [each for each in rows if _cut(each["blocks"]) == _cut(best)]
    columns = None if best["columns"] == best["queries"] else best["columns"]
    cycles, part_cycles = _costs(alike, heads_together(padded_head_dim(head_dim)))
    return (
        f"{head_dim}: Limits(queries={max(each['block_q'] for each in alike)}, "
        f"keys={max(each['block_kv'] for each in alike)}, "
        f"area={max(each['block_q'] * each['block_kv'] for each in alike)}, columns={columns}, "
        f"slices=({best['slice']},), ahead={best['ahead']}, behind={best['behind']}, step={columns or 256}, "
        f"cycles={cycles:.3f}, part_cycles={part_cycles:.0f}, vmem_mib={best['vmem_mib']}, least=0),"
    )


def _cut(blocks: dict[str, Any]) -> tuple[Any, ...]:
    whole = blocks["columns"] == blocks["queries"]
    return (None if whole else blocks["columns"], *(blocks[name] for name in ("slice", "ahead", "behind", "vmem_mib")))


def _costs(rows: list[dict[str, Any]], together: int = 1) -> tuple[float, float]:
    """Cycles per 1024 logits and per part that explain these tiles of ``together`` heads best; all per logit where
    they are too alike."""
    logits = np.array([together * each["block_q"] * each["block_kv"] / 1024 for each in rows])
    parts = np.array([together * _parts(each["blocks"]) for each in rows])
    cycles = np.array([each["cycles_per_tile"] - START_AND_END for each in rows])
    found, _, independent, _ = np.linalg.lstsq(np.stack([logits, parts], axis=1), cycles, rcond=1e-6)
    if independent == 2 and found.min() >= 0:
        return float(found[0]), float(found[1])
    return float(cycles.sum() / logits.sum()), 0.0


def _parts(blocks: dict[str, Any]) -> int:
    return blocks["queries"] // blocks["columns"] * (blocks["keys"] // blocks["slice"])


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    used = report["versions"]
    lines = [
        f"{report['topology']}, head_dim {report['head_dim']}; jax {used['jax']}, libtpu {used['libtpu']}",
        report["basis"],
        "",
        *table([_cells(each) for each in report["rows"]]),
        *(f"{each['seq']}: {each['blocks']} does not fit: {each['reason']}" for each in report["does_not_fit"]),
    ]
    if report["limits"]:
        lines += [
            "",
            f"For the table in comfyui_tpu/ops/splash_blocks.py (jax {used['jax']}, libtpu {used['libtpu']}); queries, "
            "keys and area are the largest tried here that fit:",
            f"    {report['limits']}",
        ]
    return "\n".join(lines)


def _cells(each: dict[str, Any]) -> dict[str, str]:
    blocks = each["blocks"]
    return {
        "seq": str(each["seq"]),
        "tile q × kv": f"{each['block_q']} × {each['block_kv']}",
        "columns × slice": f"{blocks['columns']} × {blocks['slice']}",
        "ahead, behind": f"{blocks['ahead']}, {blocks['behind']}",
        "cycles in all": f"{each['cycles_total']:,}",
        "per 1024 logits": f"{each['cycles_per_1024_logits']:.3f}",
        "% of peak": f"{each['pct_of_peak']:.1f}",
        "fullest unit": f"{each['limiting_unit']} {each['limiting_unit_pct']:.0f} %",
        "compile": f"{each['compile_seconds']:.0f} s",
    }
