from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from bootstrap import layout
from bootstrap.console import Console
from bootstrap.layout import Settings
from bootstrap.pythons import Python


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def repo(tmp_path) -> Path:
    """A small checkout: two locked packages, one test tool, one node pack."""
    repo = tmp_path / "repo"
    (repo / "requirements").mkdir(parents=True)
    for name in ("lock-py311.txt", "lock-py312.txt"):
        (repo / "requirements" / name).write_text("# a lock\nsix==1.17.0\ntorch==2.11.0\n", encoding="utf-8")
    (repo / "requirements" / "lock-test.txt").write_text("pytest==9.2.0\n", encoding="utf-8")
    (repo / "requirements" / "lock-torch-cuda.txt").write_text("triton==3.6.0\n", encoding="utf-8")
    (repo / "pyproject.toml").write_text('[project]\nname = "comfyui-tpu"\n', encoding="utf-8")
    make_pack(repo / "custom_nodes" / "ComfyUI-Wan21-TPU")
    return repo


@pytest.fixture
def settings(repo) -> Settings:
    return Settings(repo=repo, venv=repo / ".venv", comfyui=repo / "ComfyUI", yes=True)


@pytest.fixture
def python() -> Python:
    return Python("/nowhere/python", (3, 11, 7), True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches beyond this machine has a bug; this is the only door of the installer's own code."""
    really_open = urllib.request.urlopen

    def guarded(request, *args, **kwargs):
        url = request if isinstance(request, str) else request.full_url
        assert url.startswith("http://127.0.0.1:"), f"a test of the installer tried to open {url}"
        return really_open(request, *args, **kwargs)

    monkeypatch.setattr(urllib.request, "urlopen", guarded)


def make_pack(folder: Path, text: str = "NODES = 1\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(text, encoding="utf-8")
    return folder


def make_comfyui(folder: Path, release: str = layout.COMFYUI_VERSION) -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("", encoding="utf-8")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{release}"\n', encoding="utf-8")
    (folder / "requirements.txt").write_text("comfyui-frontend-package==9.9.9\n", encoding="utf-8")
    return folder


def put_package(venv: Path, name: str, version: str, finished: bool = True, url: str | None = None) -> Path:
    """What an installed package leaves in site-packages."""
    folder = venv / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n", encoding="utf-8")
    if finished:
        (folder / "INSTALLER").write_text("pip\n", encoding="utf-8")
    if url:
        (folder / "direct_url.json").write_text(json.dumps({"url": url}), encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, object]:
    """Every path under `folder` with what it holds: two equal trees mean that nothing was changed."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = ("link", str(path.readlink()))
        else:
            found[str(path)] = (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found
