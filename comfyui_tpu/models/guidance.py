"""Both branches of classifier-free guidance in one call of the transformer.

Stock pipelines that call the transformer twice a step, first for the prompt and then for the negative prompt, leave
half of a mesh nothing to share but tokens. Where the plan splits a batch, the first call computes both, each on its
part of the chips, and the second call finds its result waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Waiting:
    """A computed result, and the call it belongs to."""

    hidden_states: torch.Tensor
    timestep: torch.Tensor
    result: torch.Tensor


class Branches:
    """The two branches of one run.

    Args:
        negative: embeddings ``[B, tokens, text_dim]`` that the pipeline will pass in the second call of each step.
    """

    def __init__(self, negative: torch.Tensor):
        self._negative = negative
        self._waiting: _Waiting | None = None

    def waiting(self, hidden_states, timestep, embeds) -> torch.Tensor | None:
        """The result of this call if the last one computed it as its second branch."""
        found, self._waiting = self._waiting, None
        fits = found is not None and hidden_states is found.hidden_states and torch.equal(timestep, found.timestep)
        return found.result if fits and torch.equal(embeds, self._cast(embeds)) else None

    def joined(self, embeds: torch.Tensor) -> torch.Tensor | None:
        """``embeds`` with the negative ones after them; None if those are of another shape."""
        negative = self._cast(embeds)
        return torch.cat([embeds, negative]) if negative.shape == embeds.shape else None

    def keep(self, hidden_states: torch.Tensor, timestep: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        """The first branch of a result for both; the second one waits for its call."""
        first, second = both.chunk(2)
        self._waiting = _Waiting(hidden_states, timestep, second)
        return first

    def _cast(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._negative.to(embeds.dtype)
