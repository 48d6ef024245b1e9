"""Estimates as one self-contained HTML page: no scripts, no fonts or pictures from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from comfyui_tpu.plan import table
from comfyui_tpu.plan.costs import CATEGORIES, LABELS
from comfyui_tpu.plan.table import gib, readable_seconds

TOP = 20
_COLOURS = dict(zip(CATEGORIES, ("#3b6fd4", "#8a4fbf", "#2f9e77", "#d98324", "#c2453f"), strict=True))
_MEMORY_COLOURS = ("#3b6fd4", "#8a4fbf", "#2f9e77", "#d98324", "#c2453f", "#5f7d8c", "#9c8b3f")

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.note { opacity: .75; margin-top: .2rem; } .verdict { font-size: 1.1rem; font-weight: 600; }
.bar { display: flex; height: 2.2rem; border-radius: .3rem; overflow: hidden; background: var(--soft); }
.bar span { min-width: 1px; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: 0; margin: .6rem 0; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .4rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
.figures b { display: block; font-size: 1.35rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def render(estimates: list[dict[str, Any]]) -> str:
    """A page for estimates in their JSON form: the first in detail, more of them as a comparison."""
    first = estimates[0]
    parts = [_header(first), _figures(first), _memory(first), _step(first), _operations(first), _programs(first)]
    if len(estimates) > 1:
        parts.insert(2, _comparison(estimates))
    parts.append(_assumptions(first))
    title = escape(f"{first['model']} on {first['topology']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _header(estimate: dict[str, Any]) -> str:
    task = estimate["task"]
    frames = f" × {task['num_frames']} frames" if task["num_frames"] > 1 else ""
    asked = f"{task['width']} × {task['height']}{frames}, {task['num_inference_steps']} steps"
    return (
        f"<h1>{escape(estimate['model'])} on {escape(estimate['topology'])}</h1>"
        f'<p class="note">{asked}, guidance {task["guidance_scale"]:g}, {estimate["devices"]} JAX devices. Compiler '
        f'estimates; nothing was measured on a TPU.</p><p class="verdict">{escape(table.verdict(estimate))}</p>'
    )


def _figures(estimate: dict[str, Any]) -> str:
    mfu = estimate["mfu_estimate"]
    figures = {
        "HBM a chip, all resident": gib(estimate["hbm_bytes_per_chip"]),
        "one denoising step": readable_seconds(estimate["seconds_per_step_estimate"]),
        "whole task": readable_seconds(estimate["seconds_per_task_estimate"]),
        "of the matmul peak": "-" if mfu is None else f"{mfu:.1%}",
        "compilation": readable_seconds(estimate["compile_seconds"]),
    }
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in figures.items())
    return f'<div class="figures">{cells}</div>'


def _memory(estimate: dict[str, Any]) -> str:
    available = estimate["hbm_bytes_available"]
    sizes = list(estimate["hbm_map"].items())
    whole = max(available, sum(size for _, size in sizes))
    rows = [
        (name, size / whole, gib(size), _MEMORY_COLOURS[index % len(_MEMORY_COLOURS)])
        for index, (name, size) in enumerate(sizes)
    ]
    return f"<h2>HBM of each chip ({gib(available)})</h2>{_bar(rows)}{_legend(rows)}"


def _step(estimate: dict[str, Any]) -> str:
    cycles, clock = estimate["cycles"], estimate["assumptions"]["clock_hz"]
    total = sum(cycles.values())
    if not total or estimate["seconds_per_step_estimate"] is None:
        return ""
    rows = [
        (LABELS[name], value / total, f"{readable_seconds(value / clock)}, {value / total:.1%}", _COLOURS[name])
        for name, value in cycles.items()
    ]
    roofline = estimate["roofline_seconds"]
    limits = (
        f'<p class="note">At the matmul peak alone: {readable_seconds(roofline["compute"])}. This program\'s HBM '
        f"traffic alone: {readable_seconds(roofline['memory'])}.</p>"
    )
    return f"<h2>One denoising step</h2>{_bar(rows)}{_legend(rows)}{limits}"


def _operations(estimate: dict[str, Any]) -> str:
    rows = sorted(
        ((op, program) for program in estimate["programs"] for op in program["operations"]),
        key=lambda row: -row[0]["cycles"] * row[1]["calls"],
    )[:TOP]
    clock = estimate["assumptions"]["clock_hz"]
    whole = sum(sum(p["cycles"].values()) * p["calls"] for p in estimate["programs"]) or 1
    body = "".join(
        f'<tr><td class="n">{readable_seconds(op["cycles"] / clock)}</td>'
        f'<td class="n">{op["cycles"] * program["calls"] / whole:.1%}</td><td class="n">{op["executions"]:,}</td>'
        f"<td>{escape(LABELS[op['category']])}</td><td>{escape(op['module'])}</td>"
        f"<td>{escape(program['label'])}</td><td><code>{escape(op['opcode'])} {escape(op['shape'])}</code></td></tr>"
        for op, program in rows
    )
    head = (
        '<tr><th class="n">a call</th><th class="n">of the task</th><th class="n">runs</th><th>kind</th><th>module</th>'
        "<th>program</th><th>operation</th></tr>"
    )
    return f'<h2>The {TOP} most expensive operations</h2><div class="wide"><table>{head}{body}</table></div>'


def _programs(estimate: dict[str, Any]) -> str:
    body = "".join(
        f'<tr><td>{escape(p["label"])}</td><td class="n">{p["calls"]}</td>'
        f'<td class="n">{"-" if p["failure"] else readable_seconds(p["seconds_per_call"])}</td>'
        f'<td class="n">{gib(p["working_bytes"])}</td>'
        f'<td class="n">{p["trace_seconds"] + p["compile_seconds"]:.0f} s</td><td>{escape(p["inputs"])}</td></tr>'
        for p in estimate["programs"]
    )
    head = (
        '<tr><th>program</th><th class="n">calls</th><th class="n">a call</th><th class="n">activations</th>'
        '<th class="n">compilation</th><th>inputs</th></tr>'
    )
    return f'<h2>Programs</h2><div class="wide"><table>{head}{body}</table></div>'


def _comparison(estimates: list[dict[str, Any]]) -> str:
    heads, *rows = table.comparison_rows(estimates)
    head = "<tr><th></th>" + "".join(f'<th class="n">{escape(name)}</th>' for name in heads[1]) + "</tr>"
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return f'<h2>Side by side</h2><div class="wide"><table>{head}{body}</table></div>'


def _assumptions(estimate: dict[str, Any]) -> str:
    known = estimate["assumptions"]
    text = (
        f"Assumed: {known['clock_hz'] / 1e9:g} GHz, {known['peak_flops'] / 1e12:,.0f} TFLOP/s bfloat16, "
        f"{known['hbm_bytes_per_second'] / 1e9:,.0f} GB/s of HBM, "
        f"{known['link_bytes_per_second_one_way'] / 1e9:g} GB/s a link and direction."
    )
    notes = "".join(f"<li>{escape(warning)}</li>" for warning in estimate["warnings"])
    return f'<p class="note">{text}</p>' + (f'<ul class="note">{notes}</ul>' if notes else "")


def _bar(rows: list[tuple[str, float, str, str]]) -> str:
    spans = "".join(
        f'<span style="width:{share:.3%};background:{colour}" title="{escape(name)}: {escape(label)}"></span>'
        for name, share, label, colour in rows
    )
    return f'<div class="bar">{spans}</div>'


def _legend(rows: list[tuple[str, float, str, str]]) -> str:
    items = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)}: <b>{escape(label)}</b></li>'
        for name, _, label, colour in rows
    )
    return f'<ul class="legend">{items}</ul>'
