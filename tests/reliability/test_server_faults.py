"""A fault at any point in a real server: the prompt fails alone, nothing is left behind, the next prompt works."""

import pytest

from tests.reliability.models import MIB, cogvideox, flux2

pytestmark = pytest.mark.server

# Point of the tests' pack → after how many calls it fails.
FAULTS = [
    *[("open", 0), ("read", 0), ("read", 7), ("place", 3), ("load", 1)],
    *[("compile", 0), ("compile", 2), ("trace", 0), ("run", 0), ("run", 1), ("run", 3), ("fetch", 0), ("fetch", 2)],
    *[("finite", 0), ("finite", 1), ("finite", 2)],
]


@pytest.fixture(scope="module")
def expected(server):
    done = server.run(flux2(seed=3, prompt="a wolf"))
    assert done.succeeded, done.why
    return done.outputs["end"]["sha256"]


@pytest.mark.parametrize(("point", "after"), FAULTS, ids=lambda value: str(value))
def test_a_fault_leaves_nothing_behind_and_the_next_prompt_works(server, state, expected, point, after):
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.post("/reliability/fault", {"point": point, "after": after})
    # A size of its own where a program must be missing.
    prompt = cogvideox(seed=after, prompt=point) if point == "trace" else flux2(seed=3, prompt=f"{point} {after}")
    if point == "trace":
        prompt["2"]["inputs"].update(height=48, width=80)
    failed = server.run(prompt)
    assert failed.error is not None, f"{point} was not called {after + 1} times"
    assert f"injected at {point}" in failed.error["exception_message"]
    held = state()
    assert held["live_bytes"] - sum(held["held"].values()) < MIB, "arrays that nobody owns"
    again = server.run(flux2(seed=3, prompt="a wolf"))
    assert again.succeeded, again.why
    assert again.outputs["end"]["sha256"] == expected
