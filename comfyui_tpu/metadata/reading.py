"""The metadata of a media file, whatever its format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.interpret import interpret
from comfyui_tpu.metadata.picture import damage_named, exif_texts, picture_frames, read_picture, timing
from comfyui_tpu.metadata.png import SIGNATURE, read_png
from comfyui_tpu.metadata.video import container_format, read_video, video_frames

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
SUFFIXES = (*PICTURE_SUFFIXES, ".mp4", ".mov", ".m4v", ".webm", ".mkv")
KINDS = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, MP4, MOV, WebM or MKV"
_PICTURES = (b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Metadata:
    """What a file says about itself. All values are plain JSON.

    ``fileinfo``: filename, subfolder and type as ComfyUI's ``/view`` names files, size in bytes, modified (ISO 8601,
    UTC), format, width and height in pixels, frames, and of animations and videos fps and duration in seconds.
    ``extra``: texts that are neither prompt nor workflow, by name.
    """

    fileinfo: dict
    prompt: dict | None = None
    workflow: dict | None = None
    extra: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


PARTS = ("prompt", "workflow", "fileinfo", "extra")


def read_metadata(path: Path, subfolder: str = "", folder_type: str = "input") -> Metadata:
    """Raises MetadataError for a file that is of no known format, damaged or cut off."""
    info, texts = _read(path)
    prompt, workflow, extra = interpret(texts)
    stat = path.stat()
    fileinfo = {
        "filename": path.name,
        "subfolder": subfolder,
        "type": folder_type,
        "size": stat.st_size,
        "modified": datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds"),
    }
    return Metadata({**fileinfo, **info}, prompt, workflow, extra)


def describe_file(metadata: Metadata) -> str:
    """A few lines for people about the file itself."""
    info = metadata.fileinfo
    lines = [
        f"File: {'/'.join(filter(None, (info['subfolder'], info['filename'])))} [{info['type']}]",
        f"Format: {info['format']}",
        f"Resolution: {info['width']} × {info['height']}",
        f"Size: {info['size']:,} bytes",
        f"Date: {info['modified']}",
    ]
    if (info.get("frames") or 1) > 1:
        lines.append(f"Frames: {info['frames']}")
    if info.get("duration"):
        lines.append(f"Duration: {info['duration']:g} s at {info.get('fps') or 0:g} fps")
    held = [name for name in ("prompt", "workflow") if getattr(metadata, name) is not None]
    return "\n".join([*lines, f"Holds: {', '.join([*held, *map(str, metadata.extra)]) or 'no metadata'}"])


def load_frames(path: Path, video_count: int = 1) -> list[Image.Image]:
    """The frames of a picture or an animation, or the first ``video_count`` frames of a video (0: all)."""
    return video_frames(path, video_count) if container_format(_head(path)) else picture_frames(path)


def is_video(path: Path) -> bool:
    return container_format(_head(path)) is not None


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(16)


def _read(path: Path) -> tuple[dict, dict[str, str]]:
    head = _head(path)
    if head.startswith(SIGNATURE):
        return _read_png(path)
    if container_format(head):
        return read_video(path)
    if head.startswith(_PICTURES) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP") or head[4:8] == b"ftyp":
        return read_picture(path)
    if not head:
        raise MetadataError(f"{path.name} is empty")
    raise MetadataError(f"expected {KINDS}, but the content of {path.name} is none of them")


def _read_png(path: Path) -> tuple[dict, dict[str, str]]:
    png = read_png(path)
    info = {"format": "PNG", "width": png.width, "height": png.height, "mode": png.mode, "frames": png.frames}
    info |= timing(png.frames, png.seconds)
    with damage_named(path):
        exif = Image.Exif()
        if png.exif:
            exif.load(png.exif)
        return info, {**exif_texts(exif), **png.texts}
