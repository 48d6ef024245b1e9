"""Who gets samples and when, and what the routes accept. The event loop and the web server are real."""

import asyncio
import sys
import threading
import time
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from comfyui_tpu.comfy import monitor_server
from comfyui_tpu.comfy.monitor_server import BadRequest, Monitor, add_routes, in_process, listening, start_monitor
from comfyui_tpu.monitor.sample import Sample, Space


class FakeSampler:
    """Counts, and remembers on which threads it was asked."""

    def __init__(self):
        self.taken = self.closed = 0
        self.threads = set()
        self.hold = None

    def sample(self) -> Sample:
        self.threads.add(threading.get_ident())
        if self.hold:
            self.hold.wait(60)
        self.taken += 1
        return Sample(self.taken, 1.0, Space(1, 2))

    def close(self) -> None:
        self.closed += 1


class FakeServer:
    """The part of PromptServer that the monitor uses."""

    def __init__(self):
        self.sockets = {}
        self.messages = asyncio.Queue()
        self.sent, self.at = [], []

    def send_sync(self, event, data, sid):
        self.sent.append((sid, event, data["time"]))
        self.at.append(time.monotonic())


@pytest.fixture
def world():
    server, sampler = FakeServer(), FakeSampler()
    return SimpleNamespace(server=server, sampler=sampler, monitor=Monitor(server, sampler))


# Longer than any test waits: what comes of its own accord after this did not come at once.
NEVER_DUE = 600.0


async def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


def gaps(server) -> list[float]:
    """Seconds between a message and the next."""
    return [after - before for before, after in pairwise(server.at)]


def test_nothing_is_sampled_until_a_page_listens_and_after_it_has_gone(world):
    async def story():
        await asyncio.sleep(0.1)
        assert world.sampler.taken == 0
        world.server.sockets["page"] = object()
        began = time.monotonic()
        world.monitor.listen("page", 0.25)
        await until(lambda: len(world.server.sent) == 3)
        assert time.monotonic() - began >= 2 * 0.25, "three samples are two intervals apart"
        # A busy machine may be late for one, but not for each of them.
        await until(lambda: min(gaps(world.server)) < 0.4)
        assert {sid for sid, _, _ in world.server.sent} == {"page"}
        del world.server.sockets["page"]
        await until(lambda: world.sampler.closed == 1)
        taken = world.sampler.taken
        await asyncio.sleep(0.6)
        assert (world.sampler.taken, world.sampler.closed) == (taken, 1)

    asyncio.run(story())
    assert {event for _, event, _ in world.server.sent} == {"tpu_monitor.sample"}


def test_rate_zero_ends_it_at_once(world):
    async def story():
        world.server.sockets["page"] = object()
        world.monitor.listen("page", NEVER_DUE)
        await until(lambda: world.server.sent)
        world.monitor.listen("page", 0)
        await until(lambda: world.sampler.closed == 1)
        assert world.sampler.taken == 1
        # And it can begin again.
        world.monitor.listen("page", NEVER_DUE)
        await until(lambda: world.sampler.taken == 2)

    asyncio.run(story())


def test_a_page_that_comes_while_the_last_one_leaves_is_not_forgotten(world):
    async def story():
        world.server.sockets |= {"old": object(), "new": object()}
        world.monitor.listen("old", NEVER_DUE)
        await until(lambda: world.server.sent)
        closing, closed = threading.Event(), threading.Event()
        world.sampler.close = lambda: closing.set() or closed.wait(60)
        world.monitor.listen("old", 0)
        await until(closing.is_set)
        world.monitor.listen("new", NEVER_DUE)
        closed.set()
        await until(lambda: ("new", "tpu_monitor.sample", 2) in world.server.sent)

    asyncio.run(story())


def test_each_page_has_its_own_rate_and_both_share_samples(world):
    async def story():
        world.server.sockets |= {"fast": object(), "slow": object()}
        world.monitor.listen("fast", 0.25)
        world.monitor.listen("slow", NEVER_DUE)
        await until(lambda: len(world.server.sent) >= 4)

    asyncio.run(story())
    received = {name: [time for sid, _, time in world.server.sent if sid == name] for name in ("fast", "slow")}
    assert len(received["fast"]) >= 3
    assert len(received["slow"]) == 1
    assert set(received["slow"]) <= set(received["fast"])


