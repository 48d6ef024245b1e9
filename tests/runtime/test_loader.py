"""Weights arrive on the devices exactly, read once, within the memory allowed, or not at all."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.torch import save_file

from comfyui_tpu.runtime import loader
from comfyui_tpu.runtime.checkpoint import Checkpoint
from comfyui_tpu.runtime.errors import CheckpointError, InvalidInput, PlanError
from comfyui_tpu.runtime.loader import Target, load
from comfyui_tpu.runtime.reporting import Reporter, reporting
from tests.checkpoints import large
from tests.checkpoints.raw import write_file, write_sharded

RNG = np.random.default_rng(0)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
ROOT = Path(__file__).parents[2]


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def eight(*spec):
    return NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P(*spec))


def four_by_two(*spec):
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")), P(*spec))


def one():
    return SingleDeviceSharding(jax.devices()[0])


def checkpoint_of(folder, tensors, shards=2):
    write_sharded(folder, tensors, shards)
    return Checkpoint.open(folder)


def plain(array, sharding=None, dtype=F32, source="x"):
    return Target(array.shape, dtype, sharding or eight(), (source,))


@pytest.fixture
def bytes_read(monkeypatch):
    counts, preadv = [], os.preadv

    def counting(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


@pytest.fixture
def nothing_left():
    """Checks, when called and after the test, that no arrays lie on the devices and no reader threads run."""
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}

    def check():
        assert [a.shape for a in jax.live_arrays() if id(a) not in before and not a.is_deleted()] == []
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")] == []

    yield check
    check()


# Values.

SHARDINGS = {
    "one device": one,
    "replicated": eight,
    "axis 0": lambda: eight("x"),
    "axis 1": lambda: eight(None, "x"),
    "axis 2": lambda: eight(None, None, "x"),
    "axes 0 and 1": lambda: four_by_two("a", "b"),
    "axes 2 and 0": lambda: four_by_two("b", None, "a"),
    "axis 0, the rest of the mesh replicated": lambda: four_by_two("b"),
    "axis 1 over both mesh axes": lambda: four_by_two(None, ("a", "b")),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_each_device_gets_its_slice(tmp_path, sharding, dtype, bytes_read):
    array = floats(16, 24, 8)
    checkpoint = checkpoint_of(tmp_path, {"x": array, "other": floats(3)})
    bytes_read.clear()
    loaded = load(checkpoint, {"w": plain(array, SHARDINGS[sharding](), dtype)}, ignore=[re.compile("other")])["w"]
    assert (loaded.shape, loaded.dtype, loaded.sharding) == (array.shape, dtype, SHARDINGS[sharding]())
    for shard in loaded.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), array.astype(dtype)[shard.index])
    assert sum(bytes_read) == array.nbytes, "every byte leaves the disk once, however many devices need it"


@pytest.mark.parametrize("sharding", ["one device", "axis 0", "axis 1", "axes 0 and 1"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tensors_of_many_blocks_arrive_whole(tmp_path, monkeypatch, sharding, dtype):
    monkeypatch.setattr(loader, "_BLOCK_BYTES", 1000)  # a row has 96 bytes: blocks of 10, the last one shorter
    monkeypatch.setattr(loader, "_OWN_PAGES_BYTES", 1000)
    array = floats(1048, 24)
    loaded = load(checkpoint_of(tmp_path, {"x": array}, 1), {"w": plain(array, SHARDINGS[sharding](), dtype)})["w"]
    assert np.array_equal(np.asarray(loaded), array.astype(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 8), (8, 0), (1, 1, 6, 5)])
def test_odd_shapes_arrive(tmp_path, shape):
    array = floats(*shape)
    loaded = load(checkpoint_of(tmp_path, {"x": array}, 1), {"w": plain(array)})["w"]
    assert loaded.shape == shape
    assert np.array_equal(np.asarray(loaded), array)


def test_float32_becomes_bfloat16_as_in_torch(tmp_path):
    special = [0.0, -0.0, 1e-40, 3.4e38, float("inf"), float("-inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 2**-134]
    tensor = torch.cat([torch.randn(4086) * 10.0 ** torch.randint(-30, 30, (4086,)), torch.tensor(special)])
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    loaded = load(Checkpoint.open(tmp_path), {"w": plain(tensor.numpy(), one(), BF16)})["w"]
    assert np.array_equal(np.asarray(loaded).astype(np.float32), tensor.bfloat16().float().numpy(), equal_nan=True)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_floats_become_float32_as_in_torch(tmp_path, source):
    tensor = torch.randn(500).to(source)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    loaded = load(Checkpoint.open(tmp_path), {"w": plain(tensor.float().numpy(), one())})["w"]
    assert np.array_equal(np.asarray(loaded), tensor.float().numpy())


def test_integers_arrive_in_what_jax_holds_of_them(tmp_path):
    checkpoint = checkpoint_of(tmp_path, {"count": np.array(2**31 - 1), "mask": np.array([True, False])})
    loaded = load(
        checkpoint,
        {"n": Target((), np.dtype(np.int64), one(), ("count",)), "m": Target((2,), np.dtype(bool), one(), ("mask",))},
    )
    assert int(loaded["n"]) == 2**31 - 1
    assert loaded["m"].tolist() == [True, False]


def test_an_integer_too_large_for_the_device_is_refused(tmp_path, nothing_left):
    checkpoint = checkpoint_of(tmp_path, {"x": np.array([1, 2**31])}, 1)
    with pytest.raises(CheckpointError, match="'x' to fit into int32"):
        load(checkpoint, {"w": Target((2,), np.dtype(np.int64), one(), ("x",))})


def test_a_tensor_may_feed_two_arrays(tmp_path):
    array = floats(8, 4)
    loaded = load(checkpoint_of(tmp_path, {"x": array}, 1), {"a": plain(array), "b": plain(array, eight("x"), BF16)})
    assert np.array_equal(np.asarray(loaded["a"]), array)
    assert np.array_equal(np.asarray(loaded["b"]), array.astype(BF16))


# Stacked layers. Devices with memory of their own have another way of stacking; the CPU backend can go it as well.


@pytest.fixture
def device_memory(monkeypatch):
    """Stack as on devices that have memory of their own."""
    monkeypatch.setattr(loader, "_computes_in_host_memory", lambda sharding: False)


@pytest.fixture(params=["host memory", "device memory"])
def both_ways(request):
    """Runs the test with both ways of stacking."""
    if request.param == "device memory":
        request.getfixturevalue("device_memory")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "sharding",
    [one, eight, lambda: eight(None, "x"), lambda: eight(None, None, "x"), lambda: four_by_two(None, "a", "b")],
    ids=["one device", "replicated", "axis 1", "axis 2", "axes 1 and 2"],
)
def test_layers_are_stacked_in_the_order_of_the_sources(tmp_path, sharding, dtype, bytes_read, both_ways):
    layers = [floats(8, 16) for _ in range(11)]
    checkpoint = checkpoint_of(tmp_path, {f"blocks.{i}.w": layer for i, layer in enumerate(layers)}, shards=3)
    bytes_read.clear()
    sources = tuple(f"blocks.{i}.w" for i in range(11))
    loaded = load(checkpoint, {"blocks.w": Target((11, 8, 16), dtype, sharding(), sources)})["blocks.w"]
    assert (loaded.sharding, loaded.dtype) == (sharding(), dtype)
    assert np.array_equal(np.asarray(loaded), np.stack(layers).astype(dtype))
    assert sum(bytes_read) == 11 * 8 * 16 * 4


def test_a_stack_of_one_layer_keeps_its_axis(tmp_path, both_ways):
    array = floats(8, 4)
    checkpoint = checkpoint_of(tmp_path, {"x": array}, 1)
    loaded = load(checkpoint, {"w": Target((1, 8, 4), F32, eight(None, "x"), ("x",), stacked=True)})["w"]
    assert np.array_equal(np.asarray(loaded), array[None])


def test_a_stack_of_scalars(tmp_path, both_ways):
    checkpoint = checkpoint_of(tmp_path, {f"s{i}": np.array(i, np.float32) for i in range(3)})
    loaded = load(checkpoint, {"w": Target((3,), F32, eight(), ("s0", "s1", "s2"))})["w"]
    assert loaded.tolist() == [0, 1, 2]


def test_layers_are_written_in_place(tmp_path, monkeypatch, device_memory):
    pointers, place = [], loader._place

    def watching(job, array, arrays):
        place(job, array, arrays)
        pointers.append([shard.data.unsafe_buffer_pointer() for shard in arrays["w"].addressable_shards])

    monkeypatch.setattr(loader, "_place", watching)
    checkpoint = checkpoint_of(tmp_path, {f"{i}": floats(8, 16) for i in range(6)})
    load(checkpoint, {"w": Target((6, 8, 16), BF16, eight(None, "x"), tuple("012345"))})
    assert len(pointers) == 6
    assert all(pointer == pointers[0] for pointer in pointers), "a second stack was made: donation did not work"


def test_arrays_do_not_change_after_loading(tmp_path, both_ways):
    arrays = {f"{i}": floats(700, 600) for i in range(8)}  # above the size from which buffers have pages of their own
    checkpoint = checkpoint_of(tmp_path, arrays)
    targets = {name: plain(array, one(), source=name) for name, array in arrays.items() if name != "0"}
    targets |= {"stack": Target((2, 700, 600), F32, eight(), ("0", "1"))}
    loaded = load(checkpoint, targets)
    del checkpoint
    gc.collect()
    # If an array shared memory with a buffer that was freed or reused, this would overwrite it.
    garbage = [np.full((700, 600), np.nan, np.float32) for _ in range(64)]
    assert all(np.array_equal(np.asarray(loaded[name]), arrays[name]) for name in targets if name != "stack")
    assert np.array_equal(np.asarray(loaded["stack"]), np.stack([arrays["0"], arrays["1"]]))
    del garbage


# What is refused before anything is read.


@pytest.fixture
def refuses(bytes_read, nothing_left):
    def check(error, checkpoint, targets, *words, **options):
        bytes_read.clear()
        with pytest.raises(error) as caught:
            load(checkpoint, targets, **options)
        assert not bytes_read, "weights were read before the check"
        for word in words:
            assert word in str(caught.value)

    return check


def test_a_checkpoint_of_another_architecture_is_refused_with_both_lists(tmp_path, refuses):
    array = floats(4)
    checkpoint = checkpoint_of(tmp_path, {"x": array, **{f"theirs.{i}": array for i in range(9)}})
    targets = {"w": plain(array), **{f"v{i}": plain(array, source=f"ours.{i}") for i in range(2)}}
    words = ("2 missing (ours.0, ours.1)", "9 unexpected (theirs.0, theirs.1, theirs.2, theirs.3, …)", "model_id")
    refuses(CheckpointError, checkpoint, targets, *words)


def test_unexpected_tensors_are_refused_unless_a_pattern_names_them(tmp_path, refuses):
    array = floats(4)
    checkpoint = checkpoint_of(tmp_path, {"x": array, "decoder.0": array, "decoder.1": array})
    refuses(CheckpointError, checkpoint, {"w": plain(array)}, "no tensor is missing", "2 unexpected")
    ignore = [re.compile(r"^decoder\.0$")]
    refuses(CheckpointError, checkpoint, {"w": plain(array)}, "1 unexpected (decoder.1)", ignore=ignore)
    assert set(load(checkpoint, {"w": plain(array)}, ignore=[re.compile(r"^decoder\.")])) == {"w"}


def test_a_wrong_shape_names_both_shapes(tmp_path, refuses):
    checkpoint = checkpoint_of(tmp_path, {"x": floats(4, 6)}, 1)
    refuses(CheckpointError, checkpoint, {"w": plain(floats(6, 4))}, "'x' of shape (6, 4)", "got (4, 6)")


def test_a_wrong_shape_within_a_stack_names_the_layer(tmp_path, refuses):
    checkpoint = checkpoint_of(tmp_path, {"a": floats(4), "b": floats(5)})
    refuses(CheckpointError, checkpoint, {"w": Target((2, 4), F32, eight(), ("a", "b"))}, "'b'", "(4,)", "(5,)")


@pytest.mark.parametrize("source", [np.int8, np.int64, np.uint8, np.bool_])
def test_integers_do_not_become_floats(tmp_path, refuses, source):
    checkpoint = checkpoint_of(tmp_path, {"x": np.ones(4, source)}, 1)
    refuses(CheckpointError, checkpoint, {"w": plain(floats(4))}, "'x' as floating point", f"got {np.dtype(source)}")


def test_floats_do_not_become_integers(tmp_path, refuses):
    checkpoint = checkpoint_of(tmp_path, {"x": floats(4)}, 1)
    refuses(CheckpointError, checkpoint, {"w": plain(floats(4), dtype=np.dtype(np.int32))}, "as integers")


def test_a_sharding_that_does_not_divide_the_array_is_a_plan_error(tmp_path, refuses):
    array = floats(12, 8)
    checkpoint = checkpoint_of(tmp_path, {"x": array}, 1)
    refuses(PlanError, checkpoint, {"w": plain(array, eight("x"))}, "w: ", "(12, 8)", "Choose another plan")
    refuses(PlanError, checkpoint, {"w": plain(array, eight(None, None, "x"))}, "w: ", "(12, 8)")


def test_a_stack_sharded_over_its_layers_is_a_plan_error(tmp_path, refuses):
    names = [f"{i}" for i in range(8)]
    checkpoint = checkpoint_of(tmp_path, {name: floats(4) for name in names})
    refuses(PlanError, checkpoint, {"w": Target((8, 4), F32, eight("x"), tuple(names))}, "axis 0 whole")


def test_a_stack_needs_as_many_layers_as_sources(tmp_path, refuses):
    checkpoint = checkpoint_of(tmp_path, {"a": floats(4), "b": floats(4)})
    refuses(PlanError, checkpoint, {"w": Target((3, 4), F32, eight(), ("a", "b"))}, "axis of 2 layers", "(3, 4)")


def test_there_must_be_a_reader(tmp_path, refuses):
    checkpoint = checkpoint_of(tmp_path, {"x": floats(4)}, 1)
    refuses(InvalidInput, checkpoint, {"w": plain(floats(4))}, "at least 1 reader; got 0", readers=0)


# Progress, Cancel and faults on the way.


class Recorder(Reporter):
    def __init__(self, cancel_after=None):
        self.seen, self.threads, self.cancel_after = [], set(), cancel_after

    def progress(self, stage, done, total):
        self.seen.append((stage, done, total))
        self.threads.add(threading.current_thread())

    def check_cancelled(self):
        if self.cancel_after is not None and len(self.seen) >= self.cancel_after:
            raise KeyboardInterrupt("cancelled")


def ten_plain_and_a_stack(folder):
    arrays = {f"{i}": floats(64, 32) for i in range(20)}
    targets = {f"w{i}": plain(arrays[f"{i}"], eight("x"), source=f"{i}") for i in range(10)}
    targets["stack"] = Target((10, 64, 32), F32, eight(None, "x"), tuple(f"{i}" for i in range(10, 20)))
    return checkpoint_of(folder, arrays, 3), targets


def test_progress_counts_tensors_in_the_callers_thread(tmp_path):
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)
    with reporting(Recorder()) as recorder:
        load(checkpoint, targets, stage="loading vae")
    assert [done for _, done, _ in recorder.seen] == list(range(1, 21))
    assert {total for _, _, total in recorder.seen} == {20}
    stages = list(dict.fromkeys(stage for stage, _, _ in recorder.seen))
    assert stages == [f"loading vae (shard {number} of 3)" for number in (1, 2, 3)]
    assert recorder.threads == {threading.current_thread()}


@pytest.mark.parametrize("after", [0, 1, 5, 13, 20])
@pytest.mark.parametrize("readers", [1, 4, 32])
def test_cancel_leaves_nothing_on_the_devices(tmp_path, nothing_left, both_ways, after, readers):
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)
    with reporting(Recorder(cancel_after=after)) as recorder, pytest.raises(KeyboardInterrupt) as caught:
        load(checkpoint, targets, readers=readers)
    assert len(recorder.seen) in (after, 1), "Cancel was noticed too late"
    assert caught.traceback  # it is alive here, and with it the loader's frames
    nothing_left()


@pytest.mark.parametrize("readers", [1, 4])
def test_a_read_error_leaves_nothing_on_the_devices(tmp_path, nothing_left, both_ways, readers):
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)
    path = checkpoint.tensors["13"].file
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(checkpoint, targets, readers=readers)


def test_a_failing_device_leaves_nothing_on_the_devices(tmp_path, nothing_left, monkeypatch, device_memory):
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)

    def out_of_memory(target):
        raise MemoryError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(loader, "_empty_stack", out_of_memory)
    with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED") as caught:
        load(checkpoint, targets)
    assert caught.traceback
    nothing_left()


def test_cancel_gives_host_memory_back_while_the_traceback_lives(tmp_path, monkeypatch):
    made, empty = [], loader._empty

    def watched(shape, dtype):
        array = empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(loader, "_empty", watched)
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)
    with reporting(Recorder(cancel_after=13)), pytest.raises(KeyboardInterrupt) as caught:
        load(checkpoint, targets)
    assert caught.traceback
    assert len(made) > 8
    gc.collect()  # JAX lets go of memory it shared when Python collects garbage
    assert [array().shape for array in made if array() is not None] == []


def test_cancel_stops_the_readers_within_a_block(tmp_path, monkeypatch, bytes_read, nothing_left):
    monkeypatch.setattr(loader, "_BLOCK_BYTES", 4096)
    arrays = {"small": floats(4), **{f"{i}": floats(2000, 1024) for i in range(3)}}
    write_file(tmp_path / "model.safetensors", arrays)
    targets = {name: plain(array, one(), source=name) for name, array in arrays.items()}
    checkpoint = Checkpoint.open(tmp_path)
    bytes_read.clear()
    with reporting(Recorder(cancel_after=1)), pytest.raises(KeyboardInterrupt):
        load(checkpoint, targets)
    assert sum(bytes_read) < sum(array.nbytes for array in arrays.values()) / 2


@pytest.mark.parametrize("readers", [1, 3])
def test_no_more_tensors_are_in_flight_than_readers(tmp_path, monkeypatch, readers):
    checkpoint, targets = ten_plain_and_a_stack(tmp_path)
    place, read, lock, state = loader._place, loader._read, threading.Lock(), {"now": 0, "peak": 0}

    def counted_read(*args):
        with lock:
            state["now"] += 1
            state["peak"] = max(state["peak"], state["now"])
        return read(*args)

    def counted_place(*args):
        place(*args)
        with lock:
            state["now"] -= 1

    monkeypatch.setattr(loader, "_read", counted_read)
    monkeypatch.setattr(loader, "_place", counted_place)
    load(checkpoint, targets, readers=readers)
    assert state["peak"] <= readers


# Whole processes: memory, and several hosts.


def run_probe(function, *args, **env):
    """Run a function of this module in a process of its own; returns what it printed as JSON."""
    code = f"from tests.runtime import test_loader; test_loader.{function}({', '.join(map(repr, args))})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
    )


def result_of(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def memory_probe(folder, blocks, stacked, dtype, host_memory):
    """Load the large checkpoint and print how much memory that took, in MiB."""
    loader._computes_in_host_memory = lambda sharding: host_memory
    checkpoint = Checkpoint.open(Path(folder))
    targets = large_targets(blocks, stacked, np.dtype(dtype))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))
    before = status_mib("VmRSS")
    arrays = load(checkpoint, targets)
    device = sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards) / 2**20
    growth, left = status_mib("VmHWM") - before, status_mib("VmRSS") - before
    info = checkpoint.tensors[f"blocks.{blocks - 1}.down.weight"]
    loaded = arrays["blocks.down"][blocks - 1] if stacked else arrays[info.name]
    right = np.array_equal(np.asarray(loaded), checkpoint.read(info.name).astype(dtype))
    print(json.dumps({"device": device, "peak": growth, "left": left, "right": right}))


def large_targets(blocks, stacked, dtype):
    shapes = large.shapes(blocks)
    if not stacked:
        spec = {1: P(), 2: P("x")}
        return {n: Target(s, dtype, eight(*spec[len(s)]), (n,)) for n, s in shapes.items()}
    single = {n: Target(s, dtype, eight(None, "x"), (n,)) for n, s in large.SINGLE.items()}
    specs = {"attention": (None, "x"), "up": (None, "x"), "down": (None, None, "x"), "norm": ()}
    sources = {name: tuple(f"blocks.{i}.{name}.weight" for i in range(blocks)) for name in specs}
    stacks = {
        f"blocks.{name}": Target((blocks, *shape), dtype, eight(*specs[name]), sources[name])
        for name, shape in large.BLOCK.items()
    }
    return {**single, **stacks}


def status_mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    folder = large.write(tmp_path_factory.mktemp("large"), blocks=17)
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("stacked", "dtype", "host_memory"),
    [(False, "bfloat16", True), (True, "float32", True), (True, "bfloat16", False)],
    ids=["single tensors", "stacks in host memory, converted", "stacks in device memory"],
)
def test_two_gigabytes_load_with_little_memory_beside_the_arrays(large_checkpoint, stacked, dtype, host_memory):
    assert sum(path.stat().st_size for path in large_checkpoint.iterdir()) > 2e9
    memory = result_of(run_probe("memory_probe", str(large_checkpoint), 17, stacked, dtype, host_memory))
    assert memory["right"]
    assert memory["device"] < memory["peak"] + 100, "the arrays are not counted: the figures below would mean nothing"
    assert memory["peak"] - memory["device"] < 400
    assert memory["left"] - memory["device"] < 150, "host copies live on"


def host_probe(folder, address, host):
    """One of two hosts with 4 devices each: load arrays over all 8, print the bytes read and whether all is right."""
    jax.distributed.initialize(address, num_processes=2, process_id=host)
    counts, preadv = [], os.preadv
    checkpoint = Checkpoint.open(Path(folder))
    os.preadv = lambda *args: counts.append(preadv(*args)) or counts[-1]
    targets = {
        "rows": Target((64, 16), F32, eight("x"), ("rows",)),
        "stack": Target((3, 64, 16), F32, eight(None, "x"), ("0", "1", "2")),
    }
    loaded = load(checkpoint, targets)
    os.preadv = preadv
    whole = {"rows": checkpoint.read("rows"), "stack": np.stack([checkpoint.read(name) for name in "012"])}
    right = all(
        np.array_equal(np.asarray(shard.data), whole[name][shard.index])
        for name, array in loaded.items()
        for shard in array.addressable_shards
    )
    print(json.dumps({"read": sum(counts), "devices": len(jax.devices()), "right": right}))


def test_each_host_reads_only_what_its_devices_need(tmp_path):
    write_sharded(tmp_path, {name: floats(64, 16) for name in ("rows", "0", "1", "2")}, 2)
    address = f"127.0.0.1:{free_port()}"
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    hosts = [run_probe("host_probe", str(tmp_path), address, host, **env) for host in range(2)]
    for result in map(result_of, hosts):
        assert result == {"read": 4 * 64 * 16 * 4 // 2, "devices": 8, "right": True}


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("axis", "spec"), [(0, P("x")), (1, P(None, "x"))])
@pytest.mark.parametrize("stacked", [False, True])
def test_each_device_gets_its_part_of_every_unit(tmp_path, axis, spec, stacked):
    names = ("a", "b") if stacked else ("a",)
    stored = {name: floats(48, 72) for name in names}
    spec = P(None, *spec) if stacked else spec
    shape = (2, 48, 72) if stacked else (48, 72)
    target = Target(shape, F32, eight(*spec), names, stacked, units=(axis, 3))
    array = load(checkpoint_of(tmp_path, stored), {"w": target})["w"]
    assert array.shape == shape
    expected = np.stack([stored[name] for name in names]) if stacked else stored["a"]
    for number, device in enumerate(jax.devices()):
        (shard,) = (shard.data for shard in array.addressable_shards if shard.device == device)
        units = np.split(expected, 3, axis=axis - 2)
        mine = np.concatenate([np.split(unit, 8, axis=axis - 2)[number] for unit in units], axis=axis - 2)
        np.testing.assert_array_equal(shard, mine)
