"""The kernels of rows and of columns compile within every generation's VMEM limit, and take as long as planned.

In a process of its own for each: the compiler reads where to write its schedules once.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_tpu.bench.compiling import environment
from comfyui_tpu.ops import column_kernels
from comfyui_tpu.ops.row_kernels import estimated_cycles
from comfyui_tpu.plan import bundles
from comfyui_tpu.plan.hardware import GENERATIONS

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "v7x": "tpu7x:2x2x1"}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec
from comfyui_tpu.ops.column_kernels import Part, normed_columns
from comfyui_tpu.ops.rows import layer_norm_modulate, layer_norm_rotary, rms_norm_rotary
from comfyui_tpu.plan import hlo
from comfyui_tpu.plan.hardware import describe_devices, parse
from comfyui_tpu.plan.kernels import OurKernels

topology = parse(sys.argv[1])
place = dict(mesh=Mesh(np.array(describe_devices(topology)[:1]), ("chips",)), eps=1e-6)
whole = jax.NamedSharding(place["mesh"], PartitionSpec())
of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
tables = lambda tokens, size: (of(tokens, size, dtype=jnp.float32),) * 2
angles = lambda c, s: dict(cosines=c, sines=s)
calls = [
    (lambda x, s: layer_norm_modulate(x, scale=s, shift=s, **place), (of(1, 9450, 5120), of(1, 1, 5120))),
    (lambda x, w, *t: rms_norm_rotary(x, w, **angles(*t), heads=40, over="width", **place),
     (of(1, 9450, 5120), of(5120), *tables(9450, 128))),
    (lambda x, w, *t: rms_norm_rotary(x, w, **angles(*t), heads=48, over="head", **place),
     (of(1, 4608, 6144), of(128), *tables(4608, 128))),
    (lambda x, w, *t: layer_norm_rotary(x, w, w, **angles(*t), heads=48, **place),
     (of(1, 4979, 3072), of(64), *tables(4979, 64))),
]
rows_of = lambda *shape: of(*shape, dtype=jnp.float32)
columns = [
    (lambda x, g: normed_columns([Part(x, 0, 0)], g, *x.shape[:2], 2), (rows_of(2, 60, 192, 360), of(96))),
]
wide_columns = [
    (lambda x, g: normed_columns([Part(x, 0, 0)], g, *x.shape[:2], 1), (rows_of(2, 60, 192, 640), of(192))),
]
edges = [
    (lambda x: layer_norm_modulate(x, **place), (of(2, 77, 18432),)),
    (lambda x: layer_norm_modulate(x, out_dtype=jnp.bfloat16, **place), (of(1, 9450, 5120, dtype=jnp.float32),)),
    (lambda x: layer_norm_modulate(x, **place), (of(2, 9450, 1536, dtype=jnp.float32),)),
    (lambda x, w, *t: rms_norm_rotary(x, w, **angles(*t), heads=40, over="width", **place),
     (of(2, 512, 5120, dtype=jnp.float32), of(5120), *tables(512, 128))),
]
found = []
cases = {"rows": calls, "edges": edges, "columns": columns, "wide columns": wide_columns}
for call, given in cases[sys.argv[2]]:
    text = jax.jit(call).trace(*given).lower(lowering_platforms=("tpu",)).compile().as_text()
    module = hlo.parse(text)
    (kernel,) = [i for c in module.computations.values() for i in c if i.custom_call_target == "tpu_custom_call"]
    found.append((kernel.kernel_name, OurKernels(topology.generation.name)(kernel)))
print(json.dumps(found))
"""
SHAPES = ((1, 9450, 5120), (1, 9450, 5120), (1, 4608, 6144), (1, 4979, 3072))


def compiled(folder, *arguments: str) -> list[tuple[str, int]]:
    """Names of the kernels and their planned cycles; the compiler's schedules are in ``folder``."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    where = {**environment(str(folder)), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def counted(schedule: bundles.Schedule) -> float:
    """Bundles of one core; the loop over the grid turns twice more than there are tiles, to move them in and out."""
    grid = max(schedule.loops, key=len)
    return float(schedule.runs(lambda loop: loop.trips - 2 * (loop == grid), lambda branch: 1.0).sum())


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_kernels_compile_and_take_the_cycles_that_the_planner_thinks(generation, tmp_path):
    hardware = GENERATIONS[generation]
    for (name, planned), shape in zip(compiled(tmp_path, TOPOLOGIES[generation], "rows"), SHAPES, strict=True):
        estimate = estimated_cycles(name, generation, *shape)
        assert estimate == pytest.approx(counted(bundles.read(tmp_path, name)), rel=0.1), name
        through_hbm = 4 * math.prod(shape) / hardware.hbm_bandwidth * hardware.clock
        assert max(estimate, through_hbm) - 1 <= planned <= max(estimate, 1.2 * through_hbm) + 1, name


@pytest.mark.parametrize(("which", "values"), [("columns", 120 * 192 * 384), ("wide columns", 120 * 192 * 640)])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_kernel_of_columns_compiles_and_takes_at_most_the_cycles_of_the_planner(
    generation, which, values, tmp_path
):
    ((name, planned),) = compiled(tmp_path, TOPOLOGIES[generation], which)
    cycles = counted(bundles.read(tmp_path, name))
    estimate = column_kernels.estimated_cycles(name, generation, column_kernels.FLOPS * values)
    assert 0.7 * estimate <= cycles <= estimate
    assert planned >= round(estimate)


def test_wide_rows_float32_and_few_rows_compile_in_the_smallest_limit(tmp_path):
    assert len(compiled(tmp_path, "v5e:2x4", "edges")) == 4
