"""Shows a node's work in ComfyUI: progress bar, latent preview and a line of text on the node; listens for Cancel."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from comfyui_tpu.runtime.reporting import Reporter, reporting

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.models.wan import StepInfo

log = logging.getLogger(__name__)

# Loading reports every tensor: thousands of WebSocket messages a second would only slow the browser down.
MIN_SECONDS_BETWEEN_UPDATES = 0.1

# What core's ProgressBar takes: (image format, PIL image, longest side).
Preview = tuple[str, Any, int]


class NodeReporter(Reporter):
    """Progress of one execution of one node. Built by :func:`node_progress`; the callables are ComfyUI's."""

    def __init__(
        self,
        *,
        show_text: Callable[[str], None],
        update_bar: Callable[[int, int, Preview | None], None],
        raise_if_cancelled: Callable[[], None],
        preview: Callable[[torch.Tensor], Preview | None] = lambda latents: None,
        memory: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show_text = show_text
        self._update_bar = update_bar
        self._raise_if_cancelled = raise_if_cancelled
        self._preview = preview
        self._memory = memory
        self._clock = clock
        self._stage = ""
        self._last_update = float("-inf")
        self._first_step: tuple[int, float] | None = None
        self._expert = ""
        self._seconds_per_step: float | None = None

    def preview_with(self, preview: Callable[[torch.Tensor], Preview | None]) -> None:
        """For previewers that need the opened model: opening it reports already."""
        self._preview = preview

    def check_cancelled(self) -> None:
        self._raise_if_cancelled()

    def message(self, text: str) -> None:
        self.check_cancelled()
        log.info("%s", text)
        self._show_text(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.check_cancelled()
        if stage == self._stage and done < total and not self._is_due():
            return
        self._stage, self._last_update = stage, self._clock()
        self._update_bar(done, total, None)
        self._show_text(f"{stage} {done}/{total}")

    def step(self, info: StepInfo) -> None:
        """One denoising step is done (``on_step`` of the samplers)."""
        self.check_cancelled()
        now = self._clock()
        expert_changed = info.expert != self._expert
        if self._first_step is None or expert_changed:
            # An expert's first step carries loading and compiling (minutes) and would make every ETA absurd.
            self._first_step, self._expert = (info.step, now), info.expert
        elif info.step > self._first_step[0]:
            self._seconds_per_step = (now - self._first_step[1]) / (info.step - self._first_step[0])
        self._update_bar(info.step, info.total, self._preview(info.latents))
        if info.step in (1, info.total) or expert_changed or self._is_due():
            self._last_update = now
            self._show_text(self._step_text(info))

    def sampled(self, num_inference_steps: int, plan: str) -> str:
        """Shows and returns the line that stays on the sampler's node: speed, plan, and what is in memory."""
        speed = "" if self._seconds_per_step is None else f" · {self._seconds_per_step:.3g} s/step"
        memory = self._memory()
        text = f"{num_inference_steps} steps{speed} · {plan}" + (f" · {memory}" if memory else "")
        self.message(text)
        return text

    def _is_due(self) -> bool:
        return self._clock() - self._last_update >= MIN_SECONDS_BETWEEN_UPDATES

    def _step_text(self, info: StepInfo) -> str:
        text = f"step {info.step}/{info.total}" + (f" · {info.expert}" if info.expert else "")
        if self._seconds_per_step is None:
            return text
        eta = _clock_time((info.total - info.step) * self._seconds_per_step)
        return f"{text} · {self._seconds_per_step:.3g} s/step · ETA {eta}"


def _clock_time(seconds: float) -> str:
    """``198.4`` → ``"3:18"``, ``3723`` → ``"1:02:03"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    from comfyui_tpu.runtime.registry import registry  # not at the top: a start of ComfyUI must not import JAX

    return registry().describe()


@contextlib.contextmanager
def node_progress(latent_format: str | None = None) -> Iterator[NodeReporter]:
    """Report what happens inside the ``with`` block to the ComfyUI node that is being executed.

    ``latent_format`` names the class in core's ``comfy.latent_formats`` that previews are made for.
    """
    import comfy.model_management
    import comfy.utils
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    from comfyui_tpu.comfy.previews import latent_previewer

    context = get_executing_context()
    node_id = None if context is None else context.node_id
    server = PromptServer.instance
    # node_id is given explicitly because downloads report from threads that lack core's executing context.
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def show_text(text: str) -> None:
        if node_id is not None:
            server.send_progress_text(text, node_id, sid=server.client_id)

    reporter = NodeReporter(
        show_text=show_text,
        update_bar=bar.update_absolute,
        raise_if_cancelled=comfy.model_management.throw_exception_if_processing_interrupted,
        preview=latent_previewer(latent_format) if latent_format else lambda latents: None,
        memory=_memory,
    )
    reporter.check_cancelled()
    with reporting(reporter):
        yield reporter
