"""The monitor's part of ComfyUI's web server: who listens, samples while somebody does, and the routes.

* ``POST /tpu-monitor/listen`` ``{"client_id": ..., "rate": seconds}``: events ``tpu_monitor.sample`` for that page;
  0 ends them.
* ``GET /tpu-monitor/sample``: one sample.
* ``GET /tpu-monitor/metrics``: Prometheus' text format; off unless ``COMFYUI_TPU_MONITOR_METRICS=1`` is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from comfyui_tpu.monitor.prometheus import to_text
from comfyui_tpu.monitor.sample import Chip, InProcess, Sample, Sampler

if TYPE_CHECKING:
    from server import PromptServer

log = logging.getLogger(__name__)

EVENT = "tpu_monitor.sample"
MIN_RATE, MAX_RATE = 0.25, 5.0
METRICS_VARIABLE = "COMFYUI_TPU_MONITOR_METRICS"
# Messages that wait in ComfyUI's queue; beyond it a slow connection would only be slowed down more.
MAX_QUEUED = 100


class BadRequest(ValueError):
    """What was expected, and what came."""


def in_process() -> InProcess:
    """What this process keeps on the devices, if it has used JAX at all; asking must not be what starts JAX."""
    module = sys.modules.get("comfyui_tpu.runtime.registry")
    if module is None:
        return InProcess()
    from comfyui_tpu.runtime.memory import device_memory

    registry = module.registry()
    devices = sorted(registry.devices(), key=lambda device: device.id)
    known = [device_memory(device) for device in devices]
    chips = [Chip(index, each.used, each.limit) for index, each in enumerate(known) if each is not None]
    return InProcess(registry.holdings(), tuple(chips))


@dataclass
class Listener:
    """A page that wants a sample every ``rate`` seconds, next at ``due`` (the loop's clock)."""

    rate: float
    due: float = 0.0


class Monitor:
    """Samples in a thread of its own while at least one page listens. Everything else runs on the event loop."""

    def __init__(self, server: PromptServer, sampler: Sampler) -> None:
        self._server, self._sampler = server, sampler
        self._listeners: dict[str, Listener] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tpu-monitor")
        self._sampling: asyncio.Future[Sample] | None = None

    def listen(self, client_id: str, rate: float) -> None:
        """From now on ``client_id`` gets a sample every ``rate`` seconds; 0: none."""
        self._listeners.pop(client_id, None)
        if rate:
            self._listeners[client_id] = Listener(rate)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
        self._changed.set()

    async def sample(self) -> Sample:
        """A fresh sample; callers that come while one is being taken share it."""
        if self._sampling is None or self._sampling.done():
            self._sampling = asyncio.get_running_loop().run_in_executor(self._thread, self._sampler.sample)
        return await asyncio.shield(self._sampling)

    async def _run(self) -> None:
        log.info("TPU monitor: a page listens, sampling begins")
        while self._drop_the_gone():
            await self._send_to_due()
            await self._sleep()
            if not self._drop_the_gone():
                # gRPC connections and the helper process are not kept for nobody. A page may come meanwhile.
                await asyncio.get_running_loop().run_in_executor(self._thread, self._sampler.close)
        log.info("TPU monitor: no page listens, sampling ends")

    def _drop_the_gone(self) -> bool:
        """Forget pages whose connection has ended; whether any is left."""
        for client_id in [each for each in self._listeners if each not in self._server.sockets]:
            del self._listeners[client_id]
        return bool(self._listeners)

    async def _send_to_due(self) -> None:
        now = asyncio.get_running_loop().time()
        due = {client_id: each for client_id, each in self._listeners.items() if each.due <= now}
        if not due:
            return
        for listener in due.values():
            # In step with its own clock; what was missed is not made up for.
            next_due = listener.due + listener.rate
            listener.due = next_due if next_due > now else now + listener.rate
        try:
            message = (await self.sample()).to_json()
        except Exception:
            # Not a message a second: pages ask again after a few seconds of silence.
            log.exception("TPU monitor: no sample could be taken")
            self._listeners.clear()
            return
        if self._server.messages.qsize() <= MAX_QUEUED:
            for client_id in due:
                self._server.send_sync(EVENT, message, client_id)

    async def _sleep(self) -> None:
        """Until the next listener is due, or one comes or goes."""
        now = asyncio.get_running_loop().time()
        self._changed.clear()
        wait = min((each.due - now for each in self._listeners.values()), default=0.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(wait, 0.0))


def listening(body: Any, clients: Mapping[str, Any]) -> tuple[str, float]:
    """The body of ``POST /tpu-monitor/listen`` → (client id, rate). Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest(f"expected an object with client_id and rate, got {type(body).__name__}")
    client_id, rate = body.get("client_id"), body.get("rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (rate == 0 or MIN_RATE <= rate <= MAX_RATE):
        raise BadRequest(f"rate: expected 0 (off) or {MIN_RATE} to {MAX_RATE:g} seconds, got {rate!r:.40}")
    if not isinstance(client_id, str) or (rate and client_id not in clients):
        raise BadRequest(f"client_id: expected the id of an open WebSocket connection, got {client_id!r:.40}")
    return client_id, float(rate)


def add_routes(routes: web.RouteTableDef, monitor: Monitor, clients: Mapping[str, Any]) -> None:
    @routes.post("/tpu-monitor/listen")
    async def listen(request: web.Request) -> web.Response:
        try:
            client_id, rate = listening(await request.json(), clients)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        monitor.listen(client_id, rate)
        return web.json_response({"rate": rate})

    @routes.get("/tpu-monitor/sample")
    async def sample(request: web.Request) -> web.Response:
        return web.json_response((await monitor.sample()).to_json())

    @routes.get("/tpu-monitor/metrics")
    async def metrics(request: web.Request) -> web.Response:
        if os.environ.get(METRICS_VARIABLE, "") in ("", "0"):
            return web.Response(status=404, text=f"Off. Start ComfyUI with {METRICS_VARIABLE}=1 to turn it on.\n")
        return web.Response(text=to_text(await monitor.sample()), headers={"Content-Type": "text/plain; version=0.0.4"})


def start_monitor(make_sampler: Callable[[], Sampler] = lambda: Sampler(in_process=in_process)) -> None:
    """Add the monitor to the running ComfyUI server. Safe to call again, and where there is no server."""
    # ComfyUI has imported it if it serves; a script that only loads nodes must not do so for us.
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is None or hasattr(server, "tpu_monitor"):
        return
    server.tpu_monitor = Monitor(server, make_sampler())
    add_routes(server.routes, server.tpu_monitor, server.sockets)
