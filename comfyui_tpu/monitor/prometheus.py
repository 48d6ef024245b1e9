"""A sample in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from comfyui_tpu.monitor.sample import Sample

Labels = Mapping[str, str]
Values = Iterable[tuple[Labels, float | None]]


def to_text(sample: Sample) -> str:
    """One gauge a figure; what is not available is left out, as Prometheus expects."""
    disks = [({"path": disk.path}, disk) for disk in sample.disks]
    chips = [({"chip": str(chip.index)}, chip) for chip in sample.chips]
    return "".join(
        [
            _gauge("cpu_percent", "CPU in use, percent of all cores", [({}, sample.cpu)]),
            _gauge("ram_used_bytes", "RAM in use", [({}, sample.ram.used)]),
            _gauge("ram_total_bytes", "RAM", [({}, sample.ram.total)]),
            _gauge("disk_used_bytes", "Disk space in use", [(labels, disk.used) for labels, disk in disks]),
            _gauge("disk_total_bytes", "Disk space", [(labels, disk.total) for labels, disk in disks]),
            _gauge("hbm_used_bytes", "HBM in use", [(labels, chip.hbm_used) for labels, chip in chips]),
            _gauge("hbm_total_bytes", "HBM", [(labels, chip.hbm_total) for labels, chip in chips]),
            _gauge(
                "duty_cycle_percent",
                "Time in which the TensorCore was busy, percent",
                [(labels, chip.duty_cycle) for labels, chip in chips],
            ),
            _gauge(
                "tensorcore_utilization_percent",
                "TensorCore utilisation, percent",
                [(labels, chip.tensorcore_utilization) for labels, chip in chips],
            ),
            _gauge(
                "held_bytes",
                "Device memory held by this ComfyUI, by component",
                [({"component": label}, size) for label, size in sample.held.items()],
            ),
        ]
    )


def _gauge(name: str, help_: str, values: Values) -> str:
    lines = [f"comfyui_tpu_{name}{_braces(labels)} {value}\n" for labels, value in values if value is not None]
    if not lines:
        return ""
    return f"# HELP comfyui_tpu_{name} {help_}\n# TYPE comfyui_tpu_{name} gauge\n" + "".join(lines)


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
