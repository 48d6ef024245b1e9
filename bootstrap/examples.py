"""The examples: which pack each belongs to, and which need no real model.

A workflow lies in examples/, and again in its pack's example_workflows/, where ComfyUI's template browser looks for it:
packs are installed one by one, so that each brings its own. After a change in examples/:

    python -m bootstrap.examples          copies the workflows into the packs

The pictures beside them (NAME.jpg) are drawn by tests/browser/thumbnails.py. Standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .layout import REPO

FOLDER = "example_workflows"
# One that combines packs lies in the pack its result comes from; its note says what else it needs.
PACKS = {
    "cogvideox_t2v_demo": "ComfyUI-CogVideoX-TPU",
    "cogvideox15_5b_720p": "ComfyUI-CogVideoX-TPU",
    "combined_picture_to_video_demo": "ComfyUI-Wan22-I2V-TPU",
    "combined_picture_to_video": "ComfyUI-Wan22-I2V-TPU",
    "combined_video_metadata_demo": "ComfyUI-TPU-Monitor",
    "flux2_demo": "ComfyUI-Flux2-TPU",
    "flux2_edit": "ComfyUI-Flux2-TPU",
    "flux2_text_to_image": "ComfyUI-Flux2-TPU",
    "monitor_metadata": "ComfyUI-TPU-Monitor",
    "wan21_t2v_demo": "ComfyUI-Wan21-TPU",
    "wan21_t2v_1.3b_480p": "ComfyUI-Wan21-TPU",
    "wan21_t2v_14b_720p": "ComfyUI-Wan21-TPU",
    "wan22_i2v_demo": "ComfyUI-Wan22-I2V-TPU",
    "wan22_i2v_a14b": "ComfyUI-Wan22-I2V-TPU",
}
# `setup.py demo --example NAME` runs these: tiny random checkpoints, or no model at all.
DEMOS = tuple(name for name in PACKS if name.endswith("_demo") or name == "monitor_metadata")


def source(name: str) -> Path:
    return REPO / "examples" / (name + ".json")


def copy_in_pack(name: str) -> Path:
    return REPO / "custom_nodes" / PACKS[name] / FOLDER / (name + ".json")


def thumbnail(name: str) -> Path:
    return copy_in_pack(name).with_suffix(".jpg")


def listed() -> str:
    """What a user may choose from."""
    others = ", ".join(name for name in PACKS if name not in DEMOS)
    return (
        f"Examples it can run: {', '.join(DEMOS)}.\n"
        f"With real models, to be opened in ComfyUI (python3 setup.py run): {others}."
    )


def main() -> int:
    for name in PACKS:
        target, text = copy_in_pack(name), source(name).read_bytes()
        if not target.is_file() or target.read_bytes() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
            print(target.relative_to(REPO))
    return 0


if __name__ == "__main__":
    sys.exit(main())
