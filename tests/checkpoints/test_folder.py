"""Checkpoint folders are written whole or not at all, once, and never over somebody's own files."""

import stat

import pytest

from tests.checkpoints import write
from tests.checkpoints.folder import write_once


def fill_with(text):
    def fill(folder):
        (folder / "part").mkdir()
        (folder / "part" / "file.txt").write_text(text)
        (folder / "part" / "file.txt").chmod(0o600)

    return fill


def never(folder):
    raise AssertionError("the folder was complete: nothing should be written")


def test_a_complete_folder_of_the_same_recipe_is_left_alone(tmp_path):
    dest = write_once(tmp_path / "a", {"version": 1, "sizes": (1, 2)}, fill_with("first"))
    assert write_once(tmp_path / "a", {"version": 1, "sizes": (1, 2)}, never) == dest
    assert (dest / "part" / "file.txt").read_text() == "first"


def test_another_recipe_replaces_the_folder(tmp_path):
    write_once(tmp_path / "a", {"version": 1}, fill_with("first"))
    write_once(tmp_path / "a", {"version": 2}, fill_with("second"))
    assert (tmp_path / "a" / "part" / "file.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path):
    def interrupted(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_once(tmp_path / "a", {"version": 1}, interrupted)
    assert list(tmp_path.iterdir()) == []
    write_once(tmp_path / "a", {"version": 1}, fill_with("whole"))
    assert (tmp_path / "a" / "part" / "file.txt").read_text() == "whole"


def test_files_of_others_are_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="Name another folder"):
        write_once(tmp_path / "mine", {"version": 1}, never)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "empty").mkdir()
    write_once(tmp_path / "empty", {"version": 1}, fill_with("whole"))
    assert (tmp_path / "empty" / "part" / "file.txt").read_text() == "whole"


def test_when_two_processes_write_the_first_one_stays(tmp_path):
    def slow(folder):
        write_once(tmp_path / "a", {"version": 1}, fill_with("faster process"))
        fill_with("slower process")(folder)

    write_once(tmp_path / "a", {"version": 1}, slow)
    assert (tmp_path / "a" / "part" / "file.txt").read_text() == "faster process"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_others_may_read_the_files(tmp_path):
    dest = write_once(tmp_path / "a", {"version": 1}, fill_with("text"))
    assert stat.S_IMODE(dest.stat().st_mode) == 0o755
    assert stat.S_IMODE((dest / "part" / "file.txt").stat().st_mode) == 0o644


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"wan21-tiny.*got 'wan99'"):
        write("wan99", tmp_path / "a")
