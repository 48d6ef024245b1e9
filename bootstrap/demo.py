"""`setup.py demo`, the part run by the environment's Python: a real ComfyUI server executes one example workflow.

python -m bootstrap.demo --comfyui FOLDER --base FOLDER EXAMPLE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import av
import websocket
from PIL import Image, ImageDraw

from .comfyui import link_packs, packs
from .console import Console, SetupError, clean_environment, quoted, tail
from .layout import LOOPBACK, REPO
from .server import Server
from .workflow import WorkflowError, to_api_prompt

RUN_SECONDS = 420.0
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
PICTURE_SUFFIXES = (".png",)
# Nodes with a file of ComfyUI's input folder.
LOADERS = ("LoadImage", "LoadImageWithMetadataTPU")
# Inputs that say how many frames or pictures a node makes, in our packs and in core.
FRAME_INPUTS = ("num_frames", "length", "batch_size")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bootstrap.demo")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("example", type=Path)
    options = parser.parse_args(arguments)
    # A server must not outlive its demo: let `with` run its exits on SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        made = run(Console(), options.comfyui, options.base, options.example)
    except (SetupError, WorkflowError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(made)
    return 0


def run(console: Console, comfyui: Path, base: Path, example: Path) -> Path:
    workflow = json.loads(example.read_text(encoding="utf-8"))
    custom_nodes = base / "custom_nodes"
    link_packs(console, REPO, custom_nodes)
    with Server(Path(sys.executable), comfyui, base, base / "server.log") as server:
        with console.step(f"start ComfyUI at {server.url} (log: {server.log})"):
            server.wait_until_ready([pack.name for pack in packs(REPO)])
        prompt = to_api_prompt(workflow, server.get("/object_info"))
        for name in model_ids(prompt):
            ensure_checkpoint(console, name, base / "models" / "diffusers" / name, base / "checkpoints.log")
        for name in pictures(prompt):
            ensure_picture(console, base / "input" / name)
        with console.step(f"execute {example.name}"):
            outputs = execute(console, server, prompt, workflow)
        return judge(console, prompt, outputs, base / "output")


def judge(console: Console, prompt: dict, outputs: dict, folder: Path) -> Path:
    """The video the prompt saved, or else its (last) picture, if it is what the workflow asked for."""
    videos, images = (saved_files(outputs, folder, kind) for kind in (VIDEO_SUFFIXES, PICTURE_SUFFIXES))
    if videos:
        node_id, video = videos[-1]
        found = measure(video)
        compare(found, asked_for(prompt, node_id, folder.with_name("input")), video)
        console.say("= {} frames of {} x {}, {:.0f} fps: as the workflow asked".format(*found))
        return video
    if images:
        node_id, picture = images[-1]
        found = measure_pictures([path for node, path in images if node == node_id])
        compare(found, asked_for(prompt, node_id, folder.with_name("input")), picture, "pictures")
        console.say("= {} picture(s) of {} x {}: as the workflow asked".format(*found))
        return picture
    raise SetupError(f"the example ran, but saved no video or picture; its outputs: {json.dumps(outputs)[:1000]}")


def model_ids(prompt: dict) -> list[str]:
    """The checkpoints the prompt's nodes load. A demo makes tiny ones; a Hugging Face repo would be gigabytes."""
    names = sorted({n["inputs"]["model_id"] for n in prompt.values() if isinstance(n["inputs"].get("model_id"), str)})
    real = [name for name in names if "/" in name]
    if real:
        raise SetupError(
            f"this example loads {', '.join(real)} from Hugging Face, so it is no demo.\n"
            f"What to do: start ComfyUI (python3 setup.py run) and open the workflow there."
        )
    return names


