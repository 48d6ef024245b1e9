"""Pictures that Pillow reads: JPEG, WebP and others. Metadata in EXIF, XMP and comments, and the pixels themselves."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, ImageSequence

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.png import SIGNATURE, pixels_only

# Not every format Pillow knows: EPS, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 2**29  # of all frames together: 6 GiB as float32 RGB
_USER_COMMENT = 0x9286
# As ComfyUI writes WebP: "prompt:{…}" and "workflow:{…}" in tags that mean something else.
_NAMED = re.compile(r"([\w .\-]{1,80}):\s*([{\[].*)", re.DOTALL)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Pillow and av raise whatever their parsers stumble over; it all becomes a MetadataError that names the file."""
    try:
        yield
    except MetadataError:
        raise
    except MemoryError:
        raise MetadataError(f"{path.name} does not fit into memory") from None
    except Image.DecompressionBombError as error:
        raise MetadataError(f"{path.name} has too many pixels: {error}") from None
    except Exception as error:
        raise MetadataError(f"{path.name} cannot be read, it is damaged or cut off: {error}") from None


def open_picture(path: Path) -> Image.Image:
    with path.open("rb") as stream:
        is_png = stream.read(8) == SIGNATURE
    return Image.open(pixels_only(path) if is_png else path, formats=FORMATS)


def read_picture(path: Path) -> tuple[dict, dict[str, str]]:
    """(what the file is, its texts by name). Raises MetadataError."""
    with damage_named(path), open_picture(path) as image:
        info = {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode}
        info["frames"] = getattr(image, "n_frames", 1)
        if image.format == "WEBP":
            info |= timing(info["frames"], webp_seconds(path))
        return info, {**exif_texts(image.getexif()), **_other_texts(image.info)}


def timing(frames: int, seconds: float) -> dict:
    """For fileinfo: the length of an animation, where it has one."""
    if frames < 2 or seconds <= 0:
        return {}
    return {"fps": round(frames / seconds, 3), "duration": round(seconds, 3)}


def webp_seconds(path: Path) -> float:
    """The sum of the frames' durations, without decoding any. Raises MetadataError for a file that is cut off."""
    milliseconds, position, size = 0, 12, path.stat().st_size
    with path.open("rb") as stream:
        while position + 8 <= size:
            stream.seek(position)
            kind, length = struct.unpack("<4sI", stream.read(8))
            if position + 8 + length > size:
                raise MetadataError(f"{path.name} is cut off: its part {kind!r} is longer than the file")
            if kind == b"ANMF":
                milliseconds += int.from_bytes(stream.read(16)[12:15], "little")
            position += 8 + length + length % 2
    return milliseconds / 1000


def exif_texts(exif: Image.Exif) -> dict[str, str]:
    """EXIF entries as texts by name, and what is stored in them as ``name:JSON`` under its own name."""
    entries = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
    texts = {}
    for tag, value in entries.items():
        if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop, ExifTags.IFD.MakerNote):
            continue
        text = _exif_text(tag, value)
        named = _NAMED.fullmatch(text.rstrip("\0"))
        name = named[1] if named else ExifTags.TAGS.get(tag, f"exif {tag:#06x}")
        texts[name.lower() if named and name.lower() in ("prompt", "workflow") else name] = named[2] if named else text
    return texts


def _exif_text(tag: int, value: object) -> str:
    if isinstance(value, bytes) and tag == _USER_COMMENT:
        return _user_comment(value)
    if isinstance(value, bytes):
        return value.decode("utf-8") if _is_text(value) else f"{len(value)} bytes"
    return str(value).rstrip("\0")


def _user_comment(data: bytes) -> str:
    """Eight bytes name the character set."""
    charset, text = data[:8], data[8:]
    if charset == b"UNICODE\0":
        # No byte order is prescribed. Most of what stands here is Latin: the zero bytes tell.
        encoding = "utf-16-be" if text[0::2].count(0) > text[1::2].count(0) else "utf-16-le"
        return text.decode(encoding, "replace").rstrip("\0")
    known = charset in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8))
    return (text if known else data).decode("utf-8", "replace").rstrip("\0")


def _is_text(data: bytes) -> bool:
    try:
        return data.decode("utf-8").rstrip("\0").isprintable()
    except UnicodeDecodeError:
        return False


def _other_texts(info: dict) -> dict[str, str]:
    texts = {}
    for name in ("comment", "xmp"):
        value = info.get(name)
        if value:
            texts[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return texts


def picture_frames(path: Path) -> list[Image.Image]:
    """All frames of the first frame's size, upright, at most ``MAX_PIXELS`` in all. Raises MetadataError."""
    with damage_named(path), open_picture(path) as image:
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        check_pixels(path, image.width * image.height * count)
        frames = []
        for frame in ImageSequence.Iterator(image):
            # copy: the iterator decodes every frame into the same picture.
            upright = ImageOps.exif_transpose(frame.copy())
            if not frames or upright.size == frames[0].size:
                frames.append(upright)
            if len(frames) == count:
                break
        return frames


def check_pixels(path: Path, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise MetadataError(f"{path.name} has {pixels} pixels in all its frames; at most {MAX_PIXELS} are loaded")
