"""Which model_id means which folder, and what is refused."""

import pytest

from comfyui_tpu.comfy.model_lookup import find_local
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, ModelNotFound


@pytest.fixture
def folders(tmp_path):
    first, second = tmp_path / "models" / "diffusers", tmp_path / "extra"
    for folder in (first / "wan", second / "other", second / "org" / "name", first / "twice", second / "twice"):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    (first / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "model_index.json").write_text("{}")
    return [first, second]


@pytest.mark.parametrize(
    ("model_id", "index", "path"), [("wan", 0, "wan"), ("other", 1, "other"), ("twice", 0, "twice")]
)
def test_a_folder_name_is_looked_up_in_all_of_comfyuis_folders_in_order(folders, model_id, index, path):
    assert find_local(model_id, folders) == folders[index] / path


def test_blanks_around_a_pasted_name_do_not_matter(folders):
    assert find_local(" wan\n", folders) == folders[0] / "wan"


def test_a_local_folder_wins_over_a_repo_of_the_same_name(folders):
    assert find_local("org/name", folders) == folders[1] / "org" / "name"


@pytest.mark.parametrize(
    "model_id", ["Wan-AI/Wan2.1-T2V-14B-Diffusers", "a/b@main", "a/b@refs/pr/1", "a/b@9f3c0de", "a.b/c_d-e"]
)
def test_a_repo_id_is_left_to_the_hub(folders, model_id):
    assert find_local(model_id, folders) is None


@pytest.mark.parametrize(
    "model_id",
    [
        "",
        "   ",
        None,
        5,
        "..",
        ".",
        "../etc",
        "../outside",
        "wan/..",
        "../..",
        "a/../../outside",
        "/etc",
        "//etc",
        "/",
        "wan/",
        "~",
        "~root/x",
        "a\\b",
        "..\\outside",
        "C:\\models",
        "C:/models",
        "wan\0",
        "a/b\nc",
        "a/b/c",
        "a b/c",
        "a/b@",
        "a/b@../x",
        "a/b@x y",
        "https://huggingface.co/a/b",
        "x" * 300,
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(folders, model_id):
    with pytest.raises(InvalidInput, match=r"Accepted are the name of a folder in ComfyUI/models/diffusers .* repo id"):
        find_local(model_id, folders)


def test_an_unknown_name_lists_the_folders_that_exist(folders):
    with pytest.raises(ModelNotFound) as error:
        find_local("wam", folders)
    assert "'wam'" in str(error.value)
    assert "org/name, other, twice, wan." in str(error.value)


def test_an_empty_folder_is_named_and_explained(folders):
    with pytest.raises(CheckpointError, match=r"diffusers/empty has no model_index\.json"):
        find_local("empty", folders)


def test_a_link_to_another_disk_works(folders, tmp_path):
    (folders[0] / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir(exist_ok=True)
    (tmp_path / "outside" / "model_index.json").touch()
    assert find_local("link", folders) == folders[0] / "link"


def test_a_link_within_the_model_folders_and_a_linked_model_folder_work(folders, tmp_path):
    (folders[0] / "link").symlink_to(folders[1] / "other")
    assert find_local("link", folders) == folders[0] / "link"
    (tmp_path / "linked-root").symlink_to(folders[0])
    assert find_local("wan", [tmp_path / "linked-root"]) == tmp_path / "linked-root" / "wan"
