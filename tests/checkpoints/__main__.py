"""``python -m tests.checkpoints NAME DEST_FOLDER``: write a tiny checkpoint, print the folder it lies in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.checkpoints import WRITERS, write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=__doc__)
    parser.add_argument("name", choices=sorted(WRITERS), help="which checkpoint")
    parser.add_argument("dest", type=Path, help="folder to write; left alone if it is complete already")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    options = parser.parse_args(arguments)
    try:
        print(write(options.name, options.dest, seed=options.seed))
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