def test_the_event_loop_goes_on_while_a_sample_is_late(world):
    world.sampler.hold = threading.Event()

    async def story():
        world.server.sockets["page"] = object()
        world.monitor.listen("page", NEVER_DUE)
        ticks = 0
        for _ in range(30):
            await asyncio.sleep(0.01)
            ticks += 1
        assert (ticks, world.sampler.taken) == (30, 0)
        world.sampler.hold.set()
        await until(lambda: world.sampler.taken == 1)
        assert threading.get_ident() not in world.sampler.threads

    asyncio.run(story())


def test_sampling_that_fails_stops_until_a_page_asks_again(world):
    def fail():
        world.sampler.taken += 1
        raise RuntimeError("broken")

    async def story():
        world.server.sockets["page"] = object()
        take, world.sampler.sample = world.sampler.sample, fail
        world.monitor.listen("page", 0.25)
        await until(lambda: world.sampler.closed == 1)
        await asyncio.sleep(0.6)
        assert world.sampler.taken == 1
        world.sampler.sample = take
        world.monitor.listen("page", 0.25)
        await until(lambda: world.server.sent)

    asyncio.run(story())


def test_askers_at_the_same_time_share_one_sample(world):
    async def story():
        return await asyncio.gather(*(world.monitor.sample() for _ in range(5)))

    assert [sample.time for sample in asyncio.run(story())] == [1] * 5


def test_a_browser_that_does_not_keep_up_gets_fewer(world):
    async def story():
        world.server.sockets["page"] = object()
        for _ in range(monitor_server.MAX_QUEUED + 1):
            world.server.messages.put_nowait(None)
        world.monitor.listen("page", 0.25)
        # With the second one the first has been dealt with.
        await until(lambda: world.sampler.taken == 2)

    asyncio.run(story())
    assert world.server.sent == []


@pytest.mark.parametrize("rate", [0, 0.25, 1, 5.0])
def test_rates_that_are_accepted(rate):
    assert listening({"client_id": "page", "rate": rate}, {"page": 1}) == ("page", rate)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ([], "expected an object with client_id and rate, got list"),
        ({"client_id": "page"}, "rate: expected 0 (off) or 0.25 to 5 seconds, got None"),
        ({"client_id": "page", "rate": 0.2}, "got 0.2"),
        ({"client_id": "page", "rate": 5.1}, "got 5.1"),
        ({"client_id": "page", "rate": -1}, "got -1"),
        ({"client_id": "page", "rate": True}, "got True"),
        ({"client_id": "page", "rate": "1"}, "got '1'"),
        ({"client_id": "page", "rate": float("nan")}, "got nan"),
        ({"client_id": "other", "rate": 1}, "client_id: expected the id of an open WebSocket connection, got 'other'"),
        ({"client_id": ["page"], "rate": 0}, "got ['page']"),
        ({"rate": 1}, "got None"),
    ],
)
def test_what_is_refused(body, complaint):
    with pytest.raises(BadRequest) as refused:
        listening(body, {"page": 1})
    assert complaint in str(refused.value)


def call(world, *requests):
    """Answers (status, text) of a real web server to (method, path, body) each."""

    async def story():
        routes = web.RouteTableDef()
        add_routes(routes, world.monitor, world.server.sockets)
        app = web.Application()
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            answers = []
            for method, path, body in requests:
                async with client.request(method, path, data=body) as answer:
                    answers.append((answer.status, await answer.text()))
            return answers

    return asyncio.run(story())


def test_bad_requests_are_answered_with_400_and_what_was_expected(world):
    answers = call(
        world,
        ("POST", "/tpu-monitor/listen", b'{"client_id": "x", "rate": 1}'),
        ("POST", "/tpu-monitor/listen", b"not json"),
        ("POST", "/tpu-monitor/listen", b"\xff\xfe"),
    )
    assert [status for status, _ in answers] == [400, 400, 400]
    assert "client_id: expected" in answers[0][1]
    assert world.sampler.taken == 0


