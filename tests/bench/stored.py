"""The dumps that lie in ``dumps``, and what was compiled for them."""

from pathlib import Path

from comfyui_tpu.bench.kernels import JAX_SPLASH, OURS, Job, Shape, SplashBlocks
from comfyui_tpu.ops.splash_blocks import Blocks

DUMPS = Path(__file__).parent / "dumps"
SHAPE = Shape(heads=2, queries=500, keys=700, head_dim=128)
JOBS = {
    OURS: Job(OURS, "v6e:1x1", SHAPE, Blocks(256, 256, 128, 128)),
    JAX_SPLASH: Job(JAX_SPLASH, "v6e:1x1", SHAPE, SplashBlocks(128, 128, 128)),
}
