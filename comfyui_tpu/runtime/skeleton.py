"""Torch modules without weights: structure on the ``meta`` device, computed tables (rotary, …) real.

A checkpoint's module is built only to be traced, so its parameters need shapes but no memory. Non-persistent buffers
are the exception: no checkpoint holds them, their values come from the constructor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from comfyui_tpu.runtime import bridge
from comfyui_tpu.runtime.errors import PlanError


@dataclass(frozen=True)
class Weight:
    """One parameter or persistent buffer of a skeleton, and the checkpoint tensors it comes from.

    Attributes:
        shape: shape on the device; stacked weights have a leading layer axis.
        dtype: the module's own dtype for it.
        sources: per layer, the checkpoint names it may be stored under (more than one for tied weights).
        stacked: whether the leading axis counts layers.
        units: an axis (layers not counted) and of how many equal units it consists, where a layer fuses several
            (``linear.units``); under tensor parallelism every chip has its part of each unit.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[tuple[str, ...], ...]
    stacked: bool
    units: tuple[int, int] | None = None


@dataclass(frozen=True)
class Skeleton:
    """A traceable module, its weights by parameter name, and its computed buffers by name (CPU tensors)."""

    module: torch.nn.Module
    weights: dict[str, Weight]
    computed: dict[str, torch.Tensor]


MAX_WEIGHTS = 20_000  # ten times what the largest model here has


class _EmptyOnMeta(TorchFunctionMode):
    """Sends ``torch.empty`` (what layers allocate weights with) to ``meta`` and leaves every computation alone.

    Ends constructors that would not end: a damaged config may ask for a million layers.
    """

    weights = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
            self.weights += 1
            if self.weights > MAX_WEIGHTS:
                raise ValueError(f"expected a module with at most {MAX_WEIGHTS} weights; this one has more")
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Scan:
    """A list of equal blocks that runs as one scan.

    Attributes:
        path: dotted path of the ``ModuleList``.
        carry: names of the arguments that each block hands to the next, in the order in which it returns them, where
            the module passes them by name. Empty: the first positional argument, which the block returns alone.
    """

    path: str
    carry: tuple[str, ...] = ()


class ScannedBlocks(torch.nn.Module):
    """Equal blocks as one ``jax.lax.scan`` over weights stacked along a leading layer axis.

    It takes the place of the list's members, so a stock ``for block in self.blocks`` runs it once. The arguments in
    ``carry`` are the activations handed from block to block; all others are the same for every block.
    """

    def __init__(self, block: torch.nn.Module, carry: tuple[str, ...] = ()):
        super().__init__()
        self.block = block
        self.carry = carry
        self._recorded: list | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list]:
        """Collects, for each call inside, what every block returned: activations with a leading layer axis."""
        self._recorded = recorded = []
        try:
            yield recorded
        finally:
            self._recorded = None

    def forward(self, *args, **kwargs):
        import jax

        env, context = bridge.environment(), bridge.current_trace()
        # Inside the outer functional_call these are the stacked arrays; the block's own names stay free of the prefix.
        stacked = env.t2j_iso({**dict(self.block.named_parameters()), **dict(self.block.named_buffers())})
        record = self._recorded is not None
        spread = lambda x: jax.tree.map(context.tokens, env.t2j_iso(x))  # noqa: E731
        # Said before the loop: XLA would otherwise gather them in it, once for every block.
        whole = lambda x: jax.tree.map(context.whole, env.t2j_iso(x))  # noqa: E731
        carried, call = self._split(args, kwargs, lambda same: env.j2t_iso(whole(same)))

        def layer(carry, weights):
            weights = env.j2t_iso({name: context.gathered(w) for name, w in weights.items()})
            call_args, call_kwargs = call(env.j2t_iso(carry))
            out = spread(torch.func.functional_call(self.block, weights, call_args, call_kwargs))
            return out, out if record else None

        out, each = jax.lax.scan(layer, spread(carried), stacked)
        if record:
            self._recorded.append(env.j2t_iso(each))
        return env.j2t_iso(out)

    def _split(
        self, args: tuple, kwargs: dict, prepared: Callable[[Any], Any]
    ) -> tuple[Any, Callable[[Any], tuple[tuple, dict]]]:
        """The activations to carry, and how a block is called with their successors; the rest goes in ``prepared``."""
        if not self.carry:
            rest, same = prepared((args[1:], kwargs))
            return args[0], lambda carry: ((carry, *rest), same)
        args, same = prepared((args, {name: value for name, value in kwargs.items() if name not in self.carry}))
        values = tuple(kwargs[name] for name in self.carry)
        if len(self.carry) == 1:
            return values[0], lambda carry: (args, {**same, self.carry[0]: carry})
        return values, lambda carry: (args, {**same, **dict(zip(self.carry, carry, strict=True))})


