"""Which plan runs when nobody says: the user's own estimates, else ours, else the first."""

import json
from types import SimpleNamespace

import pytest

from comfyui_tpu.runtime import plan_choice
from comfyui_tpu.runtime.plan import guided, spread

PLANS = (guided(8), spread(8))
V6E = tuple(SimpleNamespace(device_kind="TPU v6 lite") for _ in range(8))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_TPU_CACHE", str(tmp_path))
    monkeypatch.setattr(plan_choice, "_OURS", tmp_path / "ours.json")
    return tmp_path


def ours(cache, **choices):
    (cache / "ours.json").write_text(json.dumps({key.replace("_", " "): name for key, name in choices.items()}))


def test_without_estimates_the_first_plan_runs():
    assert plan_choice.chosen(PLANS, "Model", V6E) is PLANS[0]


def test_our_estimates_choose_for_their_generation_and_number_of_chips_alone(cache):
    ours(cache, Model_v6e_8="fsdp")
    assert plan_choice.chosen(PLANS, "Model", V6E) is PLANS[1]
    assert plan_choice.chosen(PLANS, "Other", V6E) is PLANS[0]
    assert plan_choice.chosen(PLANS, "Model", V6E[:4]) is PLANS[0]


def test_what_the_user_estimated_goes_before_ours(cache):
    ours(cache, Model_v6e_8="fsdp")
    plan_choice.keep("Model", "v6e", 8, PLANS[0].name)
    assert plan_choice.chosen(PLANS, "Model", V6E) is PLANS[0]


def test_choices_of_other_models_are_kept():
    plan_choice.keep("Model", "v6e", 8, "fsdp")
    plan_choice.keep("Other", "v6e", 8, "fsdp by branch")
    assert plan_choice.chosen(PLANS, "Model", V6E) is PLANS[1]


@pytest.mark.parametrize("text", ["", "[]", '{"Model v6e 8": "gone"}', '{"Model v6e 8": 3}'])
def test_a_damaged_or_outdated_file_changes_nothing(text):
    path = plan_choice.users_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert plan_choice.chosen(PLANS, "Model", V6E) is PLANS[0]
