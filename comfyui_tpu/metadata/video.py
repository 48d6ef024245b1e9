"""Videos, read by FFmpeg through av: MP4, MOV, WebM, MKV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
from PIL import Image

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.picture import check_pixels, damage_named

_FORMATS = {"mp4": "MP4", "matroska": "Matroska"}  # families: MOV is told as MP4, WebM as Matroska
# Container metadata that describes the container.
_TECHNICAL = {"major_brand", "minor_version", "compatible_brands", "encoder"}


def container_format(head: bytes) -> str | None:
    """FFmpeg's name for the container that starts with these bytes.

    FFmpeg is told the format instead of asked: left to itself it also takes playlists, which name other files, hosts.
    """
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis", b"mif1", b"heic", b"heix", b"hevc", b"msf1"):
        return "mp4"
    return "matroska" if head[:4] == b"\x1a\x45\xdf\xa3" else None


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    with damage_named(path), path.open("rb") as stream:
        with av.open(stream, format=container_format(_head(stream)), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MetadataError(f"{path.name} holds no video stream")
            if container.streams.video[0].codec_context is None:
                raise MetadataError(f"{path.name} cannot be read: its codec is unknown, or the file is damaged")
            yield container


def _head(stream: BinaryIO) -> bytes:
    head = stream.read(16)
    stream.seek(0)
    return head


def read_video(path: Path) -> tuple[dict, dict[str, str]]:
    """(what the file is, its texts by name). Raises MetadataError."""
    with _opened(path) as container:
        texts = {_name(key): value for key, value in container.metadata.items() if key.lower() not in _TECHNICAL}
        return _info(container), texts


def _name(key: str) -> str:
    """Matroska writes all names in capitals."""
    return key.lower() if key.isupper() else key


def _info(container: av.container.InputContainer) -> dict:
    stream = container.streams.video[0]
    seconds = _seconds(container, stream)
    fps = float(stream.average_rate) if stream.average_rate else None
    info = {
        "format": _FORMATS[container.format.name],
        "width": stream.width,
        "height": stream.height,
        "frames": stream.frames or (round(seconds * fps) if seconds and fps else None),
        "fps": fps and round(fps, 3),
        "duration": seconds and round(seconds, 3),
        "codec": stream.codec_context.name,
        "pixel_format": stream.codec_context.pix_fmt,
    }
    if container.streams.audio:
        sound = container.streams.audio[0].codec_context
        info["audio_codec"] = sound.name if sound else "unknown"
    return info


def _seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if container.duration:
        return container.duration / av.time_base
    return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None


def video_frames(path: Path, count: int) -> list[Image.Image]:
    """The first ``count`` frames, all for 0. Raises MetadataError, also where they are more than ``MAX_PIXELS``."""
    frames, pixels = [], 0
    with _opened(path) as container:
        for frame in islice(container.decode(video=0), count or None):
            pixels += frame.width * frame.height
            check_pixels(path, pixels)
            frames.append(frame.to_image())
    if not frames:
        raise MetadataError(f"{path.name} holds no frame that can be decoded")
    return frames
