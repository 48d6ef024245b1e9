"""The one monkey patch: idempotent, transparent, and without effect on a process that never used the devices."""

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from comfyui_tpu.comfy import unload


@pytest.fixture
def core(monkeypatch):
    """A stand-in for ``comfy.model_management`` that counts calls."""
    module = ModuleType("comfy.model_management")
    module.calls = []
    module.unload_all_models = lambda *args: module.calls.append("core") or "answer"
    package = ModuleType("comfy")
    package.model_management = module
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.model_management", module)
    registry = SimpleNamespace(release_all=lambda: module.calls.append("released") or 2**20)
    monkeypatch.setitem(
        sys.modules, "comfyui_tpu.runtime.registry", SimpleNamespace(registry=lambda: registry, __spec__=None)
    )
    return module


def test_unloading_in_core_also_releases_device_memory(core):
    unload.install_unload_hook()
    assert core.unload_all_models() == "answer"
    assert core.calls == ["core", "released"]


def test_several_packs_and_a_reload_install_it_once(core):
    unload.install_unload_hook()
    hooked = core.unload_all_models
    unload.install_unload_hook()
    importlib.reload(unload).install_unload_hook()
    assert core.unload_all_models is hooked
    core.unload_all_models()
    assert core.calls == ["core", "released"]


def test_it_is_found_below_another_packs_wrapper(core):
    unload.install_unload_hook()
    inner = core.unload_all_models

    @functools.wraps(inner)
    def foreign(*args):
        return inner(*args)

    foreign.__dict__.pop("_releases_tpu_memory")
    core.unload_all_models = foreign
    unload.install_unload_hook()
    assert core.unload_all_models is foreign


def test_memory_is_released_even_if_core_fails(core):
    def failing():
        raise RuntimeError("core")

    core.unload_all_models = failing
    unload.install_unload_hook()
    with pytest.raises(RuntimeError, match="core"):
        core.unload_all_models()
    assert core.calls == ["released"]


def test_it_does_not_start_jax_just_to_find_nothing_loaded(core, monkeypatch):
    monkeypatch.delitem(sys.modules, "comfyui_tpu.runtime.registry")
    unload.install_unload_hook()
    core.unload_all_models()
    assert "comfyui_tpu.runtime.registry" not in sys.modules
    assert core.calls == ["core"]
