"""Files in ComfyUI's own folders, and pictures between files and IMAGE tensors."""

from __future__ import annotations

import heapq
import json
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.files import find_file
from comfyui_tpu.metadata.jsontext import load
from comfyui_tpu.metadata.reading import SUFFIXES, Metadata, load_frames, read_metadata
from comfyui_tpu.metadata.writing import save_png

INPUT, OUTPUT, TEMP = "input", "output", "temp"
MAX_JSON_BYTES = 64 * 2**20
# The list goes to the browser with every page load.
MAX_LISTED, MAX_WALKED = 5000, 50_000
NEWEST_OUTPUTS = 100


@dataclass(frozen=True)
class Located:
    """A file in one of ComfyUI's folders, as ``/view`` names it."""

    path: Path
    subfolder: str
    folder_type: str

    def metadata(self) -> Metadata:
        return read_metadata(self.path, self.subfolder, self.folder_type)

    def as_ui(self) -> dict[str, str]:
        return {"filename": self.path.name, "subfolder": self.subfolder, "type": self.folder_type}


def folder(folder_type: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_directory_by_type(folder_type))


def locate(name: str, allowed: tuple[str, ...] = (INPUT, OUTPUT, TEMP)) -> Located:
    """``name`` as widgets hold it: a path in the input folder, or followed by ``[output]``, ``[temp]``, ``[input]``.

    Raises MetadataError for a missing file, a folder that is not ``allowed``, and for every way out of the folder.
    """
    if not isinstance(name, str):
        raise MetadataError(f"expected the name of a file, got {type(name).__name__}")
    folder_type = next((each for each in (INPUT, OUTPUT, TEMP) if name.endswith(f"[{each}]")), None)
    if folder_type is not None:
        name = name.removesuffix(f"[{folder_type}]").rstrip(" ")
    folder_type = folder_type or INPUT
    if folder_type not in allowed:
        raise MetadataError(f"expected a file in ComfyUI's folder {' or '.join(allowed)}, got one in {folder_type}")
    path = find_file(folder(folder_type), name, f"ComfyUI's {folder_type} folder")
    parent = path.parent.relative_to(folder(folder_type).resolve())
    return Located(path, "" if parent == Path() else str(parent), folder_type)


def locate_again(metadata: Metadata) -> Located:
    """The file that ``metadata`` came from. Raises MetadataError if it is gone."""
    info = metadata.fileinfo
    return locate(f"{info['subfolder']}/{info['filename']} [{info['type']}]".removeprefix("/"))


def check(name: str | None, allowed: tuple[str, ...] = (INPUT, OUTPUT, TEMP)) -> bool | str:
    """For ``validate_inputs``: True, or what is wrong. None: the value comes through a link and is not known yet."""
    try:
        return name is None or bool(locate(name, allowed))
    except MetadataError as error:
        return str(error)


def fingerprint(name: str | None, allowed: tuple[str, ...] = (INPUT, OUTPUT, TEMP)) -> str | float:
    """Changes when the file does. None: the value comes through a link and is not known yet; run in any case."""
    if name is None:
        return math.nan
    located = locate(name, allowed)
    stat = located.path.stat()
    return f"{located.path}:{stat.st_size}:{stat.st_mtime_ns}"


def list_media() -> list[str]:
    """Names for a combo: all pictures and videos of the input folder, then the newest of the output folder.

    ComfyUI asks for it several times a run, so it must be quick.
    """
    inputs = sorted(name for name, _ in islice(_media(folder(INPUT)), MAX_LISTED))
    outputs = heapq.nlargest(NEWEST_OUTPUTS, _media(folder(OUTPUT)), key=lambda found: _modified(found[1]))
    return [*inputs, *(f"{name} [{OUTPUT}]" for name, _ in outputs)]