def ensure_checkpoint(console: Console, name: str, target: Path, log: Path) -> None:
    """Make the tiny checkpoint `name` with the generator the tests use, unless that has not changed since."""
    sources = sorted(p for p in REPO.glob("tests/checkpoints*/**/*.py")) or sorted(REPO.glob("tests/checkpoints.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    mark = target.with_name(f".{name}.made-by")
    if target.is_dir() and mark.is_file() and mark.read_text().strip() == digest:
        console.fresh(f"checkpoint {target}")
        return
    unfinished = target.with_name(f".{name}.unfinished")
    for folder in (target, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.checkpoints", name, str(unfinished)]
    with console.step(f"make the checkpoint {target} (random weights)"):
        with open(log, "w", encoding="utf-8") as out:
            # JAX_PLATFORMS=cpu: were this to take the TPU, the server could not have it.
            environment = clean_environment(JAX_PLATFORMS="cpu")
            status = subprocess.call(
                command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        if status != 0 or not unfinished.is_dir():
            raise SetupError(f"no checkpoint was made (exit status {status}):\n  {quoted(command)}\n{tail(log)}")
        unfinished.rename(target)
        mark.write_text(digest + "\n")


def pictures(prompt: dict) -> list[str]:
    """The files in ComfyUI's input folder that the prompt's nodes load."""
    found = {n["inputs"].get("image") for n in prompt.values() if n["class_type"] in LOADERS}
    return sorted(name for name in found if isinstance(name, str))


def ensure_picture(console: Console, target: Path) -> None:
    """Draw a small sunset over the sea: the demo's input folder is its own and begins empty."""
    if target.is_file():
        console.fresh(f"picture {target}")
        return
    with console.step(f"draw the picture {target}"):
        dusk = Image.linear_gradient("L").resize((384, 256))
        picture = Image.merge("RGB", (dusk, dusk.point(lambda v: v // 2 + 40), dusk.point(lambda v: 160 - v // 2)))
        pen = ImageDraw.Draw(picture)
        pen.ellipse((232, 88, 296, 152), fill=(255, 230, 150))
        pen.rectangle((0, 176, 384, 256), fill=(20, 30, 70))
        # Renamed when whole: half a picture would be taken for the demo's own next time.
        unfinished = target.with_name(f".{target.name}.unfinished")
        picture.save(unfinished, "PNG")
        unfinished.replace(target)


def execute(console: Console, server: Server, prompt: dict, workflow: dict) -> dict:
    """Queue the prompt, report its progress as it arrives over the WebSocket, and give back its outputs.

    The workflow goes along as from a browser, so that it can be opened from what is saved.
    """
    client = uuid.uuid4().hex
    socket_url = f"ws://{LOOPBACK}:{server.port}/ws?clientId={client}"
    progress = Progress(console, {key: node["_meta"]["title"] for key, node in prompt.items()})
    connection = websocket.create_connection(socket_url, timeout=2.0)
    try:
        # The graph of an example has one list of node errors and no partial results: anything refused is a failure.
        body = {"prompt": prompt, "client_id": client, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        prompt_id = server.post("/prompt", body)["prompt_id"]
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            server.check_alive()
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                continue
            if isinstance(message, bytes):
                continue  # previews and progress texts
            message = json.loads(message)
            data = message.get("data") or {}
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            if message["type"] in ("execution_error", "execution_interrupted"):
                raise SetupError(_node_error(data, server))
            if message["type"] == "execution_success":
                break
            progress.take(message["type"], data)
        else:
            raise SetupError(f"the workflow did not finish within {RUN_SECONDS:.0f} s; its log:\n{tail(server.log)}")
    finally:
        connection.close()
    return _history(server, prompt_id)["outputs"]


def _history(server: Server, prompt_id: str) -> dict:
    # The success message is sent a moment before the history entry is written.
    for _ in range(50):
        entry = server.get(f"/history/{prompt_id}").get(prompt_id)
        if entry:
            return entry
        time.sleep(0.1)
    raise SetupError(f"ComfyUI reported success, but its history has no entry for prompt {prompt_id}")


def _node_error(data: dict, server: Server) -> str:
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    return (
        f"{where} failed: {data.get('exception_type', 'interrupted')}: {data.get('exception_message', '').strip()}\n"
        f"the last lines of the server's log ({server.log}):\n{tail(server.log, 40)}"
    )


class Progress:
    """Prints a line when a node starts and at most one a second while it steps."""

    def __init__(self, console: Console, titles: dict[str, str]) -> None:
        self.console, self.titles = console, titles
        self.began, self.spoke = time.monotonic(), 0.0

    def take(self, kind: str, data: dict) -> None:
        now = time.monotonic()
        title = self.titles.get(str(data.get("display_node") or data.get("node")), "")
        if kind == "executing" and title:
            self._say(now, title)
        elif kind == "progress" and title:
            last = data["value"] >= data["max"]
            if last or now - self.spoke >= 1.0:
                self._say(now, f"{title}: {data['value']:g} of {data['max']:g}")

    def _say(self, now: float, text: str) -> None:
        self.spoke = now
        self.console.note(f"{now - self.began:6.1f} s  {text}")


def saved_files(outputs: dict, folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(node id, file) of everything the prompt's nodes saved under such names; previews are not saved."""
    found = []
    for node_id, output in outputs.items():
        for entries in output.values():
            for entry in entries if isinstance(entries, list) else []:
                if not isinstance(entry, dict) or entry.get("type") == "temp":
                    continue
                if str(entry.get("filename", "")).endswith(suffixes):
                    found.append((node_id, folder / entry.get("subfolder", "") / entry["filename"]))
    return found


def measure(video: Path) -> tuple[int, int, int, float]:
    """(frames, width, height, frames a second), counted by decoding the whole file."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return frames, stream.width, stream.height, float(stream.average_rate or 0)


def measure_pictures(files: list[Path]) -> tuple[int, int, int]:
    """(pictures, width, height), read by decoding all of them; they must have one size."""
    sizes = set()
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            sizes.add(picture.size)
    if len(sizes) != 1:
        raise SetupError(f"expected pictures of one size, got {sorted(sizes)} in {files[0].parent}")
    return len(files), *sizes.pop()


def asked_for(prompt: dict, node_id: str, loaded: Path = Path("input")) -> tuple[int, int, int]:
    """(frames, width, height) of the node the pictures come from: the nearest one upstream that sets all three, or
    that loads a picture from the folder `loaded`.
    """
    queue, seen = [node_id], set()
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        inputs = prompt[current]["inputs"]
        frames = next((inputs[name] for name in FRAME_INPUTS if isinstance(inputs.get(name), int)), None)
        if frames is not None and isinstance(inputs.get("width"), int) and isinstance(inputs.get("height"), int):
            return frames, inputs["width"], inputs["height"]
        if prompt[current].get("class_type") in LOADERS:
            return measure_pictures([loaded / inputs["image"]])
        queue += [value[0] for value in inputs.values() if isinstance(value, list)]
    raise SetupError(f"no node before node {node_id} says how many frames of what size it makes")


def compare(found: tuple, asked: tuple[int, int, int], file: Path, what: str = "frames") -> None:
    if found[:3] != asked:
        raise SetupError(
            "expected {} {what} of {} x {} as the workflow says, got {} {what} of {} x {} in {}".format(
                *asked, *found[:3], file, what=what
            )
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
