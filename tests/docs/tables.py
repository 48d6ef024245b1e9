"""The tables of the READMEs and pages, made from what they describe: `python -m tests.docs.tables` writes them.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Schemas come from the packs, weights from the
plans, hardware from the planner, times and working memory from docs/figures.json: the one place to enter new ones.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from bootstrap import examples
from tests.checkpoints import WRITERS
from tests.docs.schemas import PACKS, REPOSITORY, schemas

FIGURES = REPOSITORY / "docs" / "figures.json"
PAGES = {
    "README_EN.md": "en",
    "README.md": "zh",
    "docs/performance.md": "en",
    "docs/performance_zh.md": "zh",
    "docs/monitor.md": "en",
    "docs/monitor_zh.md": "zh",
}
GIB = 2**30

# Models and sizes people start with; in the planner's catalogue.
FIT_MODELS = ("flux.2-dev", "cogvideox1.5-5b", "wan2.1-t2v-14b", "wan2.2-i2v-a14b")
# (what gcloud calls it, its software version, topology): single machines. Names and versions: Google's pages "TPU
# software versions" and "TPU configurations" (docs.cloud.google.com/tpu/docs), read in November 2026.
MACHINES = (
    ("v6e-8", "v2-alpha-tpuv6e", "v6e:2x4"),
    ("v6e-4", "v2-alpha-tpuv6e", "v6e:2x2"),
    ("v6e-1", "v2-alpha-tpuv6e", "v6e:1x1"),
    ("v5p-8", "v2-alpha-tpuv5", "v5p:2x2x1"),
    ("v5litepod-8", "v2-alpha-tpuv5-lite", "v5e:2x4"),
    ("v5litepod-4", "v2-alpha-tpuv5-lite", "v5e:2x2"),
    ("v4-8", "tpu-ubuntu2204-base", "v4:2x2x1"),
    ("TPU7x, 4 chips", "GKE", "v7x:2x2x1"),
)
RESIDENT, IN_TURN, TOO_SMALL = "●", "○", "–"

TEXTS = {
    "en": {
        "nodes": "| node | inputs: default [range] | outputs |",
        "machines": "| `--accelerator-type` | `--version` | chips | GiB a chip |",
        "models": "| pack | nodes under | default `model_id` |",
        "examples": "| workflow (▶: runs without a download) | pack | models |",
        "demo": "▶",
        "weights": "| model | 1 device | 2 | 4 | 8 | working memory on v6e-8 |",
        "steps": "| model | task | compiler estimate (ours) | measured by others (theirs) | their whole run / steps |",
        "seconds": "{:g} s a step",
        "decode": "{:g} s",
        "basis": "Compiler estimates of {date}, for {topology} ({versions}).",
        "unknown": "not estimated",
        "chips": "TPU7x, 4 chips",
    },
    "zh": {
        "nodes": "| 节点 | 输入：默认值 [范围] | 输出 |",
        "machines": "| `--accelerator-type` | `--version` | 芯片数 | 每芯片 GiB |",
        "models": "| 节点包 | 节点菜单 | 默认 `model_id` |",
        "examples": "| 工作流（▶ 不需要下载） | 节点包 | 模型 |",
        "demo": "▶",
        "weights": "| 模型 | 1 个设备 | 2 | 4 | 8 | v6e-8 上的工作内存 |",
        "steps": "| 模型 | 任务 | 编译器估计（我们的程序） | 他人实测（他们的程序） | 他们的总时间 / 步数 |",
        "seconds": "每步 {:g} 秒",
        "decode": "{:g} 秒",
        "basis": "编译器估计的日期为 {date}，针对 {topology}（{versions}）。",
        "unknown": "未估计",
        "chips": "TPU7x，4 芯片",
    },
}


def figures() -> dict:
    return json.loads(FIGURES.read_text(encoding="utf-8"))["estimates"]


# --- nodes ------------------------------------------------------------------------------------------------------------


def comfyui() -> Path:
    return Path(os.environ.get("COMFYUI_TPU_COMFYUI") or REPOSITORY / "ComfyUI")


def nodes_table(pack: str, language: str) -> list[str]:
    """One row for each node of ``pack``: name and id, inputs in order with default and range, outputs."""
    names = json.loads(
        (REPOSITORY / "custom_nodes" / pack / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
    )
    rows = [TEXTS[language]["nodes"], "|---|---|---|"]
    for node_id, info in schemas(comfyui())[pack].items():
        outputs = ", ".join(f"`{name}`" for name in info["output_name"])
        labels = names[node_id].get("inputs", {}) if language == "zh" else {}
        title = f"{names[node_id]['display_name']}<br>`{node_id}`"
        rows.append(f"| {title} | {inputs_cell(info, labels)} | {outputs or '–'} |")
    return rows


def inputs_cell(info: dict, labels: dict[str, dict]) -> str:
    """Required inputs upright, optional ones in italics; with what a translated page calls them."""
    found = []
    for section, form in (("required", "`{}`"), ("optional", "*`{}`*")):
        for name, spec in (info["input"].get(section) or {}).items():
            label = labels.get(name, {}).get("name", name)
            found.append(form.format(name) + ("" if label == name else f"（{label}）") + described(spec))
    return ("；" if labels else "; ").join(found) or "–"


def described(spec: list) -> str:
    """`` 720 [256–1280, step 16]``; nothing for inputs without a default that would say something."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if kind == "BOOLEAN":
        return f" {str(options['default']).lower()}"
    if kind == "COMBO":
        # Choices that depend on the machine's files are not listed.
        return "" if options.get("image_upload") else f" {options['default']} [{', '.join(options['options'])}]"
    if kind not in ("INT", "FLOAT"):
        return ""
    low, high, step = options.get("min"), options.get("max"), options.get("step", 1)
    text = f" {float(options['default']) if kind == 'FLOAT' else options['default']}"
    if low is None or high is None or high >= 2**53 or low <= -(2**53):
        return text
    return text + f" [{low:g}–{high:g}" + (f", step {step:g}]" if kind == "INT" and step != 1 else "]")


