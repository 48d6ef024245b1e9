"""The registry owns device arrays: leases, eviction, release, running out of memory."""

import threading

import jax
import jax.numpy as jnp
import pytest

from comfyui_tpu.runtime import registry as module
from comfyui_tpu.runtime.errors import InvalidInput, OutOfDeviceMemory
from comfyui_tpu.runtime.memory import BUDGET_VARIABLE, DeviceMemory, live_bytes, simulate_allocation
from comfyui_tpu.runtime.registry import HEADROOM, Need, Registry

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


@pytest.fixture
def chips(monkeypatch):
    """Devices that tell what a registry takes of ``limit`` bytes each, as a TPU's would: ``chips(registry, limit)``."""

    def make(registry, limit, taken_by_others=0):
        def memory_of(device):
            entries = registry._entries.values()
            used = sum(entry.bytes_on[device] for entry in entries)
            return DeviceMemory(used + taken_by_others, limit)

        monkeypatch.setattr(module.memory, "device_memory", memory_of)
        return jax.devices()[:2]

    return make


def on(device, kib=1):
    return lambda: {"weight": jax.device_put(jnp.zeros((kib * KIB,), jnp.uint8), device)}


def use(registry, name, load, need):
    with registry.lease(name, name.upper(), load, need):
        pass


def test_the_least_recently_used_leaves_first(chips):
    registry = Registry()
    first, _ = chips(registry, int(2 * KIB / (1 - HEADROOM)) + 1)
    need = Need((first,), KIB)
    for name in "aba":  # b is the oldest use
        use(registry, name, on(first), need)
    with registry.lease("c", "C", on(first), need):
        assert set(registry.holdings()) == {"A", "C"}


def test_what_lies_on_other_chips_stays(chips):
    registry = Registry()
    first, second = chips(registry, 2 * KIB)
    use(registry, "a", on(second), Need((second,), KIB))
    use(registry, "b", on(first), Need((first,), KIB))
    use(registry, "c", on(first, kib=2), Need((first,), 2 * KIB))
    assert registry.holdings() == {"C": 2 * KIB, "A": KIB}


def test_room_is_made_for_what_the_program_takes_too(chips):
    registry = Registry()
    first, _ = chips(registry, 4 * KIB)
    use(registry, "a", on(first), Need((first,), KIB))
    use(registry, "b", on(first), Need((first,), KIB, workspace=KIB))
    assert set(registry.holdings()) == {"A", "B"}
    # Nothing has to be loaded for this call, but it computes with more.
    use(registry, "b", on(first), Need((first,), KIB, workspace=3 * KIB))
    assert set(registry.holdings()) == {"B"}


def test_what_is_in_use_is_never_evicted(chips):
    registry = Registry()
    first, _ = chips(registry, 4 * KIB)
    with registry.lease("a", "A", on(first, kib=2)) as used:
        with registry.lease("b", "B", on(first, kib=2), Need((first,), 2 * KIB)):  # the headroom is short, no more
            assert set(registry.holdings()) == {"A", "B"}
        assert not used["weight"].is_deleted()


def test_what_cannot_fit_is_refused_before_anything_is_loaded_or_evicted(chips):
    registry, load = Registry(), Loader()
    first, second = chips(registry, 4 * KIB, taken_by_others=KIB)
    use(registry, "a", on(first), Need((first,), KIB))
    with pytest.raises(OutOfDeviceMemory) as refused:
        use(registry, "b", load, Need((first, second), weights=2 * KIB, workspace=2 * KIB))
    assert load.calls == 0
    assert registry.holdings() == {"A": KIB}
    for part in ("B does not fit", "of weights and", "each of 2 chips", "a chip has", "Held now: A", "num_frames"):
        assert part in str(refused.value)


def test_a_call_of_what_is_loaded_is_refused_too_and_leaves_it_evictable(chips):
    registry = Registry()
    first, _ = chips(registry, 4 * KIB)
    use(registry, "a", on(first), Need((first,), KIB))
    with pytest.raises(OutOfDeviceMemory, match="A does not fit"):
        use(registry, "a", on(first), Need((first,), KIB, workspace=4 * KIB))
    assert registry.holdings() == {"A": KIB}
    assert registry.evict_idle() == KIB


