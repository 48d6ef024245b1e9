"""A custom node pack for the reliability tests' server: what the process holds, faults on demand, ends of prompts.

Routes: ``GET /reliability/state`` (``?glance``: garbage counts too); ``POST /reliability/unload`` (core's unload, on
the server's thread); ``POST /reliability/fault`` ``{"point": name, "after": calls}`` (empty: none);
``POST /reliability/slow`` ``{"seconds": s}`` for each tensor read.
"""

import asyncio
import gc
import hashlib
import json
import os
import threading
import time

import psutil
import torch
from aiohttp import web
from server import PromptServer

ROUTES = PromptServer.instance.routes


class Injected(Exception):
    """The fault the tests inject."""


class Faults:
    """Wraps functions of the library; raises at the chosen call of the chosen one, once."""

    def __init__(self):
        self.point, self.after, self.slow_seconds, self.installed = "", 0, 0.0, False

    def install(self):
        if self.installed:
            return
        self.installed = True
        from comfyui_tpu.models import cogvideox, flux2, wan, wan_i2v
        from comfyui_tpu.runtime import bridge, checkpoint, device_module, loader, program

        self._wrap("open", checkpoint.Checkpoint, "open")
        self._wrap("read", checkpoint.Checkpoint, "read")
        self._wrap("place", loader, "_place")
        self._wrap("load", device_module.DeviceModule, "_load")
        self._wrap("trace", device_module.DeviceModule, "trace")
        self._wrap("compile", program, "program")
        self._wrap("run", device_module.DeviceModule, "run")
        self._wrap("fetch", bridge, "to_torch")
        for module in (cogvideox, flux2, wan, wan_i2v):
            self._wrap("finite", module, "finite")

    def _wrap(self, point, owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if point == "read" and self.slow_seconds:
                time.sleep(self.slow_seconds)
            if point == self.point:
                self.after -= 1
                if self.after < 0:
                    self.point = ""
                    raise Injected(f"injected at {point}")
            return original(*args, **kwargs)

        setattr(owner, name, staticmethod(wrapped) if name == "open" else wrapped)


FAULTS = Faults()


def state(collect: bool = True) -> dict:
    """What this process holds: figures independent of the library's own bookkeeping."""
    import jax

    from comfyui_tpu.runtime.registry import registry

    if collect:
        gc.collect()
    arrays = jax.live_arrays("cpu")
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "live_bytes": sum(array.nbytes for array in arrays),
        "live_arrays": len(arrays),
        "held": registry().holdings(),
        "threads": threading.active_count(),
        "files": process.num_fds(),
        "pid": os.getpid(),
    }


@ROUTES.get("/reliability/state")
async def get_state(request):
    collect = "glance" not in request.query
    return web.json_response(await asyncio.get_running_loop().run_in_executor(None, state, collect))


@ROUTES.post("/reliability/unload")
async def unload(request):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return web.json_response({})


@ROUTES.post("/reliability/fault")
async def fault(request):
    body = await request.json()
    FAULTS.install()
    FAULTS.point, FAULTS.after = body.get("point", ""), body.get("after", 0)
    return web.json_response({"pending": FAULTS.point})


@ROUTES.post("/reliability/slow")
async def slow(request):
    FAULTS.install()
    FAULTS.slow_seconds = (await request.json()).get("seconds", 0.0)
    return web.json_response({})


class ReliabilityEnd:
    """The SHA-256 of the numbers that come in, as the prompt's output."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "reliability", "show", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # any type may be connected

    def show(self, value):
        tensor = value["samples"] if isinstance(value, dict) else value
        content = tensor.contiguous().numpy().tobytes()
        return {"ui": {"shape": list(tensor.shape), "sha256": [hashlib.sha256(content).hexdigest()]}}


class ReliabilityCondition:
    """Wan 2.2's condition of a picture without its autoencoder, which takes seconds on a CPU."""

    CATEGORY, FUNCTION, RETURN_TYPES = "reliability", "make", ("CONDITION", "LATENT_INFO")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        from comfyui_tpu.comfy.condition import to_sockets
        from comfyui_tpu.models.wan_i2v import Condition

        latents = torch.rand(1, 20, 5, 32, 32, generator=torch.Generator().manual_seed(seed))
        return to_sockets(Condition(latents, 256, 256, 17))


class ReliabilityValue:
    """Any value for any input, from JSON; ``{"tensor": shape, "fill": number}`` stands for a tensor."""

    CATEGORY, FUNCTION, RETURN_TYPES = "reliability", "make", ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": "null"})}}

    def make(self, text):
        return (json.loads(text, object_hook=_tensor),)


def _tensor(value: dict):
    if set(value) != {"tensor", "fill"}:
        return value
    return torch.full(value["tensor"], float(value["fill"]))


NODE_CLASS_MAPPINGS = {
    "ReliabilityValue": ReliabilityValue,
    "ReliabilityEnd": ReliabilityEnd,
    "ReliabilityCondition": ReliabilityCondition,
}