def models_table(language: str) -> list[str]:
    rows = [TEXTS[language]["models"], "|---|---|---|"]
    for pack, infos in schemas(comfyui()).items():
        ids = [
            section["model_id"][1] for info in infos.values() for section in _sections(info) if "model_id" in section
        ]
        defaults = {options["default"] for options in ids if options.get("default")}
        if defaults:
            (default,) = defaults
            (category,) = {info["category"] for info in infos.values()}
            rows.append(f"| `{pack}` | `{category}` | `{default}` |")
    return rows


def _sections(info: dict) -> list[dict]:
    return [info["input"].get(section) or {} for section in ("required", "optional")]


def examples_table(language: str) -> list[str]:
    """Every workflow of examples/, what it loads, and how to get it."""
    rows = [TEXTS[language]["examples"], "|---|---|---|"]
    ids = {node_id for infos in schemas(comfyui()).values() for node_id in infos}
    for name, pack in examples.PACKS.items():
        workflow = json.loads(examples.source(name).read_text(encoding="utf-8"))
        models = sorted({model for node in workflow["nodes"] if node["type"] in ids for model in _models(node)})
        kind = f" {TEXTS[language]['demo']}" if name in examples.DEMOS else ""
        rows.append(f"| `{name}`{kind} | `{pack}` | {', '.join(f'`{model}`' for model in models) or '–'} |")
    return rows


def _models(node: dict) -> set[str]:
    """Model ids among a node's widget values."""
    from comfyui_tpu.plan import catalogue

    known = {entry.repository for entry in catalogue.CATALOGUE.values()} | set(WRITERS)
    return {value for value in node.get("widgets_values") or [] if isinstance(value, str) and value in known}


# --- memory -----------------------------------------------------------------------------------------------------------


@functools.cache
def weights(model: str, devices: int) -> dict[str, int]:
    """Component → bytes of weights a device, by production's own plans. Nothing is compiled."""
    from comfyui_tpu.plan import catalogue, hardware
    from comfyui_tpu.plan.rehearsal import open_model

    topology = {1: "v6e:1x1", 2: "v6e:1x2", 4: "v6e:2x2", 8: "v6e:2x4"}[devices]
    with tempfile.TemporaryDirectory() as folder:
        written = catalogue.write(catalogue.entry(model).configs, Path(folder) / model)
        opened = open_model(written, hardware.describe_devices(hardware.parse(topology)))
        return {component.spec.name: component.bytes_per_device for component in opened.components}


