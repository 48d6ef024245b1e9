"""PNG, read chunk by chunk: size, frames, and texts in every kind of chunk, before and after the pixels.

Own code because Pillow refuses compressed texts above 1 MiB, which a workflow may well be, finds texts after the pixels
only by decoding them, and does not know the ``comf`` chunk of ComfyUI's animated PNGs.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from comfyui_tpu.metadata.errors import MetadataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 64 * 2**20  # of all texts together, uncompressed
MAX_CHUNKS = 1_000_000
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"comf")
_READ = (*TEXTS, b"IHDR", b"acTL", b"fcTL", b"eXIf", b"IEND")
_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}


@dataclass
class PNG:
    width: int = 0
    height: int = 0
    mode: str = ""
    frames: int = 1
    seconds: float = 0.0  # of an animation
    texts: dict[str, str] = field(default_factory=dict)
    exif: bytes = b""


def read_png(path: Path) -> PNG:
    """Raises MetadataError for a file that is cut off or damaged, and for texts beyond ``MAX_TEXT_BYTES``."""
    png, budget = PNG(), MAX_TEXT_BYTES
    with path.open("rb") as stream:
        for kind, data in _chunks(stream):
            try:
                budget -= _take(png, kind, data, budget)
            except (struct.error, zlib.error, ValueError, IndexError) as error:
                if isinstance(error, MetadataError):
                    raise
                raise MetadataError(f"the PNG is damaged: its chunk {kind.decode()} cannot be read: {error}") from None
    if not (png.width and png.height):
        raise MetadataError("the PNG is damaged: it has no size")
    return png


def pixels_only(path: Path) -> io.BytesIO:
    """The PNG without its texts, for Pillow."""
    copy = io.BytesIO()
    copy.write(SIGNATURE)
    with path.open("rb") as stream:
        for kind, start, length in _headers(stream):
            if kind not in TEXTS:
                stream.seek(start - 8)
                copy.write(stream.read(length + 12))
    copy.seek(0)
    return copy


def _headers(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, offset of the data, length of the data) of each chunk up to IEND."""
    size = os.fstat(stream.fileno()).st_size
    if stream.read(8) != SIGNATURE:
        raise MetadataError("expected a PNG, but the file does not start like one")
    position = 8
    for _ in range(MAX_CHUNKS):
        stream.seek(position)
        header = stream.read(8)
        if len(header) < 8:
            raise MetadataError(f"the PNG is cut off after {size} bytes: its last chunk is missing")
        length, kind = struct.unpack(">I4s", header)
        if position + 12 + length > size:
            raise MetadataError(
                f"the PNG is cut off or damaged: its chunk {kind!r} at byte {position} says it has {length} bytes, "
                f"the file ends after {size}"
            )
        yield kind, position + 8, length
        if kind == b"IEND":
            return
        position += 12 + length
    raise MetadataError(f"expected a PNG of at most {MAX_CHUNKS} chunks, this one has more")


def _chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    for kind, start, length in _headers(stream):
        if kind not in _READ:
            continue
        if length > MAX_TEXT_BYTES:
            raise _too_much()
        stream.seek(start)
        data, checksum = stream.read(length), stream.read(4)
        if zlib.crc32(kind + data) != int.from_bytes(checksum, "big"):
            raise MetadataError(f"the PNG is damaged: the checksum of its chunk {kind.decode()} is wrong")
        yield kind, data


def _take(png: PNG, kind: bytes, data: bytes, budget: int) -> int:
    """Put one chunk into ``png``; the bytes of text it held."""
    if kind == b"IHDR":
        png.width, png.height, depth, colour = struct.unpack(">IIBB", data[:10])
        png.mode = _MODES.get(colour, "?") + (";16" if depth == 16 else "")
    elif kind == b"acTL":
        png.frames = struct.unpack(">I", data[:4])[0]
    elif kind == b"fcTL":
        numerator, denominator = struct.unpack(">HH", data[20:24])
        png.seconds += numerator / (denominator or 100)
    elif kind == b"eXIf":
        png.exif = data
    elif kind in TEXTS:
        name, text = _text(kind, data, budget)
        png.texts[name] = text
        return len(text)
    return 0


def _text(kind: bytes, data: bytes, budget: int) -> tuple[str, str]:
    name, rest = data.split(b"\0", 1)
    if kind == b"zTXt":
        rest = _inflate(rest[1:], budget)
    elif kind == b"iTXt":
        compressed, rest = rest[0], rest[2:]
        _language, _translated, rest = rest.split(b"\0", 2)
        rest = _inflate(rest, budget) if compressed else rest
    if len(rest) > budget:
        raise _too_much()
    return _decode(name), _decode(rest)


def _inflate(data: bytes, budget: int) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, budget + 1)
    if len(text) > budget:
        raise _too_much()
    if not inflater.eof:
        raise MetadataError("the PNG is damaged: a compressed text in it is cut off")
    return text


def _too_much() -> MetadataError:
    return MetadataError(f"expected texts of at most {MAX_TEXT_BYTES} bytes in the PNG, got more")


def _decode(data: bytes) -> str:
    """The older chunks are Latin-1 by the standard; programs write UTF-8, which Latin-1 text hardly ever looks like."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
