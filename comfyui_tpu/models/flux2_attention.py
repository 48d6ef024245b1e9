"""Flux.2's attention and feed-forward in a form that tensor parallelism can split.

The stock blocks fuse projections: one matrix makes queries, keys, values and both halves of the gated feed-forward, one
takes attention and feed-forward together. Cut into one stretch a chip, no chip would have the keys to its queries. So
such a layer says of how many equal units its features consist (``layer.units``), and each chip holds its part of every
unit.
"""

from __future__ import annotations

import math

import torch

from comfyui_tpu.models.attention import attend
from comfyui_tpu.models.rotary import rotate_pairs
from comfyui_tpu.runtime.bridge import norm_rotary, split_inputs, split_outputs


def split_projections(transformer: torch.nn.Module) -> None:
    """Give a ``Flux2Transformer2DModel`` this module's attention processors and feed-forwards."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(JointAttention())
        block.ff, block.ff_context = GatedFeedForward(block.ff), GatedFeedForward(block.ff_context)
    for block in transformer.single_transformer_blocks:
        attention = block.attn
        size = math.gcd(attention.inner_dim, attention.mlp_hidden_dim)
        attention.to_qkv_mlp_proj.units = (0, attention.to_qkv_mlp_proj.out_features // size)
        attention.to_out.units = (1, attention.to_out.in_features // size)
        attention.set_processor(ParallelAttention())


class GatedFeedForward(torch.nn.Module):
    """``Flux2FeedForward`` whose two halves are split alike; parameters have the stock names."""

    def __init__(self, stock: torch.nn.Module):
        super().__init__()
        self.linear_in, self.linear_out = stock.linear_in, stock.linear_out
        self.linear_in.units = (0, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ((gate, linear),) = split_outputs(x, self.linear_in)
        return split_inputs([torch.nn.functional.silu(gate) * linear], self.linear_out)


class JointAttention:
    """Diffusers' attention processor for the double blocks: text and picture attend together, text first."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        texts = encoder_hidden_states.shape[1]
        heads = lambda projected: [x.unflatten(2, (-1, attn.head_dim)) for (x,) in projected]  # noqa: E731
        text = heads(split_outputs(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        picture = heads(split_outputs(hidden_states, attn.to_q, attn.to_k, attn.to_v))
        query = torch.cat([attn.norm_added_q(text[0]), attn.norm_q(picture[0])], dim=1)
        key = torch.cat([attn.norm_added_k(text[1]), attn.norm_k(picture[1])], dim=1)
        tables = [table[None, :, None, :] for table in image_rotary_emb]
        query, key = rotate_pairs(query, *tables), rotate_pairs(key, *tables)
        out = attend(query, key, torch.cat([text[2], picture[2]], dim=1))
        text_out = split_inputs([out[:, :texts]], attn.to_add_out)
        return split_inputs([out[:, texts:]], attn.to_out[0]), text_out


class ParallelAttention:
    """Diffusers' attention processor for the single blocks: attention and feed-forward side by side."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        (units,) = split_outputs(hidden_states, attn.to_qkv_mlp_proj)
        of_each = attn.inner_dim // units[0].shape[2]
        query, key, value = (
            torch.cat(units[first : first + of_each], dim=2) for first in range(0, 3 * of_each, of_each)
        )
        query = norm_rotary(query, attn.norm_q, image_rotary_emb)
        key = norm_rotary(key, attn.norm_k, image_rotary_emb)
        out = attend(*(x.unflatten(2, (attn.heads, -1)) for x in (query, key, value)))
        gates, linears = _halves(units[3 * of_each :])
        gated = [torch.nn.functional.silu(gate) * linear for gate, linear in zip(gates, linears, strict=True)]
        return split_inputs([out, *gated], attn.to_out)


def _halves(units: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return units[: len(units) // 2], units[len(units) // 2 :]
