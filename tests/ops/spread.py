"""Functions of spread videos, for tests: run on one device and on several."""

import jax
import numpy as np
import torch
from jax.sharding import Mesh, PartitionSpec

from comfyui_tpu.ops.causal_conv import Rows

# Rows that divide by the devices, rows that leave the last ones half or wholly empty, and one device.
LAYOUTS = [(16, 8), (13, 8), (9, 4), (6, 1)]


def spread(run, video, rows, chips, *weights):
    """``run(rows, video, *weights)`` on ``chips`` devices; what the filled-up rows give is cut off."""
    out = everywhere(run, video, rows, chips, *weights)
    return out[:, : out.shape[1] // (-(-rows // chips) * chips) * rows]


def everywhere(run, video, rows, chips, *weights):
    """All rows that ``run(rows, video, *weights)`` makes on ``chips`` devices."""
    local = -(-rows // chips)
    layout = Rows(rows, local, (("a", 2), ("b", chips // 2)) if chips > 1 else (("a", 1),))
    mesh = Mesh(np.array(jax.devices()[:chips]).reshape([size for _, size in layout.axes]), layout.names)
    # Not zeros: what lies in rows that are none must not count.
    padded = np.pad(video, ((0, 0), (0, local * chips - rows), (0, 0), (0, 0)), constant_values=7.0)
    by_rows = PartitionSpec(None, layout.names)
    body = jax.shard_map(
        lambda x, *w: run(layout, x, *w),
        mesh=mesh,
        in_specs=(by_rows, *[PartitionSpec()] * len(weights)),
        out_specs=by_rows,
        check_vma=False,
    )
    return jax.tree.map(np.asarray, jax.jit(body)(padded, *weights))


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def as_torch(video):
    """``[T, S, U, C]`` → ``[1, C, T, S, U]``."""
    return torch.from_numpy(video).permute(3, 0, 1, 2)[None]


def from_torch(video):
    return video[0].permute(1, 2, 3, 0).numpy()
