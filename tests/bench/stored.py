"""The dumps that lie in ``dumps``, and what was compiled for them."""

from pathlib import Path

from comfyui_tpu.bench.kernels import JAX_SPLASH, KERNEL_NAMES, OURS, TOKAMAX_SPLASH, Job, Shape, SplashBlocks
from comfyui_tpu.ops.splash_blocks import Blocks
from comfyui_tpu.plan.bundles import Schedule, read

DUMPS = Path(__file__).parent / "dumps"
SHAPE = Shape(heads=2, queries=500, keys=700, head_dim=128)
JOBS = {
    OURS: Job(OURS, "v6e:1x1", SHAPE, Blocks(256, 256, 128, 128)),
    JAX_SPLASH: Job(JAX_SPLASH, "v6e:1x1", SHAPE, SplashBlocks(128, 128, 128)),
    TOKAMAX_SPLASH: Job(TOKAMAX_SPLASH, "v6e:1x1", SHAPE, SplashBlocks(128, 128, 128)),
}


def schedule(kernel: str) -> Schedule:
    """What the compiler made of the job of that name."""
    return read(DUMPS / kernel, KERNEL_NAMES[kernel])
