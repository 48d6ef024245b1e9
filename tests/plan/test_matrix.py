"""Every model lowers and compiles for every generation's usual topology.

In CI with two blocks of each kind, 256 × 256 pixels and narrow autoencoders. Transformers are compiled everywhere; text
encoders and autoencoders on v6e:2x4, and only once where several models have the same one (elsewhere they are lowered).
``COMFYUI_TPU_PLAN_FULL=1`` compiles every program at full depth and size, which took 44 minutes here.
"""

import functools
import multiprocessing
import os

import pytest

from comfyui_tpu.plan.catalogue import CATALOGUE
from tests.plan.matrix import TOPOLOGIES, row

FULL = os.environ.get("COMFYUI_TPU_PLAN_FULL") == "1"
CASES = [(model, topology) for topology in TOPOLOGIES for model in CATALOGUE]

pytestmark = pytest.mark.timeout(0 if FULL else 1800)


@pytest.fixture(scope="module")
def rows():
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(functools.partial(row, full=FULL), CASES, chunksize=1), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_model_compiles_for_the_topology_and_reports_its_memory(rows, case):
    found = rows[case]
    assert {label.split()[0] for label in found} >= {"text_encoder", "transformer", "vae"}
    compiled = {label: program for label, program in found.items() if program is not None}
    assert "transformer denoise" in compiled
    for label, program in compiled.items():
        assert not program.failure, f"{label}: {program.failure}"
        assert program.argument_bytes > 0
        assert program.temp_bytes > 0
        assert 0 < program.total_cycles < 1e12
        assert program.flops > 0


@pytest.mark.parametrize("model", CATALOGUE)
def test_a_newer_generation_is_not_estimated_slower(rows, model):
    """Four v5p chips against eight v5e: the same matmul peak together, so only v6e against v5e is sure."""
    cycles = {topology: rows[model, topology]["transformer denoise"].total_cycles for topology in TOPOLOGIES}
    assert cycles["v6e:2x4"] / 1.75 < cycles["v5e:2x4"] / 1.5
