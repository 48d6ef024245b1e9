"""What the compiler is told beyond its defaults, and what happens where it does not know it."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.plan.hardware import describe_devices, parse
from comfyui_tpu.runtime import program


def test_one_device_and_other_platforms_get_the_defaults():
    assert program.compiler_options(jax.devices()) == {}
    assert program.compiler_options(describe_devices(parse("v6e:1x1"))) == {}


def gathering(topology: str) -> jax.stages.Lowered:
    """A product with a weight that is split over the devices of ``topology`` and gathered for it."""
    mesh = Mesh(np.array(describe_devices(parse(topology))), "chips")
    shape = jax.ShapeDtypeStruct((2048, 2048), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("chips")))
    whole = NamedSharding(mesh, PartitionSpec())

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ jax.lax.with_sharding_constraint(w, whole), None), x, weights)[0]

    stack = jax.ShapeDtypeStruct(
        (3, *shape.shape), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(None, "chips"))
    )
    return jax.jit(layers).trace(shape, stack).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1"])
def test_every_generations_compiler_knows_its_options(topology, caplog):
    options = program.compiler_options(describe_devices(parse(topology)))
    assert options
    with caplog.at_level(logging.WARNING):
        text = program.compile_lowered(gathering(topology), options).as_text()
    assert not caplog.records
    # Weights are gathered beside the computation by the SparseCores.
    assert ('execution_thread="sparsecore"' in text) == (topology in ("v6e:2x4", "tpu7x:2x2x1"))


def test_an_option_that_the_compiler_does_not_know_costs_a_warning_and_not_the_program(caplog):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert program.compile_lowered(lowered, {"xla_no_such_option": True})(1.0) == 2
    assert "xla_no_such_option" in caplog.text


def test_any_other_failure_of_the_compiler_is_passed_on():
    class Failing:
        def compile(self, compiler_options=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

    with pytest.raises(jax.errors.JaxRuntimeError, match="too large"):
        program.compile_lowered(Failing(), {"xla_some_option": True})
