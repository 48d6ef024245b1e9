"""The task that a command line asks for."""

from __future__ import annotations

import argparse
import dataclasses

from comfyui_tpu.models.common import Task


def asked(options: argparse.Namespace, usual: Task) -> Task:
    """``usual`` with what ``--height``, ``--width``, ``--frames``, ``--steps`` and ``--guidance`` say."""
    given = {
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})
