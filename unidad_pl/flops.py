"""FLOPs of what really runs, backward passes and recomputed parts too, and how often each network was evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from torch.utils.hooks import RemovableHandle

TERA = 1e12


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# torch knows the attention kernels of GPUs and leaves this one out.
FORMULAS = flop_registry | {
    getattr(torch.ops.aten, _CPU_ATTENTION): shape_wrapper(_attention),
    getattr(torch.ops.aten, f"{_CPU_ATTENTION}_backward"): shape_wrapper(_attention_backward),
}


class _Flops(TorchDispatchMode):
    """Sums torch's own formulas, as its ``FlopCounterMode``, which would try to take every other operation apart."""

    total = 0
    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in FORMULAS and not _Flops.paused:
            self.total += FORMULAS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs in this block, to look at a training and not for it, is not counted."""
    before, _Flops.paused = _Flops.paused, True
    try:
        yield
    finally:
        _Flops.paused = before


@dataclass
class Tally:
    """FLOPs (a multiplication and an addition are two), and evaluations by network; ``encoders``: those that ended
    before the network's last layer.

    >>> (Tally(2.0) + Tally(3.0)).flops
    5.0
    """

    flops: float = 0.0
    evaluations: Counter[str] = field(default_factory=Counter)
    encoders: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.flops + other.flops, self.evaluations + other.evaluations, self.encoders + other.encoders)


class Counting:
    """Counts what happens between :meth:`start` and :meth:`stop`: forward and backward passes, recomputed ones too.

    >>> network = nn.Linear(3, 5)
    >>> counting = Counting({"network": network})
    >>> counting.start()
    >>> loss = network(torch.ones(7, 3)).sum()
    >>> counting.stop()
    Tally(flops=210, evaluations=Counter({'network': 1}), encoders=Counter())

    Args:
        networks: name -> network; it is evaluated when its first layer is, in the order of registration.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.networks = networks

    def start(self) -> None:
        """Begin to count."""
        self._firsts: Counter[str] = Counter()
        self._lasts: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = []
        for name, network in self.networks.items():
            layers = [m for m in network.modules() if any(True for _ in m.parameters(recurse=False))]
            for layer, seen in ((layers[0], self._firsts), (layers[-1], self._lasts)) if layers else ():
                self._hooks.append(layer.register_forward_pre_hook(_counter(name, seen)))
        self._mode = _Flops()
        self._mode.__enter__()

    def stop(self) -> Tally:
        """End it; what there was."""
        self._mode.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        return Tally(self._mode.total, self._firsts, self._firsts - self._lasts)


def _counter(name: str, seen: Counter[str]) -> Any:
    return lambda *_: seen.update([name])
