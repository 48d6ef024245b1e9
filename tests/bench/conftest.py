"""Compilations replaced by the stored dumps, for all but the test that asks for a real one."""

import pytest

from comfyui_tpu.bench import attention, compiling
from tests.bench.stored import JOBS, schedule


@pytest.fixture
def stored(monkeypatch):
    """``compile_one`` answers with the stored schedules of ``JOBS``; tiles of 512 queries "do not fit"; no tokamax."""

    def compile_one(job):
        if job.blocks.queries == 512:
            return compiling.Compiled(job, None, reason="RESOURCE_EXHAUSTED")
        assert job == JOBS[job.kernel], "only these are stored"
        return compiling.Compiled(job, schedule(job.kernel), seconds=1.25, cycles_around=471.0)

    monkeypatch.setattr(compiling, "compile_one", compile_one)
    monkeypatch.setattr(attention, "has_tokamax", lambda: False)
