"""Safetensors checkpoints, checked before they are trusted and read piece by piece.

A component folder holds ``config.json`` and weights: one ``.safetensors`` file, or several shards and an index. Opening
reads and checks every header, so a damaged or incomplete download is found before any device memory is filled. Only
numpy and the standard library are used, and nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from comfyui_tpu.runtime.errors import CheckpointError, TPUError

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
# No real setting is larger: vocabularies have some 260,000 words, contexts a million tokens. Frequencies of rotary
# embeddings ("theta") are not sizes. Modules are built by these numbers: larger ones would fill the host's memory.
MAX_SETTING = 2**21

_STEMS = ("diffusion_pytorch_model", "model")  # what Diffusers and transformers call weight files
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_AGAIN = "Delete that file and download the checkpoint again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` in ``file``, C order, little endian."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of one component folder, checked but not loaded. Reading is thread-safe.

    The files stay open while this object lives, so what was checked is what is read, even if a download replaces them.

    Attributes:
        folder: the component folder.
        tensors: name → :class:`TensorInfo`.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], files: Mapping[Path, _File]):
        self.folder = folder
        self.tensors = MappingProxyType(dict(tensors))
        self._files = dict(files)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Check the weights of a component folder, reading headers only.

        Raises:
            CheckpointError: there are no safetensors weights, a shard is missing, truncated or damaged, or the index
                does not agree with the shards.
        """
        folder = Path(folder)
        shards, weight_map = _find_shards(folder)
        files = {path: _File(path) for path in shards}
        found = {path: _read_header(file) for path, file in files.items()}
        tensors = _merge(found) if weight_map is None else _pick(folder, weight_map, found)
        return cls(folder, tensors, files)

    def read(self, name: str, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Read a tensor, or only ``rows`` of its first axis (step 1); exactly these bytes leave the disk.

        Args:
            out: a C-contiguous array of the result's shape and dtype to read into; a new one is made without it.

        Raises:
            CheckpointError: there is no such tensor, or the file cannot be read or has become shorter.
            ValueError: ``rows`` or ``out`` does not fit the tensor.
        """
        info = self._info(name)
        start, shape = _selection(info, rows)
        if out is None:
            out = np.empty(shape, info.dtype)
        elif out.shape != shape or out.dtype != info.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{name}: expected out to be C-contiguous {info.dtype}{list(shape)}; got {out.dtype}{list(out.shape)}"
                f"{'' if out.flags.c_contiguous else ', not contiguous'}"
            )
        self._files[info.file].read_into(out, info.offset + start)
        return out

    def viewed(self, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
        """The same tensors, some of them seen with an axis as several: the same bytes in the same order.

        Args:
            shapes: name → shape, each of as many elements as the tensor.
        """
        changed = {name: replace(self._info(name), shape=tuple(shape)) for name, shape in shapes.items()}
        return Checkpoint(self.folder, {**self.tensors, **changed}, self._files)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it has {len(self.tensors)} others.")
        return self.tensors[name]


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The settings in a component folder's JSON file ``name``.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise CheckpointError(f"expected a component's settings in {path}; got no such file. {_download_hint(folder)}")
    config = _load_json(path, _File(path).read_all())
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            _check_numbers(path, each, key)
    elif isinstance(value, list):
        for each in value:
            _check_numbers(path, each, name)
    elif type(value) is int and abs(value) > MAX_SETTING and "theta" not in name:
        raise CheckpointError(f"{path}: expected {name!r} to be at most {MAX_SETTING}; got {str(value)[:40]}. {_AGAIN}")


@contextlib.contextmanager
def explained_settings(folder: Path, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn exceptions of ``kinds`` into a CheckpointError: settings in ``folder`` that make no sense.

    For code that builds things by a checkpoint's JSON files, which may hold anything.
    """
    try:
        yield
    except TPUError:
        raise
    except kinds as error:
        raise CheckpointError(
            f"The settings in {folder} cannot be used ({type(error).__name__}: {str(error)[:300]}). The files are "
            "damaged, or they describe another model than this node runs: download the checkpoint again."
        ) from error


class _File:
    """A file opened for positioned reads (not mmap: mapped pages would count as this process's memory)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(
                f"cannot open {path}: {error.strerror}. Check the file and its permissions."
            ) from error
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill the contiguous array ``out`` from byte ``offset``."""
        view = memoryview(out.reshape(-1).view(np.uint8))
        done = 0
        while done < len(view):
            count = self._read_some(view[done:], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ended at byte {offset + done}; expected {len(view) - done} bytes more. It changed "
                    f"while it was being read, or is truncated. {_AGAIN}"
                )
            done += count

    def _read_some(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [view], offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path} at byte {offset}: {error.strerror}.") from error

    def read_all(self) -> bytes:
        return self.read_bytes(0, self.size)

    def read_bytes(self, offset: int, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        self.read_into(buffer, offset)
        return buffer.tobytes()


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and the index (tensor name → file name) if it has one."""
    if not folder.is_dir():
        raise CheckpointError(f"expected a component folder with weights at {folder}; got no such folder.")
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = _read_index(index)
            return [folder / name for name in sorted(set(weight_map.values()))], weight_map
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"], None
        if numbered := sorted(path for path in folder.glob(f"{stem}-*.safetensors") if _SHARD.search(path.name)):
            _check_all_there(numbered)
            return numbered, None
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    expected = f"expected safetensors weights ({' or '.join(f'{stem}.safetensors' for stem in _STEMS)}) in {folder}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if others:
        return f"{expected}; got only {_some(others)}. Rename the variant to use, or download the standard files."
    if pickles:
        return (
            f"{expected}; got only {_some(pickles)}. Pickle files can run any code when they are opened and are never "
            "loaded. Use a checkpoint that offers safetensors, or convert it on a machine you do not mind losing."
        )
    return f"{expected}; got none. {_download_hint(folder)}"


def _download_hint(folder: Path) -> str:
    name = Path(folder).parent.name
    return f"The download of {name} is incomplete, or it is no Diffusers checkpoint. Download it again."


def _check_all_there(numbered: list[Path]) -> None:
    """Shards without an index are only complete if their numbers run from 1 to the total that each name states."""
    numbers = [tuple(map(int, _SHARD.search(path.name).groups())) for path in numbered]
    totals = sorted({total for _, total in numbers})
    missing = sorted(set(range(1, totals[-1] + 1)) - {number for number, _ in numbers})
    if len(totals) > 1 or missing:
        raise CheckpointError(
            f"expected shards 1 to {totals[-1]} in {numbered[0].parent} (there is no index file); got "
            f"{_some([path.name for path in numbered])}. Download the missing files."
        )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _load_json(path, _File(path).read_all()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: expected an object "weight_map"; got {_kind(weight_map)}. {_AGAIN}')
    missing = set()
    for name, shard in weight_map.items():
        if not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{path}: expected the name of a .safetensors file beside it for {name!r}; got {shard!r}. An index "
                f"must not point elsewhere. Do not use this checkpoint unless you trust its source; download it again."
            )
        if not (path.parent / shard).is_file():
            missing.add(shard)
    if missing:
        raise CheckpointError(
            f"{path} names {len(set(weight_map.values()))} shards, but {_some(sorted(missing))} "
            f"{'is' if len(missing) == 1 else 'are'} not in the folder. Download the missing files."
        )
    return weight_map


def _is_plain_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not re.search(r"[/\\\0]", name)


def _read_header(file: _File) -> dict[str, TensorInfo]:
    """The tensors a shard declares, with every claim checked against the others and the file's size."""
    if file.size < 8:
        raise CheckpointError(f"{file.path}: expected a safetensors file; got {file.size} bytes. {_AGAIN}")
    length = int.from_bytes(file.read_bytes(0, 8), "little")
    # The length is checked before memory is taken for it: a damaged file may claim 2^63 bytes.
    if length > MAX_HEADER_BYTES or 8 + length > file.size:
        raise CheckpointError(
            f"{file.path}: expected a header of at most {min(MAX_HEADER_BYTES, file.size - 8)} bytes; it claims "
            f"{length}. The file is damaged or no safetensors file. {_AGAIN}"
        )
    header = _load_json(file.path, file.read_bytes(8, length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file.path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(file, tensors, 8 + length)
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _bad_tensor(path, name, "dtype, shape and two data_offsets", repr(entry)[:200]) from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad_tensor(path, name, f"one of the dtypes {', '.join(DTYPES)}", repr(dtype)[:200])
    if not isinstance(shape, list) or not all(_is_count(n) for n in (*shape, begin, end)):
        raise _bad_tensor(path, name, "whole numbers as shape and offsets", f"{shape!r}, {begin!r}, {end!r}"[:200])
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise _bad_tensor(path, name, f"{nbytes} bytes for {dtype}{shape}", f"{end - begin} bytes")
    return TensorInfo(name, tuple(shape), DTYPES[dtype], path, data_start + begin, nbytes)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # JSON true is no number


def _bad_tensor(path: Path, name: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(f"{path}, tensor {name!r}: expected {expected}; got {got}. {_AGAIN}")


def _check_layout(file: _File, tensors: Mapping[str, TensorInfo], data_start: int) -> None:
    """The tensors must fill the file from the header to its end: no gaps, no overlaps, nothing missing or left over."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            what = "overlaps the one before it" if info.offset < position else "leaves a gap before it"
            raise _bad_tensor(file.path, info.name, f"data from byte {position}", f"{info.offset}: it {what}")
        position += info.nbytes
    if file.size != position:
        what = "truncated" if file.size < position else "longer than it should be"
        raise CheckpointError(f"{file.path} is {what}: expected {position} bytes, got {file.size}. {_AGAIN}")


def _merge(found: Mapping[Path, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for path, tensors in found.items():
        if doubled := sorted(set(merged) & set(tensors)):
            raise CheckpointError(
                f"{path}: tensors {_some(doubled)} are in {merged[doubled[0]].file.name} too. {_AGAIN}"
            )
        merged.update(tensors)
    return merged


def _pick(
    folder: Path, weight_map: Mapping[str, str], found: Mapping[Path, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors the index names, each from the shard it names."""
    absent = sorted(name for name, shard in weight_map.items() if name not in found[folder / shard])
    if absent:
        shard = weight_map[absent[0]]
        raise CheckpointError(
            f"the index in {folder} says that {shard} holds {absent[0]!r}, but it does not ({len(absent)} such "
            "entries). Index and shards are of different downloads: download both again."
        )
    return {name: found[folder / shard][name] for name, shard in weight_map.items()}


def _selection(info: TensorInfo, rows: slice | None) -> tuple[int, tuple[int, ...]]:
    """Byte offset within the tensor and shape of the ``rows`` of a tensor."""
    if rows is None:
        return 0, info.shape
    if not info.shape:
        raise ValueError(f"{info.name}: expected no rows, it is a scalar; got {rows}")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"{info.name}: expected rows with step 1; got {rows}")
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    return start * row_bytes, (max(stop - start, 0), *info.shape[1:])


def _load_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys (a second entry of a name would hide the first)."""
    try:
        content = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON; got something else ({error}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; got {_kind(content)}. {_AGAIN}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _some(names: list[str], limit: int = 5) -> str:
    """A few of ``names``, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
