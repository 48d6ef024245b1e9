"""A small Hugging Face Hub on the loopback interface, as far as ``huggingface_hub`` asks for one."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "1234567890abcdef1234567890abcdef12345678"


class FakeHub:
    """Serves ``repos`` (repo id → path → bytes). ``gated`` lists repos whose files are refused."""

    def __init__(self, repos: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()):
        self.repos, self.gated = repos, gated
        self.requests: list[str] = []
        self.silent = False  # accept connections and never answer
        self.cuts: dict[str, int] = {}  # path → bytes after which the connection breaks, once
        self.tokens: set[str | None] = set()  # what came as Authorization
        self.ranges: list[str] = []  # "PATH bytes=FROM-" of the requests that asked for a part
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{request.command} {request.path}")
        self.tokens.add(request.headers.get("Authorization"))
        if self.silent:
            time.sleep(60)
        status, headers, body = self._route(request.path.partition("?")[0].strip("/").split("/"))
        path = request.path.partition("?")[0]
        if status == 200 and request.command == "GET" and (wanted := request.headers.get("Range")):
            self.ranges.append(f"{path} {wanted}")
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[start:]
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            cut = next((self.cuts.pop(end) for end in list(self.cuts) if path.endswith(end)), None)
            request.wfile.write(body[:cut])
            request.close_connection = cut is not None

    def _route(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        is_api = parts[:2] == ["api", "models"]
        repo_id, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        files = self.repos.get(repo_id)
        if files is None:
            return _error(401, "RepoNotFound", "Invalid username or password.")
        if len(rest) > 1 and rest[1] not in ("main", SHA):
            return _error(404, "RevisionNotFound", "Revision not found")
        if is_api and rest[:1] == ["tree"]:
            return _json([{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in files.items()])
        if is_api:
            siblings = [{"rfilename": path, "size": len(body)} for path, body in files.items()]
            return _json({"id": repo_id, "sha": SHA, "siblings": siblings})
        if repo_id in self.gated:
            return _error(403, "GatedRepo", "Access to model is restricted")
        body = files["/".join(rest[2:])]
        return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": SHA}, body


def _etag(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, b""