def weights_table(language: str) -> list[str]:
    """Largest component / all components, GiB a device."""
    rows = [TEXTS[language]["weights"], "|---|---|---|---|---|---|"]
    working = figures()["working_gib"]
    for model in ("flux.2-dev", "cogvideox1.5-5b", "wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "wan2.2-i2v-a14b"):
        sizes = [weights(model, devices).values() for devices in (1, 2, 4, 8)]
        cells = [f"{max(each) / GIB:.1f} / {sum(each) / GIB:.1f}" for each in sizes]
        last = f"{working[model]:g} GiB" if model in working else TEXTS[language]["unknown"]
        rows.append(f"| `{model}` | {' | '.join(cells)} | {last} |")
    return rows


def verdict(model: str, topology_name: str) -> str:
    """Whether ``model`` stays loaded as a whole, runs part by part, or does not fit.

    The planner's own rule for topologies that were not compiled: exact weights, and the working memory of v6e-8 spread
    over as many devices as there are. The sampler and the decoder do not run at once.
    """
    from comfyui_tpu.plan import hardware

    topology = hardware.parse(topology_name)
    sizes, found = weights(model, topology.devices), figures()
    sampling, decoding = (
        found[kind].get(model, 0) * GIB * 8 / topology.devices for kind in ("working_gib", "decoder_gib")
    )
    room = topology.generation.hbm_bytes
    if sum(sizes.values()) + max(sampling, decoding) <= room:
        return RESIDENT
    in_turn = max(max(sizes.values()) + sampling, sizes["vae"] + decoding)
    return IN_TURN if in_turn <= room else TOO_SMALL


def machines_table(language: str) -> list[str]:
    from comfyui_tpu.plan import hardware

    texts = TEXTS[language]
    header = texts["machines"] + "".join(f" `{model}` |" for model in FIT_MODELS)
    rows = [header, "|---" * (header.count("|") - 1) + "|"]
    for accelerator, version, name in MACHINES:
        topology = hardware.parse(name)
        generation = topology.generation
        chips = topology.devices // generation.devices_per_chip
        memory = f"{generation.hbm_bytes * generation.devices_per_chip / GIB:.2f}"
        gke = accelerator.startswith("TPU7x")
        first = texts["chips"] if gke else f"`{accelerator}`"
        cells = [first, version if gke else f"`{version}`", str(chips), memory]
        rows.append(f"| {' | '.join([*cells, *(verdict(model, name) for model in FIT_MODELS)])} |")
    return rows


# --- time -------------------------------------------------------------------------------------------------------------


def steps_table(language: str) -> list[str]:
    texts, found = TEXTS[language], figures()
    rows = [texts["steps"], "|---|---|---|---|---|"]
    for row in found["steps"]:
        times = [texts["seconds"].format(row[key]) for key in ("estimate", "published")]
        rows.append(f"| {row['model']} | {row['task']} | {' | '.join(times)} | {row['whole']} |")
    for row in found["decode"]:
        times = [texts["decode"].format(row[key]) for key in ("estimate", "published")]
        rows.append(f"| {row['model']} | {row['task']} | {' | '.join(times)} | – |")
    return rows


def basis(language: str) -> list[str]:
    return [TEXTS[language]["basis"].format(**figures())]


TABLES = {
    "basis": basis,
    "machines": machines_table,
    "models": models_table,
    "examples": examples_table,
    "weights": weights_table,
    "steps": steps_table,
    **{f"nodes {pack.name}": functools.partial(nodes_table, pack.name) for pack in PACKS},
}


# --- pages ------------------------------------------------------------------------------------------------------------

_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, language: str) -> str:
    """``text`` with every table as it should be."""

    def made(match: re.Match) -> str:
        return match.group(1) + "\n".join(TABLES[match.group(2)](language)) + "\n" + match.group(3)

    return _TABLE.sub(made, text)


def main() -> int:
    for name, language in PAGES.items():
        path = REPOSITORY / name
        before = path.read_text(encoding="utf-8")
        after = with_tables(before, language)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote the tables of {name}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from comfyui_tpu.plan.hardware import COMPILER_ENVIRONMENT

    os.environ.update(COMPILER_ENVIRONMENT)
    sys.exit(main())
