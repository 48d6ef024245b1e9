"""Which of a component's plans runs when nobody says: the one that the planner's estimates favour.

``python -m comfyui_tpu.plan MODEL --plans`` estimates every plan for a topology and keeps the name of the best in the
user's cache folder. What this repository's own estimates favour is in ``plan_choices.json`` beside this file. Without
either, a component's first plan is taken.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from comfyui_tpu.ops.splash_blocks import generation_of
from comfyui_tpu.runtime import compile_cache
from comfyui_tpu.runtime.files import write_text
from comfyui_tpu.runtime.plan import Plan

_OURS = Path(__file__).with_name("plan_choices.json")


def chosen(plans: Sequence[Plan], component: str, devices: tuple[jax.Device, ...]) -> Plan:
    """The plan to use for ``component`` (its ``config_class``) on ``devices``; the first where nothing is known."""
    key = _key(component, generation_of(devices[0].device_kind), len(devices))
    for path in (users_file(), _OURS):
        name = _read(path).get(key)
        if (found := next((plan for plan in plans if plan.name == name), None)) is not None:
            return found
    return plans[0]


def keep(component: str, generation: str, devices: int, plan: str) -> None:
    """Remember the best plan's name for this user; OSError if it cannot be written."""
    path = users_file()
    choices = {**_read(path), _key(component, generation, devices): plan}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(path, json.dumps(choices, indent=2, sort_keys=True) + "\n")
    _read_version.cache_clear()


def users_file() -> Path:
    return compile_cache.default_folder().with_name("plan") / "choices.json"


def _key(component: str, generation: str, devices: int) -> str:
    return f"{component} {generation} {devices}"


def _read(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError):
        return _read_version(path, path.stat().st_mtime_ns)
    return {}


@functools.lru_cache(maxsize=4)
def _read_version(path: Path, version: int) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a damaged file of preferences is no reason not to run
    return found if isinstance(found, dict) else {}
