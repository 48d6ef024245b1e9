"""A custom node for the tests' server: keeps a tensor exactly as it is, which no node of core does for images."""

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


NODE_CLASS_MAPPINGS = {"ProbeSave": ProbeSave}