def _media(root: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """(path below ``root``, entry) of each picture and video."""
    return (found for found in islice(_walk(str(root), ""), MAX_WALKED) if found[0].lower().endswith(SUFFIXES))


def _walk(path: str, above: str) -> Iterator[tuple[str, os.DirEntry]]:
    try:
        entries = list(os.scandir(path))
    except OSError:  # gone meanwhile, or not ours to read
        return
    for entry in entries:
        # Hidden files and folders, and the mask editor's scratch pad.
        if entry.name.startswith(".") or entry.name == "clipspace":
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{above}{entry.name}/")
        else:
            yield above + entry.name, entry


def _modified(entry: os.DirEntry) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def read_json_file(name: str) -> object:
    """The value in a JSON file of the input or output folder, UTF-8 with or without a byte order mark."""
    path = locate(name, (INPUT, OUTPUT)).path
    if path.stat().st_size > MAX_JSON_BYTES:
        raise MetadataError(
            f"expected a JSON file of at most {MAX_JSON_BYTES} bytes, {path.name} has {path.stat().st_size}"
        )
    try:
        return load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MetadataError(f"expected JSON in UTF-8, but {path.name} is something else: {error}") from None
    except MetadataError as error:
        raise MetadataError(f"{path.name}: {error}") from None


def load_image(path: Path, video_frames: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE ``[frames, height, width, 3]`` in 0..1 and MASK as core's Load Image gives them: 1 where transparent,
    ``[1, 64, 64]`` of zeros for a picture without transparency."""
    frames = load_frames(path, video_frames)
    images = [torch.from_numpy(np.asarray(_rgb(frame), dtype=np.float32) / 255.0) for frame in frames]
    masks = [_mask(frame) for frame in frames]
    if len({mask.shape for mask in masks}) > 1:  # an animation only some frames of which are transparent
        masks = [mask if mask.shape == images[0].shape[:2] else torch.zeros(images[0].shape[:2]) for mask in masks]
    return torch.stack(images), torch.stack(masks)


def _rgb(frame: Image.Image) -> Image.Image:
    if frame.mode.startswith("I;16"):
        frame = frame.convert("I")
    if frame.mode == "I":
        frame = frame.point(lambda value: value * (1 / 255))
    return frame.convert("RGB")


def _mask(frame: Image.Image) -> torch.Tensor:
    if "A" not in frame.getbands() and not (frame.mode == "P" and "transparency" in frame.info):
        return torch.zeros(64, 64)
    alpha = frame.convert("RGBA").getchannel("A")
    return 1.0 - torch.from_numpy(np.asarray(alpha, dtype=np.float32) / 255.0)


def workflow_texts(prompt: Any, extra_pnginfo: dict | None) -> dict[str, object]:
    """What a browser sends along with a prompt, by the names that ComfyUI looks for in files."""
    found = {"prompt": prompt, **(extra_pnginfo or {})}
    return {name: value for name, value in found.items() if value is not None}


def save_images(
    images: torch.Tensor, prefix: str, texts: dict[str, object], folder_type: str = OUTPUT
) -> list[Located]:
    """One PNG for each of ``[batch, height, width, channels]``, numbered on from those that are there.

    ``texts``: values by name; strings are stored as they are, everything else as JSON.
    """
    import folder_paths

    if images.ndim != 4 or not len(images):
        raise MetadataError(f"expected pictures [at least 1, height, width, channels], got {list(images.shape)}")
    height, width = images.shape[1:3]
    root = folder_paths.get_directory_by_type(folder_type)
    parent, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    texts = {key: value if isinstance(value, str) else json.dumps(load(value)) for key, value in texts.items()}
    saved = []
    for number, image in enumerate(images):
        file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
        save_png(Path(parent, file), to_pil(image), texts, compress_level=1 if folder_type == TEMP else 4)
        saved.append(Located(Path(parent, file), subfolder, folder_type))
    return saved


def save_preview(images: torch.Tensor, texts: dict[str, object]) -> list[Located]:
    """Like ``save_images``, in the temp folder that ComfyUI empties when it starts."""
    return save_images(images, f"TPU_temp_{secrets.token_hex(4)}", texts, TEMP)


def to_pil(image: torch.Tensor) -> Image.Image:
    """``[height, width, channels]`` in 0..1 (values beyond are cut, NaN is black) → picture."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise MetadataError(f"expected pictures [height, width, 1, 3 or 4 channels], got {list(image.shape)}")
    values = np.clip(np.nan_to_num(255.0 * image.detach().float().cpu().numpy()), 0, 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def may_write_metadata() -> bool:
    """False where ComfyUI was started with ``--disable-metadata``."""
    from comfy.cli_args import args

    return not args.disable_metadata
