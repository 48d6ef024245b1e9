"""Cancel as a user presses it, and how far the sampler still goes: counted in steps, not in seconds."""

from __future__ import annotations

from collections.abc import Callable

from tests.comfy.server import ComfyServer, Run

# So that the request arrives long before the last step, however slow the machine that sends it.
SLOW_STEP_SECONDS = 0.1


def run_and_cancel(server: ComfyServer, prompt: dict, node_id: str, when: Callable[[Run], bool]) -> tuple[Run, int]:
    """Run ``prompt`` and interrupt it as soon as ``when(run)``; the run, and the steps of ``node_id`` done after that.

    The server sends its messages in order, and one with its queue's state when that is cleared: steps that come after
    this message were done after the interrupt had been accepted, however late this process reads them.
    """
    sent_at: list[int] = []

    def watch(run: Run) -> None:
        if not sent_at and when(run):
            server.post("/interrupt", {})
            server.post("/queue", {"clear": True})
            sent_at.append(len(run.events))

    server.post("/probe/slow", {"seconds": SLOW_STEP_SECONDS})
    try:
        run = server.run(prompt, watch)
    finally:
        server.post("/probe/slow", {"seconds": 0})
    kinds = [kind for kind, _ in run.events]
    accepted = kinds.index("status", sent_at[0])
    late = [data for kind, data in run.events[accepted:] if kind == "progress" and data["node"] == node_id]
    return run, len(late)


def steps_done(run: Run, node_id: str, total: int) -> int:
    """The last step of a run of ``total`` that was reported."""
    return max((d["value"] for d in run.of("progress") if d["node"] == node_id and d["max"] == total), default=0)


def check_cancelled(run: Run, late: int, node_id: str, total: int) -> None:
    assert run.of("execution_interrupted")[0]["node_id"] == node_id
    assert not run.succeeded
    assert run.error is None
    assert late <= 1, "at most the step that was under way when Cancel came"
    assert steps_done(run, node_id, total) < total
