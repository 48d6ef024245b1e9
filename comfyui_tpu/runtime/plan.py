"""Sharding plans: how a model is spread over chips, written as data.

A :class:`Plan` names the mesh axes, maps parameter names to placements, and says which activations carry a sharding
constraint. It holds no devices and no arrays, so it can be compared, hashed, printed and planned with on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from comfyui_tpu.runtime.errors import PlanError

_LARGEST_RING = 16  # the search for a ring is exponential; more chips than this share no such plan
# Placements a rule may name besides an explicit PartitionSpec.
REPLICATED = "replicated"
LARGEST_AXIS = "largest axis"
# The two halves of tensor parallelism, for weights of linear layers: ``[..., outputs, inputs]``, biases ``[outputs]``.
OUTPUTS, INPUTS = "output features", "input features"

ATTENTION = ("heads", "ring", "replicated", "own heads")


@dataclass(frozen=True)
class Plan:
    """How one component runs on a mesh.

    Attributes:
        name: short name for people, such as ``"fsdp"``.
        axes: mesh axes as ``((name, size), ...)``; the product of the sizes is the number of chips.
        weights: ``((pattern, placement), ...)``: the first pattern found in a parameter's name (``re.search``) decides.
            A placement is a PartitionSpec, or over all mesh axes :data:`LARGEST_AXIS`, :data:`OUTPUTS` or
            :data:`INPUTS`, or :data:`REPLICATED`. Leading layer axes of stacked weights are never sharded and never
            counted.
        gather_weights: sharded weights of repeated blocks are gathered just before their layer uses them (FSDP).
        shard_tokens: the token axis of ``[B, S, C]`` activations between blocks is spread over all chips.
        attention: ``"heads"``: each chip attends for some heads over all tokens (heads exchanged before and after), and
            where heads are too few for that, keys go round a ring of as few chips as waste least; ``"ring"``: keys go
            round all chips; ``"own heads"``: each chip makes the queries, keys and values of its heads for all tokens,
            so that nothing has to move (tensor parallelism); ``"replicated"``: no constraint on attention. Contexts
            shorter than the queries stay whole.
        ring_chips: with ``"heads"``, over how many chips keys go round; None decides by the number of heads.
        min_sharded_elements: smaller parameters are replicated under :data:`LARGEST_AXIS`: gathering them would cost a
            collective's latency to save under 128 KiB a chip.
        batch_axes: mesh axes over which a batch is split where they divide it, such as the two branches of guidance;
            tokens are then spread over the other axes.
        shard_space: height and width of ``[B, C, H, W]`` and ``[B, C, T, H, W]`` activations are spread over the axes.
    """

    name: str
    axes: tuple[tuple[str, int], ...]
    weights: tuple[tuple[str, PartitionSpec | str], ...] = ()
    gather_weights: bool = False
    shard_tokens: bool = False
    attention: Literal["heads", "ring", "replicated", "own heads"] = "replicated"
    ring_chips: int | None = None
    min_sharded_elements: int = 2**16
    batch_axes: tuple[str, ...] = ()
    shard_space: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise PlanError(f"plan '{self.name}': attention must be one of {ATTENTION}; got {self.attention!r}.")
        if self.ring_chips is None:
            return
        if self.attention != "heads" or self.ring_chips < 1 or self.chips % self.ring_chips:
            raise PlanError(
                f"plan '{self.name}': ring_chips goes with attention='heads' and must divide the {self.chips} chips; "
                f"got {self.ring_chips} with {self.attention!r}."
            )

    @property
    def chips(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def splits_features(self) -> bool:
        """Whether this is tensor parallelism over more than one chip."""
        return self.attention == "own heads" and self.chips > 1

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def axes_of(self, batch: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Over which axes a batch of that size is split, and over which its tokens are."""
        ways = math.prod(size for name, size in self.axes if name in self.batch_axes)
        if batch % ways:
            return (), self.axis_names
        return self.batch_axes, tuple(name for name in self.axis_names if name not in self.batch_axes)

    def splits_batch(self, batch: int) -> bool:
        """Whether the chips share a batch of that size."""
        return self.chips > 1 and bool(self.axes_of(batch)[0])

    def weight_spec(self, name: str, shape: Sequence[int], stacked: bool = False) -> PartitionSpec:
        """The placement of parameter ``name`` of ``shape`` (with its leading layer axis if ``stacked``)."""
        placement = next((p for pattern, p in self.weights if re.search(pattern, name)), REPLICATED)
        if placement == REPLICATED or self.chips == 1:
            return PartitionSpec()
        own = tuple(shape[1:] if stacked else shape)
        spec = self._spec(placement, own)
        self._check_divides(name, own, spec)
        return PartitionSpec(None, *spec) if stacked and len(spec) else spec

    def _spec(self, placement: PartitionSpec | str, shape: tuple[int, ...]) -> PartitionSpec:
        if placement == LARGEST_AXIS:
            return self._largest_axis_spec(shape)
        if placement not in (OUTPUTS, INPUTS):
            return placement
        # A bias belongs to the outputs; of what has no such axis, or one that does not divide, every chip has all.
        axis = len(shape) - 1 if placement == INPUTS or len(shape) == 1 else len(shape) - 2
        if (placement == INPUTS and len(shape) == 1) or shape[axis] % self.chips:
            return PartitionSpec()
        return PartitionSpec(*([None] * axis), self.axis_names)

    def _largest_axis_spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        if math.prod(shape) < self.min_sharded_elements:
            return PartitionSpec()
        divisible = [(size, -axis) for axis, size in enumerate(shape) if size % self.chips == 0]
        if not divisible:
            return PartitionSpec()
        axis = -max(divisible)[1]
        return PartitionSpec(*([None] * axis), self.axis_names)

    def _check_divides(self, name: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
        sizes = dict(self.axes)
        for length, axes in zip(shape, spec, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            ways = math.prod(sizes[axis] for axis in names)
            if length % ways:
                raise PlanError(
                    f"plan '{self.name}' splits {name} of shape {shape} {ways} ways, but {length} does not divide by "
                    f"{ways}. Use a plan with {LARGEST_AXIS!r} for it, or another number of chips."
                )

    def activation_spec(self, shape: Sequence[int]) -> PartitionSpec:
        """The placement of a program's input or output of ``shape``: spatial for pictures, else replicated.

        Pictures are ``[B, C, H, W]`` and ``[B, C, T, H, W]``.

        Mesh axes go to the height as long as they divide it, the rest to the width; axes that divide neither
        replicate. So 60 × 106 latents on 2 × 2 × 2 chips are split 4 × 2.
        """
        if not self.shard_space or len(shape) not in (4, 5):
            return PartitionSpec()
        height, width = shape[-2:]
        rows: list[str] = []
        columns: list[str] = []
        for axis, size in self.axes:
            if height % size == 0:
                rows.append(axis)
                height //= size
            elif width % size == 0:
                columns.append(axis)
                width //= size
        leading = [None] * (len(shape) - 2)
        return PartitionSpec(*leading, tuple(rows) or None, tuple(columns) or None)


def spread(chips: int) -> Plan:
    """The default plan of transformers and text encoders: weights and tokens over all chips, attention by heads."""
    return Plan(
        name="fsdp",
        axes=(("chips", chips),),
        weights=((".", LARGEST_AXIS),),
        gather_weights=True,
        shard_tokens=True,
        attention="heads",
    )


def guided(chips: int) -> Plan:
    """As :func:`spread`, with each branch of classifier-free guidance on half of the chips; for an even number."""
    return dataclasses.replace(
        spread(chips), name="fsdp by branch", axes=(("branch", 2), ("chips", chips // 2)), batch_axes=("branch",)
    )


def tensor(chips: int, outputs: str, inputs: str, shard_tokens: bool = False) -> Plan:
    """Tensor parallelism: weights stay where they are, activations come to them. For few tokens and large weights.

    Args:
        outputs: pattern of the weights split along their output features (queries, keys, values, first of two).
        inputs: pattern of those split along their input features (output projections, second of two).
        shard_tokens: between the two the tokens are spread over the chips; each chip then normalises its own.
    """
    return Plan(
        name="tensor",
        axes=(("chips", chips),),
        weights=((outputs, OUTPUTS), (inputs, INPUTS), (".", LARGEST_AXIS)),
        shard_tokens=shard_tokens,
        attention="own heads",
    )


def spatial(chips: int) -> Plan:
    """The default plan of autoencoders: replicated weights, height and width over the chips.

    The mesh is the prime factors of ``chips``, so that each factor can go to whichever of height and width it divides.
    """
    return Plan(
        name="spatial",
        axes=tuple((f"space{i}", size) for i, size in enumerate(_prime_factors(chips))) or (("space0", 1),),
        shard_space=True,
    )


def _prime_factors(number: int) -> list[int]:
    factors, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return factors


@functools.lru_cache(maxsize=64)
def mesh_of(plan: Plan, devices: tuple[jax.Device, ...]) -> Mesh:
    """The plan's mesh over ``devices``; PlanError when their number is not what the plan was made for."""
    if len(devices) != plan.chips:
        raise PlanError(f"plan '{plan.name}' is made for {plan.chips} chips; got {len(devices)} devices.")
    sizes = [size for _, size in plan.axes]
    ordered = neighbours_in_a_ring(devices) if plan.splits_features else devices
    return Mesh(np.array(ordered, dtype=object).reshape(sizes), plan.axis_names)


def neighbours_in_a_ring(devices: tuple[jax.Device, ...]) -> tuple[jax.Device, ...]:
    """``devices`` so that each is linked to the next and the last to the first, where they can be; else as they are.

    Devices are linked when they are on one chip or their chips lie side by side (no wrap-around is assumed).
    """
    places = [tuple(getattr(device, "coords", None) or ()) for device in devices]
    if len(devices) < 3 or len(devices) > _LARGEST_RING or not all(places):
        return devices
    linked = [[_distance(a, b) <= 1 and i != j for j, b in enumerate(places)] for i, a in enumerate(places)]

    def extended(path: list[int]) -> list[int] | None:
        if len(path) == len(devices):
            return path if linked[path[-1]][path[0]] else None
        free = (i for i in range(len(devices)) if linked[path[-1]][i] and i not in path)
        return next((ring for i in free if (ring := extended([*path, i]))), None)

    return tuple(devices[i] for i in extended([0]) or range(len(devices)))


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def sharding(plan: Plan, devices: tuple[jax.Device, ...], spec: PartitionSpec) -> NamedSharding:
    """``spec`` on the plan's mesh over ``devices``."""
    return NamedSharding(mesh_of(plan, devices), spec)
