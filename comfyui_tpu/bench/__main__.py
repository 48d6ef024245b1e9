"""``python -m comfyui_tpu.bench``: ``attention`` compares kernels, ``tune`` looks for our kernel's best tiles.

``run`` measures a model on this machine.
"""

import sys

from comfyui_tpu.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
