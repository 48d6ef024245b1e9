"""200 tiny prompts over four packs in random order, with random cancels, unloads and pages that come and go.

Two prompts are queued at any time. Every prompt must be answered; results of equal settings must be equal; memory of
the process and of the devices must stay flat. The figures are printed (``pytest -s``, or ``-rP``).
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass

import pytest
import websocket

from tests.reliability.models import BUDGET, MIB, PACKS

pytestmark = pytest.mark.server

PROMPTS, WARM_UP = 200, 50
SEED = int(os.environ.get("COMFYUI_TPU_SOAK_SEED", "10"))
CANCELS, UNLOADS, GONE, DECODED = 0.2, 0.05, 0.2, 0.04  # shares of the prompts; DECODED: of Wan's
RSS_GROWTH = 120 * MIB  # from after the warm-up to the end: 150 prompts of a leak of 1 MiB each would show
ANSWER_SECONDS = 300


@dataclass
class Sent:
    """One prompt: its settings, whether it is to be cancelled, and the page it was sent from (None: already gone)."""

    prompt_id: str
    key: tuple
    cancel: bool
    page: websocket.WebSocket | None


class Soak:
    def __init__(self, server, chance: random.Random):
        self.server, self.chance = server, chance
        self.results: dict[tuple, str] = {}
        self.counts: Counter[str] = Counter()
        self.most_live = 0
        self.cancelled_before = False

    def send(self) -> Sent:
        name = self.chance.choice(list(PACKS))
        settings = {"seed": self.chance.randrange(3), "steps": self.chance.choice((1, 2)), "prompt": "a fox"}
        settings["prompt"] += " runs" * self.chance.randrange(2)
        if name.startswith("wan") and self.chance.random() < DECODED:
            settings["decode"] = True
            self.counts["decoded Wan videos"] += 1
        client_id = uuid.uuid4().hex
        page = websocket.create_connection(f"{self.server.url.replace('http', 'ws')}/ws?clientId={client_id}")
        body = {"prompt": PACKS[name](**settings), "client_id": client_id}
        prompt_id = json.loads(self.server.post("/prompt", body))["prompt_id"]
        if self.chance.random() < GONE:
            page.close()
            page = None
            self.counts["pages that left"] += 1
        self.counts[name] += 1
        return Sent(prompt_id, (name, *settings.values()), self.chance.random() < CANCELS, page)

    def disturb(self, sent: Sent) -> None:
        """What a user does while the prompt runs."""
        if sent.cancel:
            time.sleep(self.chance.random() * 0.4)
            self.server.post("/interrupt", {"prompt_id": sent.prompt_id})
        if self.chance.random() < UNLOADS:
            self.server.post("/reliability/unload", {})  # on the server's thread, whatever the worker does
            self.counts["unloads"] += 1
        elif self.chance.random() < UNLOADS:
            self.server.post("/free", {"unload_models": True, "free_memory": True})
            self.counts["frees"] += 1

    def answer(self, sent: Sent) -> None:
        """Wait for the prompt's end, and check what it says."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (history := self.server.get(f"/history/{sent.prompt_id}")):
            assert time.monotonic() < deadline, f"{sent.key} was not answered within {ANSWER_SECONDS} s"
            time.sleep(0.02)
        entry = history[sent.prompt_id]
        kinds = [kind for kind, _ in entry["status"]["messages"]]
        if "execution_success" in kinds:
            self.counts["succeeded"] += 1
            (sha,) = entry["outputs"]["end"]["sha256"]
            assert self.results.setdefault(sent.key, sha) == sha, f"{sent.key} gave another result than before"
        else:
            assert kinds[-1] == "execution_interrupted", entry["status"]
            # Core looks which prompt runs and then stops whatever runs: it may hit the next one.
            assert sent.cancel or self.cancelled_before, f"{sent.key} was interrupted though nobody asked"
            self.counts["cancelled"] += 1
        self.cancelled_before = sent.cancel
        if sent.page is not None:
            sent.page.close()

    def run(self, prompts: int) -> None:
        waiting: deque[Sent] = deque()
        for _ in range(prompts):
            waiting.append(self.send())
            if len(waiting) == 2:  # one runs, one waits
                self.disturb(waiting[0])
                self.answer(waiting.popleft())
        while waiting:
            self.answer(waiting.popleft())

    def emptied(self) -> dict:
        """The state with nothing to do and everything released."""
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.server.get("/reliability/state")["held"] and time.monotonic() < deadline:
            time.sleep(0.2)
        # Once more: of the state that first held nothing, the arrays may have been counted before they were released.
        return self.server.get("/reliability/state")


def watch(server, soak: Soak, stop: threading.Event) -> None:
    while not stop.wait(1.0):
        soak.most_live = max(soak.most_live, server.get("/reliability/state?glance")["live_bytes"])


@pytest.mark.timeout(900)
def test_two_hundred_prompts_are_all_answered_and_memory_stays_flat(server):
    soak = Soak(server, random.Random(SEED))
    start, began = soak.emptied(), time.monotonic()
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(server, soak, stop))
    watcher.start()
    try:
        soak.run(WARM_UP)
        after_warm_up = soak.emptied()
        soak.run(PROMPTS - WARM_UP)
    finally:
        stop.set()
        watcher.join()
    end, seconds = soak.emptied(), time.monotonic() - began
    report(soak, (start, after_warm_up, end), seconds)
    assert soak.counts["succeeded"] + soak.counts["cancelled"] == PROMPTS
    assert soak.counts["cancelled"] > PROMPTS * CANCELS / 4, "too few cancels came in time to mean anything"
    assert end["held"] == {}
    assert end["live_bytes"] <= after_warm_up["live_bytes"]
    assert end["live_arrays"] <= after_warm_up["live_arrays"]
    assert soak.most_live <= BUDGET
    assert end["rss"] - after_warm_up["rss"] < RSS_GROWTH
    assert end["files"] <= after_warm_up["files"] + 5
    assert end["threads"] <= after_warm_up["threads"] + 5
    assert end["pid"] == start["pid"]


def report(soak: Soak, states: tuple[dict, ...], seconds: float) -> None:
    def three(key: str, unit: float = 1) -> str:
        return " / ".join(f"{state[key] / unit:.0f}" for state in states)

    print(
        f"\nsoak: {PROMPTS} prompts, seed {SEED}, {seconds:.0f} s; {dict(sorted(soak.counts.items()))}\n"
        f"  start / after {WARM_UP} / end, everything released: RSS {three('rss', MIB)} MiB, "
        f"device bytes {three('live_bytes')}, arrays {three('live_arrays')}, files {three('files')}, "
        f"threads {three('threads')}\n"
        f"  most device memory at any time {soak.most_live / MIB:.0f} of {BUDGET / MIB:.0f} MiB; "
        f"{len(soak.results)} different settings, each gave one result"
    )