def build(construct: Callable[[], torch.nn.Module], stacked: Iterable[str | Scan] = ()) -> Skeleton:
    """Construct a module without allocating its weights.

    Args:
        construct: makes the module, for example ``lambda: WanTransformer3DModel.from_config(config)``.
        stacked: the ``ModuleList``s whose equal members are to run as one scan: a :class:`Scan`, or its path.

    Raises:
        PlanError: the members of a list in ``stacked`` differ.
    """
    # Constructors draw initial values: the user's random state must not notice. Inference mode (under which ComfyUI
    # runs nodes) would make inference tensors that cannot be swapped later.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        module = construct().eval().requires_grad_(False)
    persistent = set(module.state_dict(keep_vars=True))
    names = _names_by_tensor(module, persistent)
    _to_meta(module, persistent)
    scans = [entry if isinstance(entry, Scan) else Scan(entry) for entry in stacked]
    layers = {scan.path: _stack(module, scan) for scan in scans}
    return Skeleton(module, _weights(module, persistent, layers, names), _computed(module, persistent, layers))


def _names_by_tensor(module: torch.nn.Module, persistent: set[str]) -> dict[str, tuple[str, ...]]:
    """Every name → all names of the same tied tensor, its own first."""
    groups: dict[int, list[str]] = {}
    tensors = module.state_dict(keep_vars=True)
    for name in persistent:
        groups.setdefault(id(tensors[name]), []).append(name)
    return {name: (name, *sorted(set(group) - {name})) for group in groups.values() for name in group}


def _to_meta(module: torch.nn.Module, persistent: set[str]) -> None:
    moved: dict[int, torch.nn.Parameter | torch.Tensor] = {}
    for prefix, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, tensor in table.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is None or (table is owner._buffers and name not in persistent):
                    continue
                if id(tensor) not in moved:
                    meta = tensor.to("meta")
                    keep = table is owner._parameters
                    moved[id(tensor)] = torch.nn.Parameter(meta, requires_grad=False) if keep else meta
                table[key] = moved[id(tensor)]


def _stack(module: torch.nn.Module, scan: Scan) -> int:
    """Replace the list at ``scan.path`` by one scanning member; returns how many blocks it had."""
    path, blocks = scan.path, module.get_submodule(scan.path)
    first, *others = ({n: (t.shape, t.dtype) for n, t in b.state_dict().items()} for b in blocks)
    for index, other in enumerate(others, start=1):
        if other != first:
            raise PlanError(f"{path}.{index} differs from {path}.0 in its weights; these blocks cannot be scanned.")
    count = len(blocks)
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, torch.nn.ModuleList([ScannedBlocks(blocks[0], scan.carry)]))
    return count


def _weights(module, persistent, layers, names) -> dict[str, Weight]:
    weights = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        path = next((p for p in layers if name.startswith(f"{p}.0.block.")), None)
        if path is None:
            if name in persistent:
                units = _units(module, name)
                weights[name] = Weight(tuple(tensor.shape), tensor.dtype, (names[name],), False, units)
            continue
        rest = name.removeprefix(f"{path}.0.block.")
        if f"{path}.0.{rest}" in persistent:
            sources = tuple((f"{path}.{i}.{rest}",) for i in range(layers[path]))
            units = _units(module, name)
            weights[name] = Weight((layers[path], *tensor.shape), tensor.dtype, sources, True, units)
    return weights


def _units(module: torch.nn.Module, name: str) -> tuple[int, int] | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), "units", None) if leaf == "weight" else None


def _computed(module, persistent, layers) -> dict[str, torch.Tensor]:
    computed = {}
    for name, tensor in module.named_buffers():
        path = next((p for p in layers if name.startswith(f"{p}.0.block.")), None)
        original = name if path is None else f"{path}.0.{name.removeprefix(f'{path}.0.block.')}"
        if original in persistent:
            continue
        if tensor.device.type == "meta":
            raise PlanError(f"buffer {name} is in no checkpoint and has no values; its constructor must compute it.")
        repeat = () if path is None else (layers[path], *([1] * tensor.ndim))
        computed[name] = tensor.clone() if path is None else tensor.unsqueeze(0).repeat(*repeat)
    return computed
