"""The demo's own judgement: is this the video, or the picture, the workflow asked for?"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from bootstrap import demo, server
from bootstrap.console import Console, SetupError

PROMPT = {
    "2": {"inputs": {"prompt": "a fox", "model_id": "wan21-tiny"}},
    "3": {"inputs": {"prompt_embeds": ["2", 0], "height": 48, "width": 64, "num_frames": 17, "model_id": "wan21-tiny"}},
    "4": {"inputs": {"latents": ["3", 0], "model_id": "wan21-tiny"}},
    "5": {"inputs": {"images": ["4", 0], "fps": ["4", 1]}},
    "6": {"inputs": {"video": ["5", 0], "filename_prefix": "video/wan"}},
}


def write_video(path: Path, frames: int, width: int, height: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.full((height, width, 3), index * 5 % 255, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_size_and_frames_are_found_upstream_of_the_saving_node():
    assert demo.asked_for(PROMPT, "6") == (17, 64, 48)


def test_nothing_to_check_against_is_an_error():
    with pytest.raises(SetupError, match="no node before node 5"):
        demo.asked_for({"5": {"inputs": {"fps": 16}}}, "5")


def test_right_video_passes(tmp_path):
    found = demo.measure(write_video(tmp_path / "a.mp4", 17, 64, 48))
    assert found == (17, 64, 48, 16.0)
    demo.compare(found, (17, 64, 48), tmp_path / "a.mp4")


@pytest.mark.parametrize("wrong", [(16, 64, 48), (17, 48, 64), (17, 64, 32)])
def test_wrong_video_fails(tmp_path, wrong):
    video = write_video(tmp_path / "a.mp4", *wrong)
    with pytest.raises(SetupError, match="expected 17 frames of 64 x 48"):
        demo.compare(demo.measure(video), (17, 64, 48), video)


def test_only_videos_count_as_saved(tmp_path):
    outputs = {
        "4": {"text": ["done"], "images": [{"filename": "a.png", "subfolder": "", "type": "temp"}]},
        "6": {"images": [{"filename": "wan_00001_.mp4", "subfolder": "video", "type": "output"}], "animated": [True]},
    }
    assert demo.saved_files(outputs, tmp_path, demo.VIDEO_SUFFIXES) == [("6", tmp_path / "video" / "wan_00001_.mp4")]
    assert demo.saved_files(outputs, tmp_path, demo.PICTURE_SUFFIXES) == []


IMAGE_PROMPT = {
    "3": {"inputs": {"prompt_embeds": ["2", 0], "height": 48, "width": 64, "batch_size": 2}},
    "4": {"inputs": {"latents": ["3", 0], "height": 48, "width": 64}},
    "5": {"inputs": {"images": ["4", 0]}},
}


def save_pictures(folder: Path, *sizes: tuple[int, int]) -> dict:
    """PNGs, and the outputs of a Save Image node that wrote them."""
    (folder / "flux2").mkdir(exist_ok=True)
    entries = []
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / "flux2" / f"{number}.png")
        entries.append({"filename": f"{number}.png", "subfolder": "flux2", "type": "output"})
    return {"5": {"images": entries}}


def test_an_image_demo_ends_with_its_picture(tmp_path, console):
    outputs = save_pictures(tmp_path, (64, 48), (64, 48))
    assert demo.judge(console, IMAGE_PROMPT, outputs, tmp_path) == tmp_path / "flux2" / "1.png"


def test_a_video_counts_before_the_pictures_saved_beside_it(tmp_path, console):
    write_video(tmp_path / "a.mp4", 17, 64, 48)
    video = {"6": {"images": [{"filename": "a.mp4", "subfolder": "", "type": "output"}]}}
    outputs = {**video, **save_pictures(tmp_path, (64, 48))}
    assert demo.judge(console, PROMPT, outputs, tmp_path) == tmp_path / "a.mp4"


@pytest.mark.parametrize(("size", "fits"), [((64, 48), True), ((48, 64), False)])
def test_a_picture_that_was_loaded_is_saved_in_its_own_size(tmp_path, console, size, fits):
    output, loaded = tmp_path / "output", tmp_path / "input"
    output.mkdir()
    loaded.mkdir()
    Image.new("RGB", (64, 48)).save(loaded / "a.png")
    prompt = {
        "4": {"class_type": "LoadImageWithMetadataTPU", "inputs": {"image": "a.png"}},
        "5": {"class_type": "SaveImageWithMetadataTPU", "inputs": {"image": ["4", 0]}},
    }
    outputs = save_pictures(output, size)
    if fits:
        assert demo.judge(console, prompt, outputs, output) == output / "flux2" / "0.png"
    else:
        with pytest.raises(SetupError, match=r"expected 1 pictures of 64 x 48 .* got 1 pictures of 48 x 64"):
            demo.judge(console, prompt, outputs, output)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((64, 48),), "expected 2 pictures of 64 x 48 as the workflow says, got 1 pictures of 64 x 48"),
        (((48, 64), (48, 64)), "got 2 pictures of 48 x 64"),
        (((64, 48), (64, 32)), "expected pictures of one size"),
        ((), "saved no video or picture"),
    ],
)
def test_wrong_pictures_fail(tmp_path, console, sizes, message):
    with pytest.raises(SetupError, match=message):
        demo.judge(console, IMAGE_PROMPT, save_pictures(tmp_path, *sizes), tmp_path)


def test_a_real_models_workflow_is_no_demo():
    assert demo.model_ids(PROMPT) == ["wan21-tiny"]
    with pytest.raises(SetupError, match=r"Wan-AI/Wan2\.1-T2V-14B-Diffusers"):
        demo.model_ids({"1": {"inputs": {"model_id": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}}})


def test_the_pictures_a_workflow_loads_are_drawn_once(tmp_path):
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "3": {"class_type": "PreviewImage", "inputs": {"image": ["1", 0]}},
    }
    assert demo.pictures(prompt) == ["example.png"]
    target = tmp_path / "example.png"
    demo.ensure_picture(Console(), target)
    with Image.open(target) as picture:
        assert (picture.mode, picture.size) == ("RGB", (384, 256))
        assert len(picture.getcolors(2**16)) > 100
    target.write_bytes(b"the user's own")
    demo.ensure_picture(Console(), target)
    assert target.read_bytes() == b"the user's own"


LOG = """\
Import times for custom nodes:
   0.0 seconds: /srv/custom_nodes/websocket_image_save.py
   0.1 seconds (IMPORT FAILED): /srv/demo dir/custom_nodes/ComfyUI-Wan21-TPU

