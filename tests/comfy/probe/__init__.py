"""Custom nodes for the tests' server, for what no node of core does: keep a tensor exactly as it is, make any."""

import os

import folder_paths
import torch


class ProbeSave:
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "probe", "save", True, ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING", {"default": "probe"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # any type may be connected

    def save(self, value, name):
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
