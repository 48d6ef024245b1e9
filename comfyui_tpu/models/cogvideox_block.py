"""A CogVideoX block in which text and video stay apart: only attention sees both.

The stock block joins them for attention and again for the feed-forward. Over several chips tokens that were split
evenly lie elsewhere in the joined array, so joining and cutting moves all of a video's activations four times a block.
Norms are made in one pass, with their modulation or rotary embedding. The arithmetic is the stock block's.
"""

from __future__ import annotations

import functools

import torch

from comfyui_tpu.runtime.bridge import attend_jointly, layer_norm_modulate, norm_rotary


def prepare_blocks(transformer: torch.nn.Module) -> None:
    """Give a ``CogVideoXTransformer3DModel`` this module's blocks."""
    for block in transformer.transformer_blocks:
        block.forward = functools.partial(_forward, block)


def _forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
    """``CogVideoXBlock.forward``; ``hidden_states`` are the video's, the rotary tables cover the video alone."""
    both = (hidden_states, encoder_hidden_states)
    normed, gates = _modulated(block.norm1, both, temb)
    attended = _attended(block.attn1, normed, (image_rotary_emb, None))
    both = [x + gate * out for x, gate, out in zip(both, gates, attended, strict=True)]
    normed, gates = _modulated(block.norm2, both, temb)
    return tuple(x + gate * block.ff(each) for x, gate, each in zip(both, gates, normed, strict=True))


def _modulated(norm, both, temb):
    """``CogVideoXLayerNormZero.forward``: video and text normed and modulated, and gates for what follows."""
    shift, scale, gate, *of_text = norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=2)
    text_shift, text_scale, text_gate = of_text
    video = layer_norm_modulate(both[0], norm.norm, scale, shift)
    return (video, layer_norm_modulate(both[1], norm.norm, text_scale, text_shift)), (gate, text_gate)


def _attended(attn, both, rotary):
    """``CogVideoXAttnProcessor2_0``, but that nothing is written in place.

    The stock one rotates the video's part of queries and keys so. Traced over 8 chips, with tokens that do not divide
    by 8, that gave outputs 3 % off (jax 0.10.2, CPU; over 1 and 2 chips they were right).
    """
    parts = []
    for x, tables in zip(both, rotary, strict=True):
        query = norm_rotary(attn.to_q(x), attn.norm_q, tables)
        key = norm_rotary(attn.to_k(x), attn.norm_k, tables)
        parts.append([y.unflatten(2, (attn.heads, -1)) for y in (query, key, attn.to_v(x))])
    return [attn.to_out[0](out.flatten(2)) for out in attend_jointly(parts)]
