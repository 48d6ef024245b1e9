"""The registry owns device arrays: leases, eviction, release, running out of memory."""

import threading

import jax
import jax.numpy as jnp
import pytest

from comfyui_tpu.runtime import registry as module
from comfyui_tpu.runtime.errors import OutOfDeviceMemory
from comfyui_tpu.runtime.registry import Registry

KIB = 1024


def arrays(kib=1):
    return {"weight": jnp.zeros((kib * KIB,), jnp.uint8)}


def exhausted():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 12.00G.")


class Loader:
    def __init__(self, kib=1):
        self.kib, self.calls = kib, 0

    def __call__(self):
        self.calls += 1
        return arrays(self.kib)


def test_a_second_lease_does_not_load_again():
    registry, load = Registry(), Loader()
    for _ in range(2):
        with registry.lease("a", "A", load) as leased:
            assert leased["weight"].shape == (KIB,)
    assert load.calls == 1
    assert registry.bytes_in_use == KIB
    assert registry.holdings() == {"A": KIB}


def test_release_all_frees_the_arrays_and_the_next_lease_loads_again():
    registry, load = Registry(), Loader()
    with registry.lease("a", "A", load) as leased:
        held = leased["weight"]
    assert registry.release_all() == KIB
    assert held.is_deleted()
    assert registry.bytes_in_use == 0
    with registry.lease("a", "A", load):
        assert load.calls == 2


def test_what_is_in_use_is_released_as_soon_as_it_is_idle():
    registry = Registry()
    with registry.lease("a", "A", Loader()) as leased:
        assert registry.release_all() == 0
        assert not leased["weight"].is_deleted()
    assert registry.bytes_in_use == 0


def test_replicated_copies_all_count():
    mesh = jax.sharding.Mesh(jax.devices(), ("x",))
    everywhere = jax.device_put(arrays()["weight"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert module.device_bytes({"weight": everywhere}) == 8 * KIB


def test_the_least_recently_used_leaves_first(monkeypatch):
    registry = Registry()
    loaders = {name: Loader() for name in "abc"}
    for name in "aba":  # b is the oldest use
        with registry.lease(name, name.upper(), loaders[name]):
            pass
    # A device with room for two of these: exact bookkeeping instead of a TPU's.
    monkeypatch.setattr(module, "_free_bytes", lambda: 2 * KIB - registry.bytes_in_use)
    with registry.lease("c", "C", loaders["c"], bytes_per_device=KIB):
        assert set(registry.holdings()) == {"A", "C"}


def test_what_is_in_use_is_never_evicted(monkeypatch):
    registry = Registry()
    monkeypatch.setattr(module, "_free_bytes", lambda: 0)
    with registry.lease("a", "A", Loader()) as first:
        with registry.lease("b", "B", Loader(), bytes_per_device=KIB):
            assert set(registry.holdings()) == {"A", "B"}
        assert not first["weight"].is_deleted()


def test_out_of_memory_evicts_everything_idle_and_tries_once_more():
    registry = Registry()
    with registry.lease("idle", "Idle", Loader()):
        pass
    attempts = []

    def load():
        attempts.append(registry.bytes_in_use)
        if len(attempts) == 1:
            raise exhausted()
        return arrays()

    with registry.lease("a", "A", load):
        assert attempts == [KIB, 0]


def test_out_of_memory_twice_is_an_error_that_names_the_knobs_and_leaves_nothing():
    registry = Registry()

    def load():
        raise exhausted()

    with pytest.raises(OutOfDeviceMemory, match="number of frames or the size"):
        registry.lease("a", "A", load).__enter__()
    assert registry.holdings() == {}
    with registry.lease("a", "A", Loader()):
        assert registry.bytes_in_use == KIB


def test_donated_inputs_are_not_run_twice():
    calls = []

    def work():
        calls.append(1)
        raise exhausted()

    with pytest.raises(OutOfDeviceMemory):
        Registry().run_with_room(work, "decoding", repeatable=False)
    assert calls == [1]


def test_other_errors_pass_through_untouched():
    with pytest.raises(ZeroDivisionError):
        Registry().run_with_room(lambda: 1 / 0, "dividing")


def test_a_failed_load_registers_nothing():
    registry = Registry()

    def load():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        registry.lease("a", "A", load).__enter__()
    assert registry.holdings() == {}


def test_threads_that_want_the_same_component_load_it_once():
    registry, load = Registry(), Loader()
    barrier = threading.Barrier(4)

    def use():
        barrier.wait()
        with registry.lease("a", "A", load):
            pass

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load.calls == 1
