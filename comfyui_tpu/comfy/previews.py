"""Latent previews through core's own previewer, so that ``--preview-method`` and preview packs keep working."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from comfyui_tpu.comfy.reporter import Preview

log = logging.getLogger(__name__)


def latent_previewer(latent_format: str) -> Callable[[torch.Tensor], Preview | None]:
    """A function from predicted clean latents in model space to what core's ProgressBar takes (``None``: no preview).

    ``latent_format`` is the name of a class in ``comfy.latent_formats``, for example ``"Wan21"``.
    """
    import comfy.latent_formats
    import latent_preview
    import torch

    return _guarded(
        lambda: latent_preview.get_previewer(torch.device("cpu"), getattr(comfy.latent_formats, latent_format)())
    )


def rgb_previewer(
    rgb_factors: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[torch.Tensor], Preview | None]:
    """The same for a family without a latent format in core.

    ``rgb_factors()`` gives factors ``[channels, 3]`` and bias ``[3]``: latents times factors plus bias is RGB in -1..1.
    """
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    def make() -> latent_preview.LatentPreviewer | None:
        if args.preview_method == LatentPreviewMethod.NoPreviews:
            return None
        return latent_preview.Latent2RGBPreviewer(*(values.tolist() for values in rgb_factors()))

    return _guarded(make)


def _guarded(make: Callable[[], Any]) -> Callable[[torch.Tensor], Preview | None]:
    """Previews by the core previewer that ``make`` returns; off, with a warning in the log, once something fails."""
    from comfy.model_management import InterruptProcessingException as Cancelled

    previewer = None
    try:
        previewer = make()
    except Exception:
        log.warning("Latent previews are off: core's previewer could not be made", exc_info=True)

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
