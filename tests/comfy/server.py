"""A real ComfyUI server in a process of its own, and a client that sees what a browser sees."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import websocket
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS, RUN_SECONDS = 120, 240

# Binary WebSocket messages of ComfyUI (protocol.py)
PREVIEW_IMAGE, TEXT = 1, 3


class Refused(Exception):
    """``POST /prompt`` answered 400. ``body`` is the answer."""

    def __init__(self, body: dict):
        super().__init__(json.dumps(body))
        self.body = body


@dataclass
class Run:
    """All that one prompt sent to the browser."""

    prompt_id: str
    events: list[tuple[str, dict]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # (node id, text)
    previews: list[Image.Image] = field(default_factory=list)
    outputs: dict = field(default_factory=dict)

    def of(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    def texts_of(self, node_id: str) -> list[str]:
        return [text for node, text in self.texts if node == node_id]

    @property
    def error(self) -> dict | None:
        return next(iter(self.of("execution_error")), None)

    @property
    def succeeded(self) -> bool:
        return bool(self.of("execution_success"))

    @property
    def why(self) -> str:
        """For a failing assertion: what went wrong where."""
        error = self.error
        if error is None:
            return f"no error; the events were {[name for name, _ in self.events]}"
        return f"{error['node_type']}: {error['exception_message']}\n{''.join(error['traceback'])}"


class ComfyServer:
    """``with ComfyServer(checkout, base) as server``: started, answering, and stopped in the end."""

    def __init__(
        self, checkout: Path, base: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ):
        self.checkout, self.base = checkout, base
        self.arguments, self.environment = arguments, environment or {}
        self.log_path = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        command = [sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
        command += self.arguments
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        environment |= self.environment
        # The demo's user has one CPU device; plans over eight are tested elsewhere.
        environment.pop("XLA_FLAGS", None)
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=self.checkout, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """SIGKILL: the process gets no chance to tidy up."""
        self._process.kill()
        self._process.wait()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self._process.returncode}:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log()[-4000:]}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self._process.poll() is None and "system" in self.get("/system_stats")

    def get(self, path: str) -> dict:
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def release(self, seconds: float = 15, free_memory: bool = True) -> float:
        """Unload all models before the next prompt: the worker, free, may take up a prompt before it unloads.

        Args:
            seconds: how long to wait at most, which is what it takes where nothing is held.
            free_memory: empty the cache of nodes' results too, so that the same prompt runs again.

        Returns:
            MiB of device memory that were released; 0 where none were in time.
        """
        before, deadline = len(self.log()), time.monotonic() + seconds
        self.post("/free", {"unload_models": True, "free_memory": free_memory})
        while time.monotonic() < deadline:
            if released := re.search(r"Released ([\d.]+) MiB of device memory", self.log()[before:]):
                return float(released[1])
            time.sleep(0.1)
        return 0.0

    def post(self, path: str, body: dict) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def upload(self, name: str, picture: Image.Image) -> str:
        """Put ``picture`` into the input folder as a browser does; the name Load Image knows it by."""
        boundary, png = uuid.uuid4().hex, io.BytesIO()
        picture.save(png, "PNG")
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"{{}}\r\n\r\n'
        body = part.format("overwrite", "").encode() + b"true\r\n"
        body += part.format("image", f'; filename="{name}"\r\nContent-Type: image/png').encode() + png.getvalue()
        request = urllib.request.Request(
            self.url + "/upload/image",
            body + f"\r\n--{boundary}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["name"]

    def run(
        self, prompt: dict, on_event: Callable[[Run], None] = lambda run: None, workflow: dict | None = None
    ) -> Run:
        """Queue ``prompt`` and watch it to its end. ``on_event`` is called after each message. Raises Refused.

        ``workflow``: what a browser would send along, to be saved in files' metadata.
        """
        client_id = uuid.uuid4().hex
        connection = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=RUN_SECONDS
        )
        try:
            run = Run(self._queue(prompt, client_id, workflow))
            while not self._receive(connection, run):
                on_event(run)
        finally:
            connection.close()
        run.outputs = self.get(f"/history/{run.prompt_id}")[run.prompt_id]["outputs"]
        return run

    def _queue(self, prompt: dict, client_id: str, workflow: dict | None) -> str:
        extra = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        try:
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "client_id": client_id, **extra}))
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)) from None
        return answer["prompt_id"]

    def _receive(self, connection: websocket.WebSocket, run: Run) -> bool:
        """One message; whether it was the last of this run."""
        message = connection.recv()
        if isinstance(message, bytes):
            kind, length = struct.unpack(">II", message[:8])
            if kind == TEXT:
                run.texts.append((message[8 : 8 + length].decode(), message[8 + length :].decode()))
            elif kind == PREVIEW_IMAGE:
                run.previews.append(Image.open(io.BytesIO(message[8:])))
            return False
        message = json.loads(message)
        run.events.append((message["type"], message["data"]))
        return message["type"] == "executing" and message["data"]["node"] is None
