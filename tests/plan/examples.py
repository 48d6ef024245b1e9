"""Made-up estimates whose sums can be done in the head: 1.75 GHz (v6e), so 1.75 G cycles are a second."""

from comfyui_tpu.models.common import Task
from comfyui_tpu.plan.estimate import ProgramEstimate
from comfyui_tpu.plan.hardware import GIB, parse
from comfyui_tpu.plan.report import ModelEstimate

SECOND = 1.75e9


def program(label: str, calls: int, **changes) -> ProgramEstimate:
    component = label.split()[0]
    known = {
        "label": label,
        "components": (component,),
        "calls": calls,
        "inputs": "x 1×2",
        "effort": "production",
        "trace_seconds": 1.0,
        "compile_seconds": 2.0,
        "cpu_seconds": 2.5,
        "input_bytes": 0,
    }
    return ProgramEstimate(**{**known, **changes})


def cycles(**seconds: float) -> dict[str, float]:
    names = ("matmul", "attention", "elementwise", "relayout", "collectives")
    return {name: seconds.get(name, 0.0) * SECOND for name in names}


OPERATION = {
    "name": "fusion.1",
    "opcode": "fusion",
    "category": "matmul",
    "cycles": SECOND,
    "executions": 40,
    "module": "Block.forward (<transformer>.py:1)",
    "shape": "bf16[8,128]",
}


def estimate(**changes) -> ModelEstimate:
    """Text 0.5 s twice, 100 calls of 1 s for 50 steps, decoding 3 s; 1 + 10 GiB of weights and 4 GiB of activations."""
    programs = (
        program("text_encoder encode", 2, cycles=cycles(matmul=0.5)),
        program(
            "transformer denoise",
            100,
            cycles=cycles(matmul=0.25, attention=0.5, collectives=0.25),
            flops=int(917.504e12),
            input_bytes=GIB,
            output_bytes=GIB,
            alias_bytes=GIB,
            temp_bytes=3 * GIB,
            hbm_traffic_bytes=0.82e12,
            operations=(OPERATION,),
        ),
        program("vae decode", 1, cycles=cycles(elementwise=3), temp_bytes=GIB, warnings=("a <warning>",)),
    )
    known = {
        "model": "example",
        "topology": parse("v6e:2x4"),
        "task": Task(720, 1280, 81, 50, 5.0),
        "weights": {"text_encoder": GIB, "transformer": 10 * GIB, "vae": 0},
        "plans": {"text_encoder": "fsdp", "transformer": "fsdp", "vae": "spatial"},
        "programs": programs,
    }
    return ModelEstimate(**{**known, **changes})
