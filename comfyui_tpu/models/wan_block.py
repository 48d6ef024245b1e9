"""A Wan block whose norms are made in one pass: norm and modulation before each projection, norm and rotary after it.

Traced as it stands, the stock block normalises in float32 in several passes, and XLA then fuses what is left into every
matmul that reads it, which costs those a third of their speed. The arithmetic is the stock block's.
"""

from __future__ import annotations

import functools

import torch

from comfyui_tpu.models.wan_attention import WanAttention
from comfyui_tpu.runtime.bridge import layer_norm_modulate


def prepare_blocks(transformer: torch.nn.Module) -> None:
    """Give a ``WanTransformer3DModel`` this module's blocks and attention processor."""
    transformer.set_attn_processor(WanAttention())
    for block in transformer.blocks:
        block.forward = functools.partial(_forward, block)


def _forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb) -> torch.Tensor:
    """``WanTransformerBlock.forward`` for one modulation a video: ``temb`` ``[B, 6, C]``."""
    modulation = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
    shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation
    normed = layer_norm_modulate(hidden_states, block.norm1, scale, shift)
    attended = block.attn1(normed, None, None, rotary_emb)
    hidden_states = (hidden_states.float() + attended * gate).type_as(hidden_states)
    normed = layer_norm_modulate(hidden_states, block.norm2)
    hidden_states = hidden_states + block.attn2(normed, encoder_hidden_states, None, None)
    normed = layer_norm_modulate(hidden_states, block.norm3, scale_ff, shift_ff)
    return (hidden_states.float() + block.ffn(normed).float() * gate_ff).type_as(hidden_states)
