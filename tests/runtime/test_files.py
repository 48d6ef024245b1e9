"""Files appear whole or not at all."""

import pytest

from comfyui_tpu.runtime.files import write_text


def test_a_file_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")
    write_text(str(path), "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it \udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
