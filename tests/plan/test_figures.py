"""No model's step becomes slower unnoticed: full-depth transformers, compiled, against the stored estimates."""

import json

import pytest

from tests.plan import figures

TOLERANCE = 0.05

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def stored():
    found = json.loads(figures.STORED.read_text(encoding="utf-8"))
    if found["versions"] != figures.versions():
        pytest.skip("other versions than the stored figures'; make new ones with `python -m tests.plan.figures`")
    return found["models"]


@pytest.fixture(scope="module")
def measured(stored):
    return figures.all_measured()


@pytest.mark.parametrize("model", figures.MODELS)
def test_a_step_is_not_estimated_more_than_five_percent_slower_than_it_was(stored, measured, model):
    before, now = stored[model]["seconds_per_step"], measured[model]["seconds_per_step"]
    assert now <= before * (1 + TOLERANCE), f"{model}: {now:.4f} s a step, stored {before:.4f}; {measured[model]}"


@pytest.mark.parametrize("model", figures.MODELS)
def test_every_kernel_of_a_step_has_its_own_cycles(measured, model):
    assert not [warning for warning in measured[model]["warnings"] if "kernel" in warning]
