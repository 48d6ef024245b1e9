"""``python -m comfyui_tpu.plan``: prepares the process for a compiler without a TPU, then hands over to ``cli``."""

import os
import sys

from comfyui_tpu.plan.hardware import COMPILER_ENVIRONMENT

# Before JAX starts, which the import of ``cli`` does.
os.environ.update({**COMPILER_ENVIRONMENT, **os.environ, "JAX_PLATFORMS": "cpu"})
# Ending compilations that nobody needs any more leaves locks of theirs behind, which Python would point out.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")

from comfyui_tpu.plan.cli import main

if __name__ == "__main__":
    sys.exit(main())
