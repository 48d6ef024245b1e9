"""Causal video autoencoders in chunks: one compiled program per direction, its convolution cache as explicit state.

A causal convolution needs only the last frames of what came before. A clip of any length is therefore one short first
chunk (which has no past and is built differently) followed by equal chunks that all run the same program. The last
chunk is filled up by repeating its last frame; what the filling produces is cut off, and nothing depends on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from comfyui_tpu.runtime import bridge
from comfyui_tpu.runtime.device_module import DeviceModule
from comfyui_tpu.runtime.registry import registry
from comfyui_tpu.runtime.reporting import current_reporter


@dataclass(frozen=True)
class Chunking:
    """One direction of a causal autoencoder.

    Attributes:
        first: method of the first chunk: inputs ``x``; returns ``(y, state)``.
        following: method of every later chunk: inputs ``x``, ``state``; returns ``(y, state)``.
        first_frames: frames (of ``x``) in the first chunk.
        chunk_frames: frames (of ``x``) in each later chunk.
        frames_out: frames of ``y`` made from ``n`` frames of ``x`` in a later chunk.
        stage: for progress, e.g. ``"decoding"``.
    """

    first: str
    following: str
    first_frames: int
    chunk_frames: int
    frames_out: Callable[[int], int]
    stage: str


def run(module: DeviceModule, chunking: Chunking, x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, C, T, H, W]`` (CPU) through all chunks; returns ``[B, C', T', H', W']`` (CPU, float32)."""
    # From the first chunk again if memory runs out: a failed chunk may have consumed the state it was given.
    what = f"{chunking.stage} with the {module.spec.name} of {module.folder.parent.name}"
    return registry().run_with_room(lambda: torch.cat(list(_chunks(module, chunking, x)), dim=2), what)


def _chunks(module: DeviceModule, chunking: Chunking, x: torch.Tensor) -> Iterator[torch.Tensor]:
    reporter = current_reporter()
    rest = x[:, :, chunking.first_frames :]
    total = 1 + math.ceil(rest.shape[2] / chunking.chunk_frames)
    reporter.progress(chunking.stage, 0, total)
    y, state = module.run(chunking.first, {"x": x[:, :, : chunking.first_frames]})
    reporter.progress(chunking.stage, 1, total)
    yield bridge.to_torch(y)
    for index, start in enumerate(range(0, rest.shape[2], chunking.chunk_frames)):
        chunk = rest[:, :, start : start + chunking.chunk_frames]
        frames = chunk.shape[2]
        filled = _fill_up(chunk, chunking.chunk_frames)
        if index == 0:
            state = _steady_state(module, chunking, filled, state)
        y, state = module.run(chunking.following, {"x": filled, "state": state}, donate=("state",))
        reporter.progress(chunking.stage, 2 + index, total)
        yield bridge.to_torch(y)[:, :, : chunking.frames_out(frames)]


def _fill_up(chunk: torch.Tensor, frames: int) -> torch.Tensor:
    missing = frames - chunk.shape[2]
    return chunk if missing == 0 else torch.cat([chunk, chunk[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def _steady_state(module: DeviceModule, chunking: Chunking, x: torch.Tensor, state: Any) -> Any:
    """The state after the first chunk in the shapes it has after every later one.

    After the first chunk some caches are absent or short because there is no past yet. Causal convolutions pad the
    missing past with zeros, so zeros in front are the same thing, and all later chunks can share one program. The
    state may be any pytree of arrays ``[B, C, T, H, W]`` and None.
    """
    _, steady = module.output_shapes(chunking.following, {"x": x, "state": state})
    absent = lambda leaf: leaf is None  # noqa: E731
    return jax.tree.map(functools.partial(_with_zero_past, module), state, steady, is_leaf=absent)


def _with_zero_past(
    module: DeviceModule, cache: jax.Array | None, like: jax.ShapeDtypeStruct | None
) -> jax.Array | None:
    if like is None or (cache is not None and cache.shape == like.shape):
        return cache  # a slot that is never used, or one that is full already
    if module.rehearsal is not None:
        return module.describe(like)
    zeros = jnp.zeros(like.shape, like.dtype)
    filled = zeros if cache is None else zeros.at[:, :, like.shape[2] - cache.shape[2] :].set(cache)
    return jax.device_put(filled, module.activation_sharding(like.shape))
