"""Choosing among plans by their estimates: what "auto" means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from comfyui_tpu.plan.report import ModelEstimate
from comfyui_tpu.runtime.errors import PlanError

Name = TypeVar("Name")


def choose(estimates: Mapping[Name, ModelEstimate]) -> Name:
    """The plan that fits and is estimated fastest for the whole task.

    A plan whose components all stay resident goes before one that has to load them again and again, which costs more
    than any difference between plans.

    Args:
        estimates: of the same model, task and topology, by plan; the first of equals wins.

    Raises:
        PlanError: none fits; says how much is missing at least.
    """
    fitting = {plan: estimate for plan, estimate in estimates.items() if estimate.fits}
    if not fitting:
        missing = min((estimate.missing_bytes for estimate in estimates.values()), default=0) / 2**30
        raise PlanError(f"No plan fits: at least {missing:.1f} GiB a chip are missing. Use more or larger chips.")
    return min(fitting, key=lambda plan: (not fitting[plan].fits_resident, fitting[plan].seconds_per_task))
