"""Latent previews through core's own previewer, so that ``--preview-method`` and preview packs keep working."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.comfy.reporter import Preview

log = logging.getLogger(__name__)


def latent_previewer(latent_format: str) -> Callable[[torch.Tensor], Preview | None]:
    """A function from predicted clean latents in model space to what core's ProgressBar takes (``None``: no preview).

    ``latent_format`` is the name of a class in ``comfy.latent_formats``, for example ``"Wan21"``.
    """
    import comfy.latent_formats
    import comfy.model_management
    import latent_preview
    import torch

    Cancelled = comfy.model_management.InterruptProcessingException
    previewer = None
    try:
        previewer = latent_preview.get_previewer(torch.device("cpu"), getattr(comfy.latent_formats, latent_format)())
    except Exception:
        log.warning("Latent previews are off: core's previewer for %s could not be made", latent_format, exc_info=True)

    def preview(latents: torch.Tensor) -> Preview | None:
        nonlocal previewer
        if previewer is None:
            return None
        try:
            return previewer.decode_latent_to_preview_image("JPEG", latents)
        except Cancelled:
            raise
        except Exception:
            # A preview is a courtesy: hours of sampling must not end because of it.
            log.warning("Latent previews are off for the rest of this run: the previewer failed", exc_info=True)
            previewer = None
            return None

    return preview
