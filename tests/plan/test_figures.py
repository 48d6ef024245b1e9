"""No step and no decoding becomes slower unnoticed: full-depth programs, compiled, against the stored estimates."""

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
    return found["programs"]


@pytest.fixture(scope="module")
def measured(stored):
    return figures.all_measured()


names = pytest.mark.parametrize("name", [figures.name_of(*program) for program in figures.PROGRAMS])


@names
def test_nothing_is_estimated_more_than_five_percent_slower_than_it_was(stored, measured, name):
    before, now = stored[name]["seconds"], measured[name]["seconds"]
    assert now <= before * (1 + TOLERANCE), f"{name}: {now:.4f} s, stored {before:.4f}; {measured[name]}"


@names
def test_every_kernel_has_its_own_cycles(measured, name):
    assert not [warning for warning in measured[name]["warnings"] if "kernel" in warning]
