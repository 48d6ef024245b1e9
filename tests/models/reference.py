"""How tests compare with the stock Diffusers pipeline on torch CPU, float32 (bounds of the numerics contract)."""

import torch

COMPONENT_BOUND = 2e-5
LATENT_BOUND = 1e-3
FRAME_BOUND = 1 / 255


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute error over the largest absolute value of the reference."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    ours, reference = ours.detach(), reference.detach()
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max())
