"""Device modules: what a Diffusers pipeline takes for a torch module, computed by JAX on the devices.

A :class:`DeviceModule` knows its checkpoint folder and its plan. It holds no weights: each call leases them from the
registry, which loads them on first use and may evict them between calls.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from comfyui_tpu.runtime import bridge, loader, plan_choice, program, skeleton
from comfyui_tpu.runtime.checkpoint import Checkpoint, explained_settings, read_config
from comfyui_tpu.runtime.errors import CheckpointError
from comfyui_tpu.runtime.integrity import verify_if_asked
from comfyui_tpu.runtime.memory import simulate_allocation
from comfyui_tpu.runtime.plan import Plan, mesh_of, sharding
from comfyui_tpu.runtime.registry import Need, registry
from comfyui_tpu.runtime.reporting import current_reporter


@dataclass(frozen=True)
class ComponentSpec:
    """The facts about one kind of component: a table, filled in by ``models/``.

    Attributes:
        name: what people call it (``"transformer"``); also its folder in the checkpoint.
        build: config → torch module; called where weights are not allocated.
        methods: name → function of the module (and its inputs by keyword) that is compiled as one program.
        plans: (number of chips, config) → the plans this component can run under, the usual one first.
        stacked: the block lists that run as one scan: dotted paths, or scans with the names of what they carry.
        keep_float32: parts of dotted names whose weights stay float32 when the rest is bfloat16.
        always_float32: the whole component computes in float32 on every device.
        unused: patterns of checkpoint tensors that the module does not need.
        prefixes: what may stand before the module's own names in the checkpoint, where it is a part of what is stored.
        config_class: expected ``_class_name`` or ``architectures`` entry of config.json.
    """

    name: str
    build: Callable[[dict], torch.nn.Module]
    methods: Mapping[str, Callable[..., Any]]
    plans: Callable[[int, dict], tuple[Plan, ...]]
    config_class: str
    stacked: tuple[str | skeleton.Scan, ...] = ()
    keep_float32: tuple[str, ...] = ()
    always_float32: bool = False
    unused: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Options:
    """Caller's options that change a program."""

    smooth_keys: bool = False


