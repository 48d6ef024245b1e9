"""Several threads use, unload and look at once: what is leased stays whole, and in the end nothing is left."""

import random
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from comfyui_tpu.runtime.memory import BUDGET_VARIABLE, live_bytes
from comfyui_tpu.runtime.registry import Need, Registry

KIB, SECONDS = 1024, 2.0


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_leased_stays_whole_whatever_others_do(monkeypatch, seed):
    registry, device = Registry(), jax.devices()[3]
    before = live_bytes(device)
    # Room for the three that the workers use at once, and for one more.
    monkeypatch.setenv(BUDGET_VARIABLE, str(before + int(4.5 * 64 * KIB)))
    errors, leases, stop = [], [], threading.Event()

    def load(number):
        return lambda: {"w": jax.device_put(jnp.full((64 * KIB,), number, jnp.uint8), device)}

    def work(chance):
        while not stop.is_set():
            number = chance.randrange(8)
            with registry.lease(number, f"c{number}", load(number), Need((device,), 64 * KIB)) as arrays:
                time.sleep(chance.random() * 0.003)
                assert int(arrays["w"][7]) == number
                leases.append(number)

    def disturb(chance):
        while not stop.is_set():
            chance.choice([registry.release_all, registry.evict_idle, registry.holdings, registry.describe])()
            time.sleep(chance.random() * 0.003)

    def guarded(task, number):
        try:
            task(random.Random(100 * seed + number))
        except BaseException as error:
            errors.append(error)
            stop.set()

    tasks = [work, work, work, disturb, disturb]
    threads = [threading.Thread(target=guarded, args=(task, number)) for number, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not [thread for thread in threads if thread.is_alive()], "a deadlock"
    assert errors == []
    assert len(set(leases)) == 8
    registry.release_all()
    assert registry.holdings() == {}
    assert live_bytes(device) == before
