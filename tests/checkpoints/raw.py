"""Safetensors files written byte by byte, so that a test can also write what no library would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPE_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    """One tensor's entry in a header; the offsets count from the end of the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """A correct header for ``tensors`` lying one after the other."""
    header, begin = {}, 0
    for name, array in tensors.items():
        header[name] = entry(DTYPE_NAMES[array.dtype], list(array.shape), begin, begin + array.nbytes)
        begin += array.nbytes
    return header


def write_raw(path: Path, header: dict | bytes, data: bytes = b"", header_length: int | None = None) -> Path:
    """Write a file from any header (JSON data or bytes), any data and, if given, a wrong header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_length is None else header_length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a correct file."""
    return write_raw(path, header_of(tensors), b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values()))


def write_sharded(folder: Path, tensors: Mapping[str, np.ndarray], shards: int, stem: str = "model") -> Path:
    """Write correct shards with an index; tensor i goes to shard i modulo ``shards``. Returns the index file."""
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_file(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    return write_index(folder, weight_map, stem)


def write_index(folder: Path, weight_map: dict, stem: str = "model") -> Path:
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
