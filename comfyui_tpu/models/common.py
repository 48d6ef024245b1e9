"""What every family needs: opening a checkpoint once, its scheduler and tokenizer, step reports, the NaN check."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from comfyui_tpu.runtime.checkpoint import explained_settings, read_config
from comfyui_tpu.runtime.device_module import DeviceModule
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, NumericsError
from comfyui_tpu.runtime.plan import Plan

# What settings that make no sense cause. Not RuntimeError: JAX raises it where there is no device.
_BY_SETTINGS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class StepInfo:
    """One finished denoising step.

    Attributes:
        step: 1-based.
        total: number of steps.
        latents: the predicted clean latents in the model's normalised space, what core's previewers take (the noisy
            ones where the scheduler does not keep a prediction).
        expert: which of several transformers worked, for people; empty where there is only one.
    """

    step: int
    total: int
    latents: torch.Tensor
    expert: str = ""


@dataclass(frozen=True)
class Plans:
    """Plans by component; None lets the number of chips decide."""

    text_encoder: Plan | None = None
    transformer: Plan | None = None
    vae: Plan | None = None


DEFAULT_PLANS = Plans()


@dataclass(frozen=True)
class Task:
    """What a user asks of a model, as far as programs depend on it; a video's samplers have these as arguments.

    Attributes:
        height, width: in pixels.
        num_frames: 1 for a picture.
        num_inference_steps: denoising steps.
        guidance_scale: at most 1 runs without the negative branch, where there is one.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


class OpenedModel:
    """A checkpoint whose components are device modules. Opening reads configs and headers; weights load when used.

    Subclasses build their components in ``__init__(folder, devices, plans)`` and list them in :attr:`components`.
    """

    _opened: ClassVar[OrderedDict[tuple, OpenedModel]] = OrderedDict()
    _opened_lock: ClassVar[threading.Lock] = threading.Lock()
    _OPENED_MAX: ClassVar[int] = 8  # modules without weights, a few MB each

    folder: Path
    transformer: DeviceModule

    @property
    def components(self) -> tuple[DeviceModule, ...]:
        raise NotImplementedError

    def rehearse(self, task: Task) -> None:
        """Call every component as one prompt with ``task`` does, with zeros; what it makes is thrown away.

        The planner learns from it which programs run, and how often. No tokenizer is needed, and no weights while the
        components have recorders (``DeviceModule.rehearsal``).
        """
        raise NotImplementedError

    def describe_plan(self) -> str:
        """Which plan runs where, for people."""
        return self.transformer.describe_plan()

    @classmethod
    def open(cls, folder: Path, devices: tuple | None = None) -> Self:
        """The checkpoint in ``folder``; the same object as long as its files and ``devices`` (None: all) do not change.

        The headers of all weight files are checked here, so that a missing or truncated shard of the last component
        is an error before the first one has run.

        Raises:
            CheckpointError: it is not a complete checkpoint of this family in Diffusers layout.
        """
        with explained_settings(folder, _BY_SETTINGS):
            fresh = cls(folder, devices)
        key = (cls, Path(folder).resolve(), *(component.key for component in fresh.components))
        with OpenedModel._opened_lock:
            opened = OpenedModel._opened
            if key not in opened:
                for component in fresh.components:
                    with explained_settings(component.folder, _BY_SETTINGS):
                        component.check_files()
                opened[key] = fresh
            opened.move_to_end(key)
            while len(opened) > cls._OPENED_MAX:
                opened.popitem(last=False)
            return opened[key]


def check_side(name: str, value: int, low: int, high: int, multiple: int) -> None:
    """Raise InvalidInput with both values and the nearest possible one unless ``value`` pixels can be made."""
    if not low <= value <= high or value % multiple:
        raise InvalidInput(
            f"{name} must be a multiple of {multiple} from {low} to {high}; got {value}. "
            f"Nearest: {nearest(value, low, high, multiple)}."
        )


def nearest(value: int, low: int, high: int, step: int, remainder: int = 0) -> int:
    """The number from ``low`` to ``high`` nearest to ``value`` that is ``remainder`` modulo ``step``."""
    return min(max(round((value - remainder) / step) * step + remainder, low), high)


def read_model_index(folder: Path, expected: str, example: str) -> dict[str, Any]:
    """``model_index.json`` of a checkpoint for the pipeline class ``expected``; ``example`` is a repo id that has one.

    Raises:
        CheckpointError: there is none, or it names another pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is no checkpoint in Diffusers layout. Download the whole "
            f"repository (for example {example}) into it."
        )
    index = read_config(folder, "model_index.json")
    found = index.get("_class_name")
    if found != expected:
        raise CheckpointError(
            f"{folder} is a checkpoint for {found}; this node needs one for {expected} (for example {example})."
        )
    return index


def load_scheduler(folder: Path, **changes: Any) -> Any:
    """A fresh scheduler as the checkpoint in ``folder`` ships it, with some of its settings changed."""
    import diffusers

    name = read_config(folder / "scheduler", "scheduler_config.json").get("_class_name", "")
    scheduler = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise CheckpointError(f"{folder / 'scheduler'} names the scheduler {name!r}, which Diffusers does not have.")
    with explained_settings(folder / "scheduler"):
        plain = scheduler.from_pretrained(folder / "scheduler")
        return scheduler.from_config(plain.config, **changes) if changes else plain


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the checkpoint in ``folder``."""
    from transformers import AutoTokenizer

    with explained_tokenizer(folder / "tokenizer"):
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


@contextlib.contextmanager
def explained_tokenizer(folder: Path) -> Iterator[None]:
    """CheckpointError for whatever reading a tokenizer's files raises, which may hold anything."""
    try:
        yield
    except BaseException as error:
        # The tokenizers library reads with Rust, whose panics derive from BaseException: one of them would end the
        # thread that runs all prompts.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded: {type(error).__name__}: {str(error)[:300]}. Download the "
            "checkpoint again."
        ) from error


def clean_latents(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """UniPC keeps its last prediction of the clean latents; other schedulers only the noisy ones."""
    outputs = getattr(scheduler, "model_outputs", None)
    predicts_clean = getattr(scheduler.config, "predict_x0", False)
    return outputs[-1] if predicts_clean and outputs and outputs[-1] is not None else latents


def finite(tensor: torch.Tensor, stage: str) -> torch.Tensor:
    """``tensor``; NumericsError naming ``stage`` if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NumericsError(
            f"The {stage} produced NaN or infinity. Check the checkpoint's files and the inputs (guidance_scale, "
            "embeddings); if they are right, please report it with the workflow."
        )
    return tensor


def video_frames(video: torch.Tensor) -> torch.Tensor:
    """A decoder's ``[B, 3, T, H, W]`` in -1..1 → frames ``[B·T, H, W, 3]`` in 0..1; ``video`` is overwritten.

    Diffusers' VideoProcessor: (x/2 + 0.5) clamped; in place, a 720p clip is close to a gigabyte.
    """
    return video.mul_(0.5).add_(0.5).clamp_(0.0, 1.0).permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous()