def _weights_identity(folder: Path) -> str:
    """Changes when a component's files do; equal for folders that hold links to the same weight files.

    Weights are known by their place on the disk (a hash of 28 GB would take longer than loading them), the small files
    beside them by their content.
    """
    identity = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        stat = path.stat()
        place = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".json" else place
        identity.append([path.name, content])
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class DeviceModule:
    """A component of a checkpoint, running on ``devices`` under ``plan``.

    Subclasses in ``models/`` add the call signature the pipelines use. Attributes a pipeline reads: ``config``,
    ``dtype`` (what it casts inputs to), ``device`` (always the CPU: tensors enter and leave there).
    """

    def __init__(
        self,
        spec: ComponentSpec,
        checkpoint_folder: Path,
        *,
        devices: tuple[jax.Device, ...] | None = None,
        plan: Plan | None = None,
    ):
        self.spec = spec
        self.folder = Path(checkpoint_folder) / spec.name
        self.raw_config = read_config(self.folder)
        _check_class(spec, self.folder, self.raw_config)
        self.devices = tuple(devices or jax.devices())
        admitted = spec.plans(len(self.devices), self.raw_config)
        self.plan = plan or plan_choice.chosen(admitted, spec.config_class, self.devices)
        self.mesh = mesh_of(self.plan, self.devices)
        self.options = Options()
        self.identity = _weights_identity(self.folder)
        self.compute_dtype = _compute_dtype(spec, self.devices)
        # The planner's recorder: takes this module's calls (module, method, placed inputs, donated names) in place of
        # the devices, and returns described arrays (ShapeDtypeStructs with shardings).
        self.rehearsal: Callable[..., Any] | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return bridge.TORCH_DTYPES[self.compute_dtype]

    @functools.cached_property
    def skeleton(self) -> skeleton.Skeleton:
        with explained_settings(self.folder):
            return skeleton.build(functools.partial(self.spec.build, self.raw_config), self.spec.stacked)

    @property
    def config(self) -> Any:
        return self.skeleton.module.config

    def describe_plan(self) -> str:
        """Which plan runs where, for people: ``"fsdp over 8 × TPU v6 lite, bfloat16"``."""
        first = self.devices[0]
        kind = first.device_kind if first.platform != "cpu" else "CPU (no TPU found)"
        return f"{self.plan.name} over {len(self.devices)} × {kind}, {self.compute_dtype.name}"

    def modules(self) -> Iterator[torch.nn.Module]:
        """No torch submodules: Diffusers looks for offloading hooks in them."""
        return iter(())

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any):
        """Diffusers' hook for step caches; there is none here."""
        yield

    def run(self, method: str, inputs: Mapping[str, Any], donate: tuple[str, ...] = ()) -> Any:
        """Run ``spec.methods[method](module, **inputs)`` on the devices.

        Args:
            inputs: by name, pytrees of CPU torch tensors or of JAX arrays that a former run returned.
            donate: names of inputs whose device memory the program may reuse; they are gone afterwards.

        Returns:
            The method's result with JAX arrays, ready (computation finished).
        """
        current_reporter().check_cancelled()
        placed = registry().run_with_room(lambda: self._placed(inputs), what=f"placing inputs of the {self.spec.name}")
        if self.rehearsal is not None:
            return self.rehearsal(self, method, placed, donate)
        kept = {name: value for name, value in placed.items() if name not in donate}
        given = {name: value for name, value in placed.items() if name in donate}
        label = f"{self.spec.name} of {self.folder.parent.name}"
        # Compiled before the weights are loaded: the compiler knows how much room the call needs beside them.
        with registry().explained(f"compiling the {label}", Need(self.devices, self.bytes_per_device)):
            executable = self._program(method, program.abstract(kept), program.abstract(given))
        need = Need(self.devices, self.bytes_per_device, executable.workspace_bytes)
        with registry().lease(self.key, label, self._load, need) as params:

            def work() -> Any:
                simulate_allocation(self.devices, need.workspace)
                return jax.block_until_ready(executable.run(dict(params), kept, given))

            # A failed run may already have consumed what it was given, so only runs without donations can be repeated.
            return registry().run_with_room(work, what=f"running the {label}", repeatable=not given, need=need)

    def output_shapes(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """Shapes and dtypes of what :meth:`run` would return, without computing it."""
        inputs = program.abstract(self._placed(inputs))
        return jax.eval_shape(self._traceable(method), self.parameter_shapes(), inputs, {})

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return jax.tree.map(self._place, dict(inputs), is_leaf=lambda x: isinstance(x, torch.Tensor))

    def with_options(self, options: Options) -> DeviceModule:
        """The same module (and the same weights) with other options."""
        other = copy.copy(self)
        other.options = options
        return other

    @functools.cached_property
    def key(self) -> tuple:
        """Identity of the weights on the devices: checkpoints that share a component's files share its arrays."""
        return (self.spec.build, self.identity, self.plan, self.devices, self.dtype)

    def _place(self, value: Any) -> jax.Array:
        """A CPU tensor as a device array (in a rehearsal: described); arrays that are on the devices stay there."""
        if isinstance(value, jax.Array):
            return value
        if self.rehearsal is not None:
            return self.describe(value)
        array = bridge.to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        return jax.device_put(array, self.activation_sharding(array.shape))

    def describe(self, value: torch.Tensor | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding that ``value`` has as an input or output of a program."""
        shape = tuple(value.shape)
        dtype = bridge.numpy_dtype(value.dtype) if isinstance(value, torch.Tensor) else value.dtype
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.activation_sharding(shape))

    def activation_sharding(self, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Where an input or output of ``shape`` lies."""
        return sharding(self.plan, self.devices, self.plan.activation_spec(shape))

    def _program(self, method: str, kept: Any, given: Any) -> program.Program:
        # How long compilation takes depends on the sizes, so a person is told them.
        largest = max((x.shape for x in jax.tree.leaves(kept)), key=np.prod, default=())
        label = f"{self.spec.name} ({method}, {'×'.join(map(str, largest))})"
        key = self.program_key(method, kept, given)
        options = program.compiler_options(self.devices)
        return program.program(key, label, lambda: self.lower(method, kept, given), options)

    def program_key(self, method: str, kept: Any, given: Any) -> tuple:
        """Identity of a method's program for inputs of these shapes (pytrees of ShapeDtypeStructs)."""
        described = tuple((path, x.shape, x.dtype, x.sharding) for path, x in jax.tree.leaves_with_path((kept, given)))
        # Not the component's name: two experts of one architecture run the same program.
        return (
            *(self.spec.build, self._config_fingerprint, self.plan, self.devices, self.dtype, self.options),
            *(method, described),
        )

    @functools.cached_property
    def _config_fingerprint(self) -> str:
        # Keys with an underscore say where the config came from, not what it describes.
        config = {key: value for key, value in self.raw_config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

    def lower(self, method: str, kept: Mapping[str, Any], given: Mapping[str, Any]) -> jax.stages.Lowered:
        """The program of a method for inputs of these shapes, ready to compile; see :meth:`trace`."""
        return self.trace(method, kept, given).lower()

    def trace(self, method: str, kept: Mapping[str, Any], given: Mapping[str, Any]) -> jax.stages.Traced:
        """Trace a method from shapes alone (pytrees of ShapeDtypeStructs with shardings; ``given`` is donated).

        The planner calls this with described devices; :meth:`run` with real ones. There is no other way to a program.
        """
        return program.trace(self._traceable(method), self.parameter_shapes(), kept, given, self.activation_sharding)

    def _traceable(self, method: str) -> Callable[[dict, dict, dict], Any]:
        """The method as a pure JAX function of (parameters, kept inputs, donated inputs)."""
        context = bridge.TraceContext(self.plan, self.mesh, self.options.smooth_keys)
        # Matmuls and convolutions of float32 components would otherwise run in one bfloat16 pass on a TPU.
        precision = "high" if self.compute_dtype == jnp.float32 else None

        def function(params, kept, given):
            with jax.default_matmul_precision(precision):
                return bridge.trace(self.spec.methods[method], self.skeleton.module, context, params, **kept, **given)

        return function

    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name → shape, dtype and sharding of everything :meth:`run` passes as parameters."""
        shapes = {
            name: jax.ShapeDtypeStruct(
                weight.shape, self._weight_dtype(name, weight), sharding=self._weight_sharding(name, weight)
            )
            for name, weight in self.skeleton.weights.items()
        }
        replicated = sharding(self.plan, self.devices, jax.sharding.PartitionSpec())
        for name, tensor in self.skeleton.computed.items():
            array = bridge.to_numpy(tensor)
            shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated)
        return shapes

    def _weight_dtype(self, name: str, weight: skeleton.Weight) -> np.dtype:
        if not weight.dtype.is_floating_point:
            return bridge.numpy_dtype(weight.dtype)
        if any(part in self.spec.keep_float32 for part in name.split(".")):
            return jnp.dtype(jnp.float32)
        return self.compute_dtype

    def _weight_sharding(self, name: str, weight: skeleton.Weight) -> jax.sharding.Sharding:
        return sharding(self.plan, self.devices, self.plan.weight_spec(name, weight.shape, weight.stacked))

    @functools.cached_property
    def bytes_per_device(self) -> int:
        """What the weights take on each device."""
        # Kept: every step of every run asks for it, whether or not the weights have to be loaded.
        return sum(
            int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in self.parameter_shapes().values()
        )

    def check_files(self) -> None:
        """Raise CheckpointError if a weight file is missing, truncated or malformed. Reads headers only.

        With ``COMFYUI_TPU_VERIFY=1`` also if a file's SHA-256 is not its publisher's.
        """
        Checkpoint.open(self.folder)
        verify_if_asked(self.folder)

    def _load(self) -> dict[str, jax.Array]:
        checkpoint = Checkpoint.open(self.folder)
        shapes = self.parameter_shapes()
        targets = {
            name: loader.Target(
                shape=shapes[name].shape,
                dtype=shapes[name].dtype,
                sharding=shapes[name].sharding,
                sources=tuple(_stored_name(checkpoint, names, self.spec.prefixes) for names in weight.sources),
                stacked=weight.stacked,
                units=weight.units if self.plan.splits_features else None,
            )
            for name, weight in self.skeleton.weights.items()
        }
        arrays = loader.load(checkpoint, targets, ignore=self._unused_names(targets), stage=f"loading {self.spec.name}")
        with loader.deleted_on_error(arrays):
            for name, tensor in self.skeleton.computed.items():
                # A copy: on the CPU backend device_put may share memory with the torch buffer.
                arrays[name] = jax.device_put(bridge.to_numpy(tensor).copy(), shapes[name].sharding)
        return arrays

    def _unused_names(self, targets: Mapping[str, loader.Target]) -> list:
        """Patterns of tensors that may stay unread: the spec's, and the other names of tied weights."""
        used = {name for target in targets.values() for name in target.sources}
        names = {a for w in self.skeleton.weights.values() for names in w.sources for a in names}
        aliases = {prefix + name for name in names for prefix in self.spec.prefixes} - used
        return [re.compile(p) for p in self.spec.unused] + [re.compile(f"^{re.escape(a)}$") for a in sorted(aliases)]


def _stored_name(checkpoint: Checkpoint, names: tuple[str, ...], prefixes: tuple[str, ...]) -> str:
    """Under which prefix and which of a tied weight's names the checkpoint stores it (the first if under none)."""
    possible = [prefix + name for prefix in prefixes for name in names]
    return next((name for name in possible if name in checkpoint.tensors), possible[0])


def _check_class(spec: ComponentSpec, folder: Path, config: dict) -> None:
    found = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if found != spec.config_class:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a {found or 'component without a class'}; the {spec.name} here must "
            f"be a {spec.config_class}. Check that model_id names a checkpoint of this family."
        )


def _compute_dtype(spec: ComponentSpec, devices: tuple[jax.Device, ...]) -> np.dtype:
    """bfloat16 on accelerators; float32 on the CPU backend, where it is the reference's dtype and no slower."""
    if spec.always_float32 or devices[0].platform == "cpu":
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16)
