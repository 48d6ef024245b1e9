"""A checkpoint of a few gigabytes in a second or two, to measure memory and speed of loading."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.checkpoints.raw import entry, write_index

WIDTH = 2560
BLOCK = {"attention": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,)}
SINGLE = {"embedding.weight": (16384, WIDTH), "head.weight": (WIDTH, 8192)}
LARGEST_BYTES = 16384 * WIDTH * 2


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors (bfloat16): ``blocks`` equal blocks of 112.5 MiB each and 120 MiB besides."""
    of_blocks = {f"blocks.{i}.{name}.weight": shape for i in range(blocks) for name, shape in BLOCK.items()}
    return {**of_blocks, **SINGLE}


def write(folder: Path, blocks: int = 17, shards: int = 3) -> Path:
    """Write the weights (2.0 GiB with 17 blocks) as bfloat16 in ``shards`` files with an index; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(WIDTH * 1024).astype(ml_dtypes.bfloat16).tobytes()
    names, weight_map = list(shapes(blocks)), {}
    for number in range(shards):
        part = {name: shapes(blocks)[name] for name in names[number::shards]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        _write_shard(folder / file, part, noise)
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return folder


def _write_shard(path: Path, part: dict[str, tuple[int, ...]], noise: bytes) -> None:
    header, end = {}, 0
    for name, shape in part.items():
        header[name] = entry("BF16", list(shape), end, end + int(np.prod(shape)) * 2)
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])
