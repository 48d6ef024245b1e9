"""TPU generations and topologies as data, and devices that are only described.

"Chip" here is what JAX calls a device: on v4 and v5p both cores of a chip together, on v7x one of a chip's two cores.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfyui_tpu.runtime.errors import PlanError

GIB = 2**30

# For a process that compiles for described devices, before it imports JAX: no TPU is looked for, and several may use
# the compiler at once. It otherwise also looks for the TPU VM around it, and complains on the terminal that there is
# none; the last two do not decide what is compiled for.
COMPILER_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
}


@dataclass(frozen=True)
class Generation:
    """What one JAX device of a generation can do.

    Attributes:
        name: as people write it (``"v6e"``).
        compiler_name: as the compiler's topologies spell it.
        flops_per_cycle: bfloat16 multiply-adds count two.
        clock: cycles per second.
        hbm_bytes: what a program may use, as the compiler itself reports when it runs out.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second and direction of one inter-chip link.
        axes: of the interconnect: 2 or 3.
        devices_per_chip: JAX devices per chip.
        chip_config: the compiler's name for a chip's configuration, where the default is not what JAX uses.
        whole: the largest topology of one host, for suggestions.
    """

    name: str
    compiler_name: str
    flops_per_cycle: int
    clock: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    whole: str
    devices_per_chip: int = 1
    chip_config: str = "default"

    @property
    def peak_flops(self) -> float:
        """bfloat16 flop per second."""
        return self.flops_per_cycle * self.clock


# Peak bf16, HBM bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} ("key specifications", per chip).
# Clock and flop per cycle: v6e and v7x from shared/design/performance.md; v5p's 1.75 GHz and v5e's 1.5 GHz from "How to
# Scale Your Model" (jax-ml.github.io/scaling-book/tpus); v4's 1.05 GHz from the TPU v4 paper (arXiv 2304.01433). Flop
# per cycle is the published peak over the clock. One-way link bandwidth: the scaling book's table. HBM: what the
# compiler of libtpu 0.0.42.1 says it has ("exceeds available HBM (31.25G)").
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", "v4", 262_144, 1.05e9, int(30.75 * GIB), 1.228e12, 4.5e10, 3, "2x2x1", 1, "megacore"),
        Generation("v5e", "v5e", 131_072, 1.5e9, int(15.75 * GIB), 8.19e11, 4.5e10, 2, "2x4"),
        Generation("v5p", "v5p", 262_144, 1.75e9, int(95.74 * GIB), 2.765e12, 9e10, 3, "2x2x1"),
        Generation("v6e", "v6e", 524_288, 1.75e9, int(31.25 * GIB), 1.64e12, 9e10, 2, "2x4"),
        Generation("v7x", "tpu7x", 524_288, 2.2e9, int(94.75 * GIB), 3.69e12, 9e10, 3, "2x2x1", 2),
    )
}
ALIASES = {"tpu7x": "v7x", "v5litepod": "v5e"}

# A hop between chips; counted once per hop of the longest way, so that many small transfers are not free.
HOP_SECONDS = 1e-6


Link = tuple[tuple[int, ...], tuple[int, ...]]  # from one device's place to its neighbour's


@dataclass(frozen=True)
class Topology:
    """A slice: a generation and the chips along each axis."""

    generation: Generation
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """How many JAX devices there are."""
        return math.prod(self.shape) * self.generation.devices_per_chip

    @property
    def grid(self) -> tuple[int, ...]:
        """Devices along each axis that has more than one, a chip's cores as an axis of their own."""
        return tuple(n for n in (*self.shape, self.generation.devices_per_chip) if n > 1)

    def position(self, device: int) -> tuple[int, ...]:
        """Where the device of that number in JAX's list is: its chip along each axis, and which of the chip's cores.

        JAX counts host by host, a host being 2 × 2 chips, and within a host along the first axis first.
        """
        chip, core = divmod(device, self.generation.devices_per_chip)
        host = tuple(min(2, n) for n in self.shape[:2]) + (1,) * (len(self.shape) - 2)
        hosts = [n // of_host for n, of_host in zip(self.shape, host, strict=True)]
        number, within = divmod(chip, math.prod(host))
        place = []
        for chips, count in zip(host, hosts, strict=True):
            within, at = divmod(within, chips)
            number, block = divmod(number, count)
            place.append(block * chips + at)
        return (*place, core)

    @functools.cached_property
    def links(self) -> tuple[Link, ...]:
        """Every direction of every link between neighbours."""
        routes = itertools.starmap(self.route, itertools.permutations(range(self.devices), 2))
        return tuple(route[0] for route in routes if len(route) == 1)

    def route(self, source: int, target: int) -> list[Link]:
        """The links that a transfer from one device to another passes: along one axis after the other."""
        place, end = self.position(source), self.position(target)
        passed = []
        for axis, goal in enumerate(end):
            while place[axis] != goal:
                step = 1 if goal > place[axis] else -1
                following = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                passed.append((place, following))
                place = following
        return passed

    def grid_of(self, devices: Sequence[int]) -> tuple[int, ...]:
        """How the devices of a group lie: lengths of the box they fill, or a line if they fill none."""
        positions = [self.position(device) for device in devices]
        sides = [max(along) - min(along) + 1 for along in zip(*positions, strict=True)]
        box = tuple(side for side in sides if side > 1)
        return box if math.prod(sides) == len(devices) else (len(devices),)


def parse(text: str) -> Topology:
    """``"v6e:2x4"`` as a Topology.

    Raises:
        PlanError: unknown generation or malformed shape; says what is possible.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", text.strip().lower())
    name = match and ALIASES.get(match.group(1), match.group(1))
    if not match or name not in GENERATIONS:
        raise PlanError(
            f"--topology must be a generation ({', '.join(GENERATIONS)}) and a shape, such as v6e:2x4; got {text!r}."
        )
    generation = GENERATIONS[name]
    shape = tuple(map(int, match.group(2).split("x")))
    if len(shape) != generation.axes or 0 in shape:
        example = "x".join(["2"] * generation.axes)
        raise PlanError(f"{name} slices have {generation.axes} axes, such as {name}:{example}; got {text!r}.")
    return Topology(generation, shape)


def describe_devices(topology: Topology) -> tuple[Any, ...]:
    """JAX devices to compile for; none of them exists.

    Raises:
        PlanError: libtpu is missing, or its compiler does not know the topology.
    """
    from jax.experimental import topologies

    generation, shape = topology.generation, topology.shape
    options: dict[str, Any] = {}
    if generation.chip_config != "default":
        options["chip_config_name"] = generation.chip_config
    if any(n % 2 for n in shape[:2]):
        # The compiler's host is 2 × 2 chips unless it is told otherwise.
        options["chips_per_host_bounds"] = [*shape, 1][:3]
    name = f"{generation.compiler_name}:{'x'.join(map(str, shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        # The compiler's plug-in raises several types, all of them meaning that there is no such topology (or plug-in).
        raise PlanError(
            f"The TPU compiler offers no topology {topology.name}: {str(error).splitlines()[0]} "
            "If libtpu is missing, run `pip install libtpu`."
        ) from error
    return tuple(described.devices)


def collective_seconds(kind: str, payload: int, grid: tuple[int, ...], topology: Topology) -> float:
    """How long a collective that is no permutation takes when only the links limit it, in seconds.

    The model: no wrap-around links (slices of up to 16 chips have none), so a corner chip has one link along each axis
    of the group, and an all-to-all has to pass the cut across the longest axis.

    Args:
        kind: an HLO opcode such as ``"all-gather"``.
        payload: bytes of the largest of a chip's operand and result.
        grid: how many devices take part along each axis, see :meth:`Topology.grid_of`.
    """
    group = math.prod(grid)
    if group <= 1:
        return 0.0
    link, ways = topology.generation.link_bandwidth, len(grid)
    latency = HOP_SECONDS * sum(n - 1 for n in grid)
    remote = payload * (group - 1) / group
    if kind.startswith("all-to-all") or kind.startswith("ragged-all-to-all"):
        cut_links = group / max(grid)
        return max(remote / (ways * link), payload * group / 4 / (cut_links * link)) + latency
    rounds = 2 if kind.startswith("all-reduce") else 1  # reduce-scatter, then all-gather
    return rounds * (remote / (ways * link) + latency)
