"""How much memory a training run needs, from its config alone: one iteration on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unidad_pl.backbones.nf4 import weights_in
from unidad_pl.checks import check_choices, check_whole
from unidad_pl.files import expanded
from unidad_pl.runs.config import build_module, merge_configs, read_config
from unidad_pl.training.module import GenerativeModule
from unidad_pl.training.rehearsal import Rehearsal, bytes_of

Precision = Literal["32-true", "64-true", "bf16-mixed"]
GIB = 2**30
ADAM_STATES = 2


@dataclass
class MemoryReport:
    """Bytes of one training run on one device.

    Attributes:
        parameters: network -> number of parameters.
        weights: network -> bytes of its parameters and buffers.
        optimizers: bytes of the optimisers' states (two per parameter, as Adam's; one byte each for 8-bit ones).
        working: the most bytes of activations and gradients that are held at one moment of an iteration.
        elsewhere: networks that are kept on another device; not in the peak.
    """

    parameters: dict[str, int]
    weights: dict[str, int]
    optimizers: int
    working: int
    elsewhere: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most bytes held on the device at one moment."""
        here = sum(size for name, size in self.weights.items() if name not in self.elsewhere)
        return here + self.optimizers + self.working

    def table(self) -> str:
        """Lines of text, in GiB."""
        where = dict.fromkeys(self.elsewhere, ", on another device: not in the peak")
        rows = [
            (f"{name} ({self.parameters[name]:,} parameters{where.get(name, '')})", size)
            for name, size in self.weights.items()
        ]
        rows += [("optimiser states", self.optimizers), ("activations and gradients", self.working)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {size / GIB:9.3f} GiB" for name, size in rows]
        return "\n".join([*lines, f"{'peak':<{width}}  {self.peak / GIB:9.3f} GiB", ""])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked of every tensor many times
            return func(*args)
        if func is torch.ops.aten.native_group_norm_backward.default:
            result = _group_norm_gradients(*args)
        else:
            result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in known and storage._cdata not in self._seen:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _group_norm_gradients(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, n: int, channels: int, pixels: int,
    groups: int, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Empty tensors like the gradients: torch's own way for fake tensors is thirty operations, a third of all time."""
    makes = (lambda: torch.empty_like(x), lambda: x.new_empty(channels), lambda: x.new_empty(channels))
    return [make() if asked else None for make, asked in zip(makes, wanted, strict=True)]


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def predict_memory(module: GenerativeModule, batch_size: int, precision: str = "32-true") -> MemoryReport:
    """Predict the peak of one training iteration on one device; no weight file is read, nothing is allocated.

    The module is used up: its networks have no weights afterwards. Temporaries of the optimisers and of convolution
    libraries, and what the allocator wastes between blocks, are not in the number.

    Args:
        module: a module that was not built yet.
        batch_size: images per process, as in the data module.
        precision: of the trainer: ``32-true``, ``64-true`` or ``bf16-mixed``.

    Raises:
        ValueError: an unknown precision.
    """
    check_choices(precision=(precision, Precision))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "64-true" else torch.float32)
    try:
        return _predict(module, batch_size, precision)
    finally:
        torch.set_default_dtype(before)


def _predict(module: Any, batch_size: int, precision: str) -> MemoryReport:
    rehearsal = Rehearsal(module, batch_size, precision)
    elsewhere = module.frozen_networks if module.memory.teacher_device is not None else ()
    elsewhere += ("ema",) if module.memory.ema_device is not None else ()
    networks = dict(module.named_children())
    own = _own_parameters(networks)
    weights = {name: bytes_of([*own[name], *network.buffers()]) for name, network in networks.items()}
    live = LiveBytes()
    rehearsal.iteration(module.costliest_iteration(), live)
    states = sum(_states(module, name, parameters) for name, parameters in rehearsal.groups().items())
    counts = {name: sum(weights_in(p) for p in parameters) for name, parameters in own.items()}
    return MemoryReport(counts, weights, states, live.peak, tuple(elsewhere))


def _own_parameters(networks: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each network that none before it has: a base under adapters is there once."""
    own: dict[str, list[nn.Parameter]] = {}
    for name, network in networks.items():
        seen = {id(p) for parameters in own.values() for p in parameters}
        own[name] = [p for p in network.parameters() if id(p) not in seen]
    return own


def _states(module: GenerativeModule, group: str, parameters: Sequence[Tensor]) -> int:
    eight_bit = "8bit" in module.optimizers_of_groups()[group].algorithm
    return ADAM_STATES * (sum(p.numel() for p in parameters) if eight_bit else bytes_of(parameters))


def report_memory(config: list[str], batch_size: int | None = None, precision: str | None = None) -> str:
    """Predict the peak memory of a training run from its config; no weights and no GPU are needed.

    Args:
        config: the run's config; several are merged in order, as by ``unidad fit``.
        batch_size: images per process; null: the config's.
        precision: 32-true, 64-true or bf16-mixed; null: the config's.

    Returns:
        A table in GiB.

    Raises:
        FileNotFoundError, ValueError: a config that cannot be read or used; says why.
    """
    places = [expanded(path) for path in config]
    for path in places:
        if not path.is_file():
            raise FileNotFoundError(f"no config at {str(path)!r}")
    merged = merge_configs([read_config(path) for path in places])
    module = build_module(merged, ", ".join(config))
    data = (merged.get("data") or {}).get("init_args") or {}
    size = next(one for one in (batch_size, data.get("batch_size"), 1) if one is not None)
    check_whole(1, batch_size=size)
    kind = precision if precision is not None else str((merged.get("trainer") or {}).get("precision") or "32-true")
    kind = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}.get(kind, kind)  # as Lightning reads them
    return f"one process, batch {size}, {kind}\n{predict_memory(module, size, kind).table()}"
