#!/usr/bin/env python3
"""One command from a bare Python to ComfyUI on TPU: `python3 setup.py --help`.

Standard library only. The work is done in bootstrap/; this file has to parse under every Python, however old,
so that a reader of a wrong version gets a sentence and not a SyntaxError. It is not a setuptools build file:
pip builds the package with hatchling, as pyproject.toml says.
"""

import os
import sys

if sys.version_info < (3, 8):
    sys.stderr.write(
        "setup.py needs Python 3.8 or newer to run (and finds or fetches Python 3.11 to 3.13 for ComfyUI itself).\n"
        "This is Python {0}.{1} at {2}.\n"
        "Start it with a newer one, for example: python3 setup.py\n".format(
            sys.version_info[0], sys.version_info[1], sys.executable
        )
    )
    sys.exit(1)

if __name__ == "__main__":
    # --dry-run and doctor promise to leave no trace in the checkout: no __pycache__ either.
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

    from bootstrap.cli import main

    sys.exit(main(sys.argv[1:]))
