"""An exception at every point of a prompt in turn: nothing half-registered, no leaked arrays, the next prompt is right.

A dry run counts how often each point is passed; then the first and the last pass fail with an error, one in the middle
as Cancel does; some with the devices' own error.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass, field

import jax
import pytest
import torch

from comfyui_tpu.models import flux2
from comfyui_tpu.models.flux2 import Flux2
from comfyui_tpu.runtime import bridge, checkpoint, device_module, loader, program
from comfyui_tpu.runtime.errors import OutOfDeviceMemory
from comfyui_tpu.runtime.memory import BUDGET_VARIABLE, live_bytes
from comfyui_tpu.runtime.registry import registry
from comfyui_tpu.runtime.reporting import Reporter, reporting
from tests.checkpoints import write

# Point → where it is called from, and the name there.
POINTS = {
    "open": (device_module.Checkpoint, "open"),
    "read": (checkpoint._File, "read_into"),
    "to devices": (loader, "_on_devices"),
    "place": (loader, "_place"),
    "stack": (loader._HostStack, "arrived"),
    "load": (device_module.DeviceModule, "_load"),
    "inputs": (device_module.DeviceModule, "_placed"),
    "program": (program, "program"),
    "device_put": (jax, "device_put"),
    "step": (jax, "block_until_ready"),
    "fetch": (bridge, "to_torch"),
    "finite": (flux2, "finite"),
}
COMPILING = {"trace": (program, "trace"), "compile": (jax.stages.Lowered, "compile"), "eval_shape": (jax, "eval_shape")}


class Injected(Exception):
    pass


class CancelledByUser(BaseException):
    """What nobody catches by mistake."""


def exhausted() -> Exception:
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: injected: Attempting to allocate 12.00G.")


@dataclass
class Fault:
    """Counts the calls of one point, and raises at call ``at`` (from 0) if it is set."""

    make: type | None = None
    at: int | None = None
    calls: int = 0
    raised: list = field(default_factory=list)

    def __call__(self) -> None:
        self.calls += 1
        if self.at is not None and self.calls - 1 == self.at:
            self.raised.append(self.make())
            raise self.raised[-1]


@contextlib.contextmanager
def at_point(owner, name: str, fault: Fault):
    original = getattr(owner, name)
    own = owner.__dict__[name]

    def wrapped(*args, **kwargs):
        fault()
        return original(*args, **kwargs)

    setattr(owner, name, staticmethod(wrapped) if isinstance(own, classmethod) else wrapped)
    try:
        yield fault
    finally:
        setattr(owner, name, own)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Flux2:
    return Flux2.open(write("flux2-tiny", tmp_path_factory.mktemp("faults") / "flux2-tiny"), (jax.devices()[0],))


def prompt(model: Flux2) -> torch.Tensor:
    """A whole prompt: text encoder, two steps, decoder."""
    model._embeddings.clear()
    with torch.inference_mode():
        size = {"height": 256, "width": 256, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 1}
        return model.decode(model.sample(model.encode_prompt("a raven"), **size))


@pytest.fixture(scope="module")
def expected(model) -> torch.Tensor:
    return prompt(model)


def arrays_nobody_owns() -> int:
    gc.collect()
    return live_bytes(jax.devices()[0]) - registry().bytes_in_use


@pytest.fixture(autouse=True)
def _clean(expected):
    registry().release_all()
    gc.collect()


@pytest.fixture(scope="module")
def passes(model, expected) -> dict[str, int]:
    """Point → how often a prompt passes it."""
    registry().release_all()
    with contextlib.ExitStack() as stack:
        faults = {point: stack.enter_context(at_point(*place, Fault())) for point, place in POINTS.items()}
        prompt(model)
    return {point: fault.calls for point, fault in faults.items()}


def check_fault(model, expected, owner, name, fault, caught) -> None:
    unowned = arrays_nobody_owns()
    with at_point(owner, name, fault), pytest.raises(caught):
        prompt(model)
    assert fault.raised
    fault.raised.clear()
    assert arrays_nobody_owns() <= unowned, "arrays were left behind"
    held = registry().holdings()
    assert all(size > 0 for size in held.values())
    assert all(entry.users == 0 for entry in registry()._entries.values()), "a lease was not returned"
    assert torch.equal(prompt(model), expected)
    registry().release_all()


@pytest.mark.parametrize("point", POINTS)
def test_a_fault_at_any_point_leaves_nothing_behind(model, expected, passes, point):
    owner, name = POINTS[point]
    count = passes[point]
    assert count > 0, f"{point} is not passed"
    for at in sorted({0, count - 1}):
        check_fault(model, expected, owner, name, Fault(Injected, at), Injected)
    check_fault(model, expected, owner, name, Fault(CancelledByUser, count // 2), CancelledByUser)


@pytest.mark.parametrize("point", COMPILING)
def test_a_fault_while_compiling_leaves_nothing_behind(model, expected, point, monkeypatch):
    monkeypatch.setattr(program, "_programs", {})
    owner, name = COMPILING[point]
    for make, caught in ((Injected, Injected), (exhausted, OutOfDeviceMemory)):
        program._programs.clear()
        registry().release_all()
        check_fault(model, expected, owner, name, Fault(make, 0), caught)


@pytest.mark.parametrize("point", ["to devices", "inputs", "step", "load"])
def test_out_of_memory_once_is_not_noticed_by_the_user(model, expected, passes, point):
    owner, name = POINTS[point]
    for at in sorted({0, passes[point] - 1}):
        with at_point(owner, name, Fault(exhausted, at)) as fault:
            assert torch.equal(prompt(model), expected)
        assert fault.raised
        registry().release_all()


def test_out_of_memory_for_good_names_numbers_and_knobs(model, expected):
    owner, name = POINTS["step"]

    class Always(Fault):
        def __call__(self):
            raise exhausted()

    with at_point(owner, name, Always()), pytest.raises(OutOfDeviceMemory, match=r"12\.00G.*num_frames"):
        prompt(model)
    assert torch.equal(prompt(model), expected)


class CancelAt(Reporter):
    """Cancels at the given call to the reporter; counts them."""

    def __init__(self, at: int | None = None):
        self.at, self.calls = at, 0

    def check_cancelled(self) -> None:
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            raise CancelledByUser

    def message(self, text: str) -> None:
        self.check_cancelled()

    def progress(self, stage: str, done: int, total: int) -> None:
        self.check_cancelled()


def test_cancel_at_any_point_leaves_nothing_behind(model, expected):
    with reporting(CancelAt()) as counting:
        prompt(model)
    registry().release_all()
    places = {0, 1, counting.calls - 1, *range(0, counting.calls, max(1, counting.calls // 8))}
    for at in sorted(places):
        unowned = arrays_nobody_owns()
        with reporting(CancelAt(at)), pytest.raises(CancelledByUser):
            prompt(model)
        assert arrays_nobody_owns() <= unowned
        registry().release_all()
    assert torch.equal(prompt(model), expected)


def test_a_simulated_device_that_is_too_small_evicts_and_succeeds(model, expected, monkeypatch):
    """The devices' own error, from a budget: a component at a time."""
    first = jax.devices()[0]
    largest = max(component.bytes_per_device for component in model.components)
    others = arrays_nobody_owns()
    workspace = max(found.workspace_bytes for found in program._programs.values())
    monkeypatch.setenv(BUDGET_VARIABLE, str(others + largest + workspace + 2**20))
    assert torch.equal(prompt(model), expected)
    monkeypatch.setenv(BUDGET_VARIABLE, str(others + largest))
    registry().release_all()
    with pytest.raises(OutOfDeviceMemory, match="does not fit"):
        prompt(model)
    assert live_bytes(first) - registry().bytes_in_use <= others