def test_what_others_hold_in_garbage_is_collected_before_a_refusal(monkeypatch):
    registry, first = Registry(), jax.devices()[0]
    monkeypatch.setenv(BUDGET_VARIABLE, str(live_bytes(first) + 8 * KIB))
    cycle = {"array": on(first, kib=6)()["weight"]}
    cycle["self"] = cycle
    del cycle
    use(registry, "a", on(first, kib=4), Need((first,), 4 * KIB))
    assert set(registry.holdings()) == {"A"}


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

    with pytest.raises(OutOfDeviceMemory, match=r"every idle model evicted .*12.00G.*number of frames or the size"):
        registry.lease("a", "A", load).__enter__()
    assert registry.holdings() == {}
    with registry.lease("a", "A", Loader()):
        assert registry.bytes_in_use == KIB


def test_donated_inputs_are_not_run_twice():
    calls = []

    def work():
        calls.append(1)
        raise exhausted()

    registry = Registry()
    with registry.lease("idle", "Idle", Loader()):
        pass
    with pytest.raises(jax.errors.JaxRuntimeError):  # for the caller, who can repeat the whole
        registry.run_with_room(work, "decoding", repeatable=False)
    assert calls == [1]
    assert registry.holdings() == {}


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


def test_a_release_while_something_loads_releases_it_after_its_use():
    registry = Registry()

    def load():
        registry.release_all()  # as the server's thread may
        return arrays()

    with registry.lease("a", "A", load) as leased:
        assert not leased["weight"].is_deleted()
    assert registry.holdings() == {}
    use(registry, "a", Loader(), Need())
    assert registry.holdings() == {"A": KIB}


def test_two_components_of_one_name_are_both_counted():
    registry = Registry()
    for key in "ba":
        use(registry, key, Loader(), Need())
    with registry.lease("c", "A", Loader()):
        assert registry.holdings() == {"A": 2 * KIB, "B": KIB}


def test_it_says_in_one_line_what_it_holds(chips):
    registry = Registry()
    first, _ = chips(registry, 2**31)
    assert registry.describe() == "no model in memory"
    use(registry, "a", on(first, kib=3 * KIB), Need())
    assert registry.describe() == "1 component in memory (3.0 MiB), 3.0 MiB of 2.00 GiB a chip"


def test_an_error_of_the_compiler_names_the_numbers_and_the_knobs():
    need = Need(tuple(jax.devices()[:4]), weights=3 * 2**30)
    with pytest.raises(OutOfDeviceMemory) as raised, Registry().explained("compiling the vae", need):
        raise exhausted()
    for part in ("too small for compiling the vae", "12.00G", "3.00 GiB of weights on each of 4 chips", "num_frames"):
        assert part in str(raised.value)
    with pytest.raises(ZeroDivisionError), Registry().explained("compiling", need):
        _ = 1 / 0


def test_a_budget_stands_for_the_memory_of_a_device_without_a_count(monkeypatch):
    device = jax.devices()[1]
    assert module.memory.device_memory(device) is None
    taken = live_bytes(device)
    monkeypatch.setenv(BUDGET_VARIABLE, str(taken + 3 * KIB))
    array = on(device, kib=2)()["weight"]
    assert module.memory.device_memory(device) == DeviceMemory(taken + 2 * KIB, taken + 3 * KIB)
    simulate_allocation([device], KIB)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as raised:
        simulate_allocation([device], KIB + 1)
    assert module.is_out_of_memory(raised.value)
    array.delete()
    assert live_bytes(device) == taken


def test_a_budget_caps_what_a_tpu_has_and_never_raises_it(monkeypatch):
    class Chip:
        platform = "tpu"

        def memory_stats(self):
            return {"bytes_in_use": 5, "bytes_limit": 100}

    assert module.memory.device_memory(Chip()) == DeviceMemory(5, 100)
    monkeypatch.setenv(BUDGET_VARIABLE, "80")
    assert module.memory.device_memory(Chip()) == DeviceMemory(5, 80)
    monkeypatch.setenv(BUDGET_VARIABLE, "800")
    assert module.memory.device_memory(Chip()) == DeviceMemory(5, 100)


@pytest.mark.parametrize("text", ["0", "-1", "16GiB", "1e9", "x" * 1000])
def test_a_budget_that_is_no_number_of_bytes_is_refused(monkeypatch, text):
    monkeypatch.setenv(BUDGET_VARIABLE, text)
    with pytest.raises(InvalidInput, match=BUDGET_VARIABLE):
        module.memory.budget()
