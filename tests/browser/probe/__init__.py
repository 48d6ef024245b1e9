"""A custom node for the tests' server: takes its time, in steps, as a sampler does."""

import time

from comfy.utils import ProgressBar


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
        for _ in range(steps):
            time.sleep(seconds / steps)
            bar.update(1)
        return {"ui": {"steps": [steps]}}


NODE_CLASS_MAPPINGS = {"ProbeSteps": ProbeSteps}
