"""Wan's patch embedding as a matrix product, each chip with the patches of its own tokens.

The stock convolution makes every chip embed all patches, and its five axes cost copies where the patches of a row fill
no whole tiles.
"""

from __future__ import annotations

import torch

from comfyui_tpu.runtime.bridge import of_own_tokens


class PatchEmbedding(torch.nn.Module):
    """A ``Conv3d`` whose kernels lie side by side, with the weights and names of ``convolution``."""

    def __init__(self, convolution: torch.nn.Conv3d):
        super().__init__()
        self.weight, self.bias, self.patch = convolution.weight, convolution.bias, convolution.kernel_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, T, H, W]`` → ``[B, inner_dim, tokens, 1, 1]``: the stock forward flattens the last three anyway."""
        x = x.movedim(1, -1)
        for axis, size in zip((1, 3, 5), self.patch, strict=True):
            x = x.unflatten(axis, (-1, size))
        # The columns of a patch and their channels as one axis before anything moves: a short last but one costs tiles.
        tokens = x.flatten(6).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        weight = self.weight.movedim(1, -1).flatten(1)
        return of_own_tokens(tokens, weight, self.bias).transpose(1, 2)[..., None, None]
