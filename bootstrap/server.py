"""A private ComfyUI server on the loopback interface: start it, wait until it answers, stop it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from .console import SetupError, clean_environment, tail
from .doctor import has_tpu
from .layout import LOOPBACK

START_SECONDS = 180.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return listener.getsockname()[1]


def jax_environment() -> dict[str, str]:
    """Settings for JAX: the CPU backend by name where there is no TPU, so that libtpu does not look for one."""
    if os.environ.get("JAX_PLATFORMS") or has_tpu():
        return {}
    return {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}


class Server:
    """Use as a context manager: leaving it ends the process, and only that process."""

    def __init__(
        self,
        python: Path,
        comfyui: Path,
        base: Path,
        log: Path,
        port: int = 0,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.base, self.log, self.port = base, log, port or free_port()
        self.environment = environment or {}
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.command = [str(python), str(comfyui / "main.py"), "--cpu", "--base-directory", str(base)]
        self.command += ["--listen", LOOPBACK, "--port", str(self.port), "--disable-auto-launch"]
        self.command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--preview-method", "auto"]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        for folder in ("custom_nodes", "input", "output", "models", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=str(self.base),
                env=clean_environment(PYTHONUNBUFFERED="1", **jax_environment(), **self.environment),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise SetupError(
                f"ComfyUI ended with exit status {self.process.returncode}; the last lines of its log ({self.log}):\n"
                + tail(self.log)
            )

    def wait_until_ready(self, packs: list[str]) -> None:
        """Until the server answers. Fails at once when it dies, and when one of `packs` was not imported."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check_alive()
            try:
                self.get("/system_stats", timeout=5.0)
                break
            except (OSError, ValueError):
                time.sleep(0.2)
            if time.monotonic() > deadline:
                raise SetupError(
                    f"ComfyUI did not answer at {self.url} within {START_SECONDS:.0f} s; the last lines of its log "
                    f"({self.log}):\n" + tail(self.log)
                )
        text = self.log.read_text(encoding="utf-8", errors="replace")
        failed = [name for name in failed_imports(text) if name in packs]
        if failed:
            names = ", ".join(failed)
            raise SetupError(f"ComfyUI could not import {names}; its log ({self.log}):\n{tail(self.log, 60)}")

    def get(self, path: str, timeout: float = 30.0) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return json.load(response)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60.0) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = refusal(error.read().decode("utf-8", "replace"))
            raise SetupError(f"ComfyUI refused POST {path} with status {error.code}:\n{text}") from error


def refusal(body: str) -> str:
    """What a refused prompt says, a line for each complaint: ComfyUI's answer buries them in tracebacks."""
    try:
        answer = json.loads(body)
        lines = [f"  {answer['error']['message']} {answer['error'].get('details', '')}".rstrip()]
        for node_id, node in (answer.get("node_errors") or {}).items():
            complaints = {f"{each['message']}: {each.get('details', '')}" for each in node["errors"]}
            lines += [f"  node {node_id} ({node['class_type']}): {text}" for text in sorted(complaints)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:2000]
    return "\n".join(lines)


def failed_imports(log: str) -> list[str]:
    """Names of the custom node folders ComfyUI reported as IMPORT FAILED."""
    return [Path(path.strip()).name for path in re.findall(r"\(IMPORT FAILED\):?\s*(\S.*)$", log, re.MULTILINE)]
