"""Files are read as they were written; damaged ones end in a MetadataError, never in anything else."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfyui_tpu.metadata import png as png_module
from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.reading import describe_file, load_frames, read_metadata
from tests.metadata import media

ANIMATED = {"animated.png": (4, 10.0, 0.4), "animated.webp": (4, 8.0, 0.5)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    return {name: write(folder / name) for name, write in media.WRITERS.items()}


@pytest.mark.parametrize("name", media.WRITERS)
def test_prompt_and_workflow_are_found_wherever_programs_put_them(files, name):
    found = read_metadata(files[name])
    assert found.prompt == media.PROMPT
    assert found.workflow == media.WORKFLOW


@pytest.mark.parametrize("name", media.WRITERS)
def test_the_file_itself_is_described(files, name):
    info = read_metadata(files[name], "sub", "output").fileinfo
    assert (info["filename"], info["subfolder"], info["type"]) == (name, "sub", "output")
    assert info["size"] == files[name].stat().st_size
    if name.startswith("video"):
        assert (info["width"], info["height"]) == (32, 16)
        assert (info["frames"], info["fps"], info["duration"]) == (5, 10.0, 0.5)
    elif not name.endswith("mp4"):
        assert (info["width"], info["height"]) == media.SIZE
        assert (info["frames"], info.get("fps"), info.get("duration")) == ANIMATED.get(name, (1, None, None))
    assert name in describe_file(read_metadata(files[name]))


@pytest.mark.parametrize("name", media.WRITERS)
def test_the_frames_are_loaded(files, name):
    frames = load_frames(files[name], 3)
    assert len(frames) == (3 if name.endswith(("mp4", "mkv")) else ANIMATED.get(name, (1,))[0])
    assert len({frame.size for frame in frames}) == 1


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a.tiff", "a.avif"])
def test_other_formats_are_read_too(tmp_path, name):
    media.picture().save(tmp_path / name)
    assert read_metadata(tmp_path / name).fileinfo["width"] == media.SIZE[0]
    assert load_frames(tmp_path / name)[0].size == media.SIZE


def test_of_a_picture_in_several_views_the_first_is_loaded(tmp_path):
    media.picture().save(tmp_path / "a.mpo", save_all=True, append_images=[media.picture(colour=3)])
    assert read_metadata(tmp_path / "a.mpo").fileinfo["format"] == "MPO"
    assert len(load_frames(tmp_path / "a.mpo")) == 1


def test_all_frames_of_a_video_are_loaded_on_request(files):
    reds = [frame.getpixel((16, 8))[0] for frame in load_frames(files["video.mp4"], 0)]
    assert len(reds) == 5
    assert reds == sorted(reds)


def test_other_texts_are_kept_by_name(tmp_path):
    texts = PngInfo()
    texts.add_text("Author", "Bö")
    texts.add_itxt("Title", "日落")
    texts.add_text("settings", '{"a": [1]}')
    texts.add_text("prompt", "a cat")  # not ComfyUI's
    texts.add_text("broken", "{no json")
    utf8 = media.chunk(b"tEXt", "Place\0杭州".encode())
    found = read_metadata(media.png(tmp_path / "a.png", utf8, texts=texts))
    assert found.prompt is None
    assert found.extra == {
        "Place": "杭州",
        "Author": "Bö",
        "Title": "日落",
        "settings": {"a": [1]},
        "prompt": "a cat",
        "broken": "{no json",
    }


def test_exif_is_told_by_name(tmp_path):
    exif = Image.Exif()
    exif[0x0131], exif[0x0112] = "Camera 1.0", 6
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0by hand"
    media.picture().save(tmp_path / "a.jpg", exif=exif)
    found = read_metadata(tmp_path / "a.jpg")
    assert found.extra["Software"] == "Camera 1.0"
    assert found.extra["UserComment"] == "by hand"
    assert load_frames(tmp_path / "a.jpg")[0].size == media.SIZE[::-1]  # turned upright


def test_a_compressed_workflow_of_many_megabytes_is_read_and_its_picture_loaded(tmp_path):
    workflow = '{"nodes": "' + "x" * 5_000_000 + '"}'
    packed = media.chunk(b"zTXt", b"workflow\0\0" + zlib.compress(workflow.encode()))
    path = media.png(tmp_path / "a.png", packed)
    assert len(read_metadata(path).workflow["nodes"]) == 5_000_000
    assert load_frames(path)[0].size == media.SIZE


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_compressed_text_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(png_module, "MAX_TEXT_BYTES", 100_000)
    head = b"bomb\0\0" if kind == b"zTXt" else b"bomb\0\1\0\0\0"
    path = media.png(tmp_path / "a.png", media.chunk(kind, head + zlib.compress(bytes(100_001))))
    with pytest.raises(MetadataError, match="at most 100000 bytes"):
        read_metadata(path)


def test_many_texts_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(png_module, "MAX_TEXT_BYTES", 100_000)
    packed = media.chunk(b"zTXt", b"bomb\0\0" + zlib.compress(b"x" * 40_000))
    assert read_metadata(media.png(tmp_path / "a.png", packed, packed))
    with pytest.raises(MetadataError, match="at most 100000 bytes"):
        read_metadata(media.png(tmp_path / "a.png", packed, packed, packed))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (media.chunk(b"tEXt", b"a\0b", length=0xFFFFFFFF), "says it has 4294967295 bytes"),
        (media.chunk(b"tEXt", b"a\0b", length=2**31 - 1), "cut off or damaged"),
        (media.chunk(b"tEXt", b"a\0b", checksum=1), "checksum of its chunk tEXt is wrong"),
        (media.chunk(b"tEXt", b"no separator"), "tEXt cannot be read"),
        (media.chunk(b"zTXt", b"a\0\0not zlib"), "zTXt cannot be read"),
        (media.chunk(b"zTXt", b"a\0\0" + zlib.compress(b"text" * 99)[:-9]), "cut off"),
        (media.chunk(b"iTXt", b"a\0"), "iTXt cannot be read"),
        (media.chunk(b"IHDR", b"short"), "IHDR cannot be read"),
        (media.chunk(b"IHDR", bytes(13)), "no size"),
    ],
)
def test_a_damaged_chunk_is_named(tmp_path, extra, message):
    with pytest.raises(MetadataError, match=message):
        read_metadata(media.png(tmp_path / "a.png", extra))


def test_a_picture_of_absurd_size_is_not_loaded(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = media.chunk(b"IHDR", header) + media.chunk(b"IDAT", zlib.compress(bytes(100))) + media.chunk(b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(png_module.SIGNATURE + body)
    assert read_metadata(path).fileinfo["width"] == 60_000
    with pytest.raises(MetadataError, match="pixels"):
        load_frames(path)


def test_an_animation_is_measured_with_all_its_frames(files, monkeypatch):
    monkeypatch.setattr("comfyui_tpu.metadata.picture.MAX_PIXELS", 3 * media.SIZE[0] * media.SIZE[1])
    for name in ("animated.png", "animated.webp", "video.mp4"):
        with pytest.raises(MetadataError, match="pixels in all its frames"):
            load_frames(files[name], 0)


def outcome(path: Path) -> str:
    """Any other exception than MetadataError fails the test."""
    results = []
    for step in (read_metadata, load_frames):
        try:
            results.append(str(bool(step(path))))
        except MetadataError:
            results.append("error")
    return "/".join(results)


@pytest.mark.parametrize("name", media.WRITERS)
def test_a_file_cut_off_anywhere_ends_in_a_clear_error_or_in_what_is_left(files, name, tmp_path):
    whole, path = files[name].read_bytes(), tmp_path / name
    outcomes = set()
    for end in [*range(0, 60, 7), *range(60, len(whole) - 1, max(1, len(whole) // 25))]:
        path.write_bytes(whole[:end])
        outcomes.add(outcome(path))
    assert "error/error" in outcomes
    if name.endswith("png"):
        assert outcomes <= {"error/error", "error/True"}  # Pillow does not need the last chunk


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's, of what is damaged
@pytest.mark.parametrize("name", media.WRITERS)
def test_a_file_with_random_damage_ends_in_a_clear_error_or_in_what_can_be_read(files, name, tmp_path, monkeypatch):
    # Damage in a size makes a picture of 100 million black pixels, which would only take time.
    monkeypatch.setattr("comfyui_tpu.metadata.picture.MAX_PIXELS", 10_000_000)
    random_, whole, path = random.Random(name), files[name].read_bytes(), tmp_path / name
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(random_.choice([1, 3, 20])):
            damaged[random_.randrange(len(damaged))] = random_.choice([0, 1, 127, 255, random_.randrange(256)])
        path.write_bytes(damaged)
        outcome(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"#EXTM3U\nfile:///etc/passwd\n", b"%!PS-Adobe-3.0 EPSF", b"\x89PNG"]
)
def test_what_is_no_media_file_is_refused_by_its_content(tmp_path, content):
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MetadataError, match=r"is empty|expected PNG, JPEG"):
            read_metadata(tmp_path / name)


def test_a_playlist_in_the_guise_of_a_video_opens_nothing_else(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(media.mp4(tmp_path / "real.mp4").read_bytes())
    playlist = b"\0\0\0\x08ftyp#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_bytes(playlist)
    assert outcome(tmp_path / "a.mp4") == "error/error"


def test_a_sound_file_is_told_to_hold_no_pictures(tmp_path):
    import av
    import numpy as np

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="flt", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MetadataError, match="no video stream"):
        read_metadata(tmp_path / "a.mp4")
    with pytest.raises(MetadataError, match="no video stream"):
        load_frames(tmp_path / "a.mp4")
