"""Custom nodes for the tests' server, for what no node of core does: keep a tensor exactly as it is, make any.

Route: ``POST /probe/slow`` ``{"seconds": s}``: so much longer takes each call of a transformer.
"""

import os
import time

import folder_paths
import torch
from aiohttp import web
from server import PromptServer

PACE = {"seconds": 0.0, "set": False}


def set_pace(seconds):
    PACE["seconds"] = seconds
    if PACE["set"]:
        return
    PACE["set"] = True
    from comfyui_tpu.runtime.device_module import DeviceModule

    run = DeviceModule.run

    def slowed(self, *args, **kwargs):
        if self.spec.name.startswith("transformer"):
            time.sleep(PACE["seconds"])
        return run(self, *args, **kwargs)

    DeviceModule.run = slowed


@PromptServer.instance.routes.post("/probe/slow")
async def slow(request):
    set_pace((await request.json())["seconds"])
    return web.json_response({})


class ProbeSave:
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "save", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING", {"default": "probe"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # any type may be connected

    def save(self, value, name):
        os.makedirs(folder_paths.get_output_directory(), exist_ok=True)
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.pt")
        torch.save(value, path)
        return {"ui": {"path": [path]}}


class ProbeFill:
    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "make", ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"kind": (["LATENT", "CONDITIONING"],), "shape": ("STRING", {}), "value": ("STRING", {})},
            "optional": {"tokens_before": ("INT", {"default": 0})},
        }

    def make(self, kind, shape, value, tokens_before=0):
        tensor = torch.full([int(size) for size in shape.split(",")], float(value))
        if kind == "LATENT":
            return ({"samples": tensor},)
        return ([[torch.nn.functional.pad(tensor, (0, 0, tokens_before, 0)), {}]],)


NODE_CLASS_MAPPINGS = {"ProbeSave": ProbeSave, "ProbeFill": ProbeFill}
