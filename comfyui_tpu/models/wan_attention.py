"""Wan's attention without in-place updates.

The stock processor writes the rotated halves of queries and keys into every second element of an empty tensor. That
traces to scatters, which are slow on a TPU, and which XLA's partitioner is known to get wrong along an axis that is
spread unevenly (seen for CogVideoX with jax 0.10.2). Here nothing is written in place.
"""

from __future__ import annotations

from comfyui_tpu.models.attention import attend
from comfyui_tpu.runtime.bridge import norm_rotary

TEXT_TOKENS = 512  # the rest of the context, before the text, is Wan 2.1's image embedding


class WanAttention:
    """Diffusers' attention processor for Wan blocks: self-attention, and cross-attention to text and image."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        picture, context = None, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.add_k_proj is not None:
            picture, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
        split = lambda x: x.unflatten(2, (attn.heads, -1))  # noqa: E731
        query = split(norm_rotary(attn.to_q(hidden_states), attn.norm_q, rotary_emb))
        if rotary_emb is None:
            key = split(attn.norm_k(attn.to_k(context)))  # short, and whole on every chip
        else:
            key = split(norm_rotary(attn.to_k(context), attn.norm_k, rotary_emb))
        value = split(attn.to_v(context))
        out = attend(query, key, value, attention_mask)
        if picture is not None:
            picture_key = split(attn.norm_added_k(attn.add_k_proj(picture)))
            out = out + attend(query, picture_key, split(attn.add_v_proj(picture)))
        return attn.to_out[1](attn.to_out[0](out))
