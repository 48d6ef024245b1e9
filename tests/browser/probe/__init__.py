"""A custom node for the tests' server: takes its time, in steps, as a sampler does.

Route: ``POST /probe/hold`` ``{"held": true}``: it stops half-way until told ``false``.
"""

import threading
import time

from aiohttp import web
from comfy.utils import ProgressBar
from server import PromptServer

GO_ON = threading.Event()
GO_ON.set()


@PromptServer.instance.routes.post("/probe/hold")
async def hold(request):
    if (await request.json())["held"]:
        GO_ON.clear()
    else:
        GO_ON.set()
    return web.json_response({})


class ProbeSteps:
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "work", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"default": 20}), "seconds": ("FLOAT", {"default": 2.5})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # never taken from the cache

    def work(self, steps, seconds):
        bar = ProgressBar(steps)
        for step in range(steps):
            if step == steps // 2:
                GO_ON.wait(120)
            time.sleep(seconds / steps)
            bar.update(1)
        return {"ui": {"steps": [steps]}}


NODE_CLASS_MAPPINGS = {"ProbeSteps": ProbeSteps}