def test_a_sample_on_demand(world):
    ((status, text),) = call(world, ("GET", "/tpu-monitor/sample", None))
    assert status == 200
    assert '"cpu": 1.0' in text


@pytest.mark.parametrize(("value", "status"), [(None, 404), ("0", 404), ("1", 200)])
def test_the_metrics_route_is_off_unless_it_was_turned_on(world, monkeypatch, value, status):
    monkeypatch.delenv("COMFYUI_TPU_MONITOR_METRICS", raising=False)
    if value is not None:
        monkeypatch.setenv("COMFYUI_TPU_MONITOR_METRICS", value)
    ((found, text),) = call(world, ("GET", "/tpu-monitor/metrics", None))
    assert found == status
    assert ("comfyui_tpu_cpu_percent 1.0" in text) == (status == 200)
    assert ("COMFYUI_TPU_MONITOR_METRICS=1" in text) == (status == 404)
    assert world.sampler.taken == (1 if status == 200 else 0)


def test_it_starts_once_and_only_beside_a_server(monkeypatch):
    prompt_server = type("PromptServer", (), {})
    module = ModuleType("server")
    module.PromptServer = prompt_server
    monkeypatch.setitem(sys.modules, "server", module)
    start_monitor(FakeSampler)  # a script that imports the nodes has no server
    prompt_server.instance = SimpleNamespace(routes=web.RouteTableDef(), sockets={})
    start_monitor(FakeSampler)
    first = prompt_server.instance.tpu_monitor
    start_monitor(FakeSampler)
    assert prompt_server.instance.tpu_monitor is first
    assert len(prompt_server.instance.routes) == 3


class FakeDevice(SimpleNamespace):
    def memory_stats(self):
        return self.stats


def test_this_process_is_asked_only_if_it_has_used_jax(monkeypatch):
    monkeypatch.delitem(sys.modules, "comfyui_tpu.runtime.registry", raising=False)
    assert in_process() == monitor_server.InProcess()
    assert "comfyui_tpu.runtime.registry" not in sys.modules


def test_what_the_registry_holds_is_told_with_its_chips(monkeypatch):
    devices = [
        FakeDevice(id=1, platform="tpu", stats={"bytes_in_use": 3, "bytes_limit": 9}),
        FakeDevice(id=0, platform="tpu", stats={"bytes_in_use": 2, "bytes_limit": 9}),
    ]
    registry = SimpleNamespace(holdings=lambda: {"vae": 5}, devices=lambda: devices)
    module = SimpleNamespace(registry=lambda: registry)
    monkeypatch.setitem(sys.modules, "comfyui_tpu.runtime.registry", module)
    found = in_process()
    assert found.held == {"vae": 5}
    assert [(chip.index, chip.hbm_used, chip.hbm_total) for chip in found.chips] == [(0, 2, 9), (1, 3, 9)]
    devices[0].stats = devices[1].stats = None
    assert in_process().chips == ()


def test_cpu_devices_of_the_real_registry_are_no_chips():
    import jax.numpy as jnp

    from comfyui_tpu.runtime.registry import registry

    with registry().lease("test-monitor", "test weights", lambda: {"w": jnp.zeros((256,), jnp.float32)}):
        found = in_process()
        registry().release_all()
    assert found.held["test weights"] == 1024
    assert found.chips == ()


def test_a_budget_makes_a_cpu_device_a_chip(monkeypatch):
    import jax.numpy as jnp

    from comfyui_tpu.runtime.memory import BUDGET_VARIABLE
    from comfyui_tpu.runtime.registry import registry

    monkeypatch.setenv(BUDGET_VARIABLE, str(2**30))
    with registry().lease("test-monitor", "test weights", lambda: {"w": jnp.zeros((256,), jnp.float32)}):
        (chip,) = in_process().chips
        registry().release_all()
    assert chip.hbm_total == 2**30
    assert 1024 <= chip.hbm_used < 2**30
