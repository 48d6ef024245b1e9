"""Plans that several families admit; each takes the number of chips and the component's config."""

from __future__ import annotations

from comfyui_tpu.runtime.plan import Plan, guided, spatial, spread, tensor


def of_t5(chips: int, config: dict) -> tuple[Plan, ...]:
    """T5 and UMT5 text encoders."""
    return (tensor(chips, r"\.(q|k|v|wi_0|wi_1)\.", r"\.(o|wo)\."),)


def of_video_transformer(chips: int, config: dict) -> tuple[Plan, ...]:
    """Transformers of videos, which have many tokens and two branches of guidance."""
    return (spread(chips),) if chips % 2 else (guided(chips), spread(chips))


def of_autoencoder(chips: int, config: dict) -> tuple[Plan, ...]:
    return (spatial(chips),)
