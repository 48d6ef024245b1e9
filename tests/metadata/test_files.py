"""Which files are found, and how they are written."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.files import find_file
from comfyui_tpu.metadata.writing import OTHER, check_reserved, extra_texts, save_png


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a file, a subfolder, and links that lead within it and out of it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root-not").mkdir()
    (tmp_path / "root-not" / "a").write_text("secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "sub/b", "..c", "d e"):
        (root / name).write_text("ours")
    (root / "inside").symlink_to("sub/b")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("name", ["a", "sub/b", "./a", "sub//b", "..c", "d e", "inside"])
def test_files_in_the_folder_are_found(root, name):
    assert find_file(root, name).read_text() == "ours"


def test_the_folder_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert find_file(tmp_path / "link", "a").read_text() == "ours"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected the name of a file"),
        (" ", "expected the name of a file"),
        ("a\0", "expected the name of a file"),
        ("../secret", "neither absolute paths nor"),
        ("sub/../../secret", "neither absolute paths nor"),
        ("/etc/passwd", "neither absolute paths nor"),
        ("C:\\secret", "neither absolute paths nor"),
        ("..\\secret", "neither absolute paths nor"),
        ("out", "a link to a place outside"),
        ("up/secret", "a link to a place outside"),
        ("up/root-not/a", "a link to a place outside"),
        ("loop", "cannot be looked up"),
        ("x" * 5000, "cannot be looked up"),
        ("nothing", "there is no file"),
        ("sub", "there is no file"),
        ("pipe", "there is no file"),
        ("\ud800", "there is no file|cannot be looked up"),
    ],
)
def test_everything_else_is_refused_with_its_reason(root, name, message):
    with pytest.raises(MetadataError, match=message):
        find_file(root, name, "the folder")


def test_no_name_leads_out_of_the_folder(root):
    random_ = random.Random(0)
    parts = [
        "..",
        ".",
        "a",
        "sub",
        "b",
        "up",
        "out",
        "root",
        "secret",
        "",
        "~",
        "%2e%2e",
        "..\\",
        "\0",
        "inside",
        "root-not",
    ]
    found = 0
    for _ in range(5000):
        name = "/".join(random_.choices(parts, k=random_.randrange(1, 6)))
        try:
            path = find_file(root, name)
        except MetadataError:
            continue
        found += 1
        assert path.read_text() == "ours"
        assert path.is_relative_to(root.resolve())
    assert found > 50


def test_a_picture_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, Image.new("RGB", (2, 2)), {"Author": "李"})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        assert path.read_bytes() == before
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, Image.new("RGB", (4, 4)), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_picture_may_be_read_by_whoever_may_read_other_files(tmp_path):
    (tmp_path / "usual").write_text("")
    save_png(tmp_path / "a.png", Image.new("RGB", (2, 2)), {})
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_names_that_png_does_not_allow_are_kept_together():
    texts = extra_texts('{"Author": "A", "作者": "李", "": 1, "%s": 2, "n": NaN}' % ("x" * 80))
    assert texts == {"Author": "A", "n": None, OTHER: {"作者": "李", "": 1, "x" * 80: 2}}
    assert extra_texts("  ") == {}


@pytest.mark.parametrize("text", ["[1]", "word", "3", "null"])
def test_extra_metadata_that_is_no_object_is_refused(text):
    with pytest.raises(MetadataError, match="expected"):
        extra_texts(text)


def test_extra_metadata_does_not_replace_the_workflow():
    with pytest.raises(MetadataError, match=r"'workflow'.*with_workflow off"):
        check_reserved({"Workflow": {}}, {"prompt", "workflow"})
    check_reserved({"Author": ""}, {"prompt", "workflow"})
