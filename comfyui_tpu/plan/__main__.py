"""``python -m comfyui_tpu.plan``: prepares the process for a compiler without a TPU, then hands over to ``cli``."""

import os
import sys

# Before JAX starts: it must not look for a TPU, and several planners may use the compiler at once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# The compiler otherwise looks for the TPU VM around it, and complains on the terminal that there is none. What is
# compiled for is not decided by these.
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
# Ending compilations that nobody needs any more leaves locks of theirs behind, which Python would point out.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")

from comfyui_tpu.plan.cli import main

if __name__ == "__main__":
    sys.exit(main())
