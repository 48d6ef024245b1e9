"""Media files with metadata, as ComfyUI and other programs write them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import av
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PROMPT = {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": None}}}
WORKFLOW = {"nodes": [{"id": 3, "type": "KSampler"}], "links": [], "note": "日落 é"}
PROMPT_TEXT = '{"3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": NaN}}}'  # NaN as ComfyUI writes it
WORKFLOW_TEXT = json.dumps(WORKFLOW)
SIZE = (20, 12)


def picture(mode: str = "RGB", colour: object = 128) -> Image.Image:
    image = Image.new(mode, SIZE, colour)
    image.putpixel((0, 0), 0)
    return image


def chunk(kind: bytes, data: bytes, length: int | None = None, checksum: int | None = None) -> bytes:
    """A PNG chunk, with a wrong length or checksum where one is given."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", checksum)


def png(path: Path, *extra: bytes, texts: PngInfo | None = None, at_end: bool = False) -> Path:
    """A PNG with more chunks before the pixels or after them."""
    picture().save(path, pnginfo=texts)
    data = path.read_bytes()
    place = len(data) - 12 if at_end else 8 + 25
    path.write_bytes(data[:place] + b"".join(extra) + data[place:])
    return path


def png_texts(path: Path) -> Path:
    """As Save Image writes them."""
    texts = PngInfo()
    texts.add_text("prompt", PROMPT_TEXT)
    texts.add_text("workflow", WORKFLOW_TEXT)
    return png(path, texts=texts)


def png_compressed(path: Path) -> Path:
    texts = PngInfo()
    texts.add_text("prompt", PROMPT_TEXT, zip=True)
    texts.add_itxt("workflow", json.dumps(WORKFLOW, ensure_ascii=False), zip=True)
    return png(path, texts=texts)


def png_international(path: Path) -> Path:
    texts = PngInfo()
    texts.add_itxt("prompt", PROMPT_TEXT, lang="en", tkey="Prompt")
    texts.add_itxt("workflow", json.dumps(WORKFLOW, ensure_ascii=False))
    return png(path, texts=texts)


def png_texts_at_the_end(path: Path) -> Path:
    chunks = [chunk(b"tEXt", f"{name}\0{text}".encode()) for name, text in _both()]
    return png(path, *chunks, at_end=True)


def png_animated(path: Path) -> Path:
    """As Save Animated PNG writes them: four frames of 100 ms."""
    info = PngInfo()
    for name, text in _both():
        info.add(b"comf", f"{name}\0{text}".encode("latin-1"), after_idat=True)
    frames = [picture(colour=i * 50) for i in range(4)]
    frames[0].save(path, pnginfo=info, save_all=True, append_images=frames[1:], duration=100)
    return path


def exif_of_core(image: Image.Image) -> Image.Exif:
    """As ComfyUI's WebP nodes store them: in the tags Model and Make."""
    exif = image.getexif()
    exif[0x0110], exif[0x010F] = f"prompt:{PROMPT_TEXT}", f"workflow:{WORKFLOW_TEXT}"
    return exif


def webp_animated(path: Path) -> Path:
    """As Save Animated WEBP writes them: four frames of 125 ms."""
    frames = [picture(colour=i * 50) for i in range(4)]
    exif = exif_of_core(frames[0])
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, lossless=True, exif=exif)
    return path


def webp_still(path: Path) -> Path:
    picture().save(path, exif=exif_of_core(picture()))
    return path


def jpeg_exif(path: Path) -> Path:
    picture().save(path, exif=exif_of_core(picture()))
    return path


def jpeg_user_comment(path: Path) -> Path:
    exif = Image.Exif()
    both = json.dumps({"prompt": PROMPT_TEXT, "workflow": WORKFLOW}, ensure_ascii=False)
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + both.encode("utf-16-be")
    picture().save(path, exif=exif)
    return path


def jpeg_xmp(path: Path) -> Path:
    def escape(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")

    xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description comfy:prompt="{escape(PROMPT_TEXT)}">
    <comfy:workflow>{escape(WORKFLOW_TEXT)}</comfy:workflow></rdf:Description></rdf:RDF></x:xmpmeta>"""
    picture().save(path, xmp=xmp.encode())
    return path


def jpeg_comment(path: Path) -> Path:
    picture().save(path, comment=json.dumps({"prompt": json.loads(PROMPT_TEXT), "workflow": WORKFLOW}))
    return path


def video(path: Path, metadata: dict[str, str], codec: str = "h264", **options: str) -> Path:
    """Five frames at 10 fps."""
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(5):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 16), (i * 50, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def mp4(path: Path) -> Path:
    """As Save Video writes them."""
    return video(path, dict(_both()), movflags="use_metadata_tags")


def mkv(path: Path) -> Path:
    return video(path, dict(_both()))


def mp4_comment(path: Path) -> Path:
    """One comment with both, as Video Helper Suite stores them."""
    return video(path, {"comment": json.dumps({"prompt": PROMPT_TEXT, "workflow": WORKFLOW})})


def _both() -> list[tuple[str, str]]:
    return [("prompt", PROMPT_TEXT), ("workflow", WORKFLOW_TEXT)]


# File name, and what writes it.
WRITERS = {
    "texts.png": png_texts,
    "compressed.png": png_compressed,
    "international.png": png_international,
    "end.png": png_texts_at_the_end,
    "animated.png": png_animated,
    "still.webp": webp_still,
    "animated.webp": webp_animated,
    "exif.jpg": jpeg_exif,
    "user_comment.jpg": jpeg_user_comment,
    "xmp.jpg": jpeg_xmp,
    "comment.jpg": jpeg_comment,
    "video.mp4": mp4,
    "comment.mp4": mp4_comment,
    "video.mkv": mkv,
}