Starting server
"""


def test_failed_import_is_found_in_the_log():
    assert server.failed_imports(LOG) == ["ComfyUI-Wan21-TPU"]
    assert server.failed_imports(LOG.replace(" (IMPORT FAILED)", "")) == []


def fake_comfyui(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / "main.py").write_text(script, encoding="utf-8")
    return folder


def test_server_that_dies_is_reported_at_once_with_its_log(tmp_path):
    comfyui = fake_comfyui(tmp_path / "comfyui", "import sys\nprint('no such device')\nsys.exit(7)\n")
    with server.Server(Path(sys.executable), comfyui, tmp_path / "base", tmp_path / "log.txt") as running:
        with pytest.raises(SetupError, match="exit status 7") as failure:
            running.wait_until_ready([])
    assert "no such device" in str(failure.value)


ANSWERS = """
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
print("0.1 seconds (IMPORT FAILED): /x/ComfyUI-Wan21-TPU", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *_): pass
http.server.HTTPServer((sys.argv[sys.argv.index("--listen") + 1], port), Handler).serve_forever()
"""


def test_failed_import_of_our_pack_stops_the_demo_and_the_server_ends(tmp_path):
    comfyui = fake_comfyui(tmp_path / "comfyui", ANSWERS)
    with server.Server(Path(sys.executable), comfyui, tmp_path / "base", tmp_path / "log.txt") as running:
        with pytest.raises(SetupError, match="could not import ComfyUI-Wan21-TPU"):
            running.wait_until_ready(["ComfyUI-Wan21-TPU"])
        running.wait_until_ready(["another pack"])
        assert running.process.poll() is None
    assert running.process.poll() is not None
    assert running.command[running.command.index("--listen") + 1] == "127.0.0.1"


def test_refused_prompt_is_told_in_a_line_per_node():
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {
            "3": {"class_type": "Wan21TPUSampler", "errors": [{"message": "Bad value", "details": "num_frames 20"}]}
        },
    }
    text = server.refusal(json.dumps(body))
    assert "node 3 (Wan21TPUSampler): Bad value: num_frames 20" in text
    assert server.refusal("<html>") == "<html>"


@pytest.mark.parametrize(("tpu", "environment"), [(False, "cpu"), (True, None)])
def test_cpu_backend_is_named_only_where_there_is_no_tpu(monkeypatch, tpu, environment):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(server, "has_tpu", lambda: tpu)
    assert server.jax_environment().get("JAX_PLATFORMS") == environment
