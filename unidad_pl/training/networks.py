"""The networks of a LightningModule: frozen ones never train and are in no checkpoint; all can be kept in less memory,
elsewhere, or sharded over ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unidad_pl.checks import check_options
from unidad_pl.condition import Condition
from unidad_pl.denoiser import Denoiser, Prediction, guided
from unidad_pl.strategies import fsdp

LARGEST_WEIGHT = 1e6
"""Trained networks keep their weights far below it: a run that is above has diverged."""


@dataclass
class MemoryOptions:
    """What trades time for memory. The defaults are the fastest.

        >>> MemoryOptions(checkpointing="all")
        Traceback (most recent call last):
        ...
        ValueError: checkpointing must be one of none, steps, blocks, both, got 'all'

    Attributes:
        checkpointing: what is computed again in the backward pass instead of being kept: ``steps``: each of the
            student's K network evaluations; ``blocks``: the blocks inside the trained networks; ``both``, or ``none``.
        teacher_dtype: how frozen networks are stored and computed, ``float32`` or ``bfloat16``; the output layer stays
            in float32.
        teacher_device: where frozen networks are kept and computed, e.g. ``cpu`` or ``cuda:1``; null: with the rest.
        ema_device: where the average of the sampled network is kept, e.g. ``cpu``; null: with the rest.
    """

    checkpointing: Literal["none", "steps", "blocks", "both"] = "none"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_device: str | None = None
    ema_device: str | None = None

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("teacher_device", "ema_device"):
            try:
                torch.device(getattr(self, name) or "cpu")  # refuse a wrong name now
            except RuntimeError as error:
                raise ValueError(
                    f"{name} must be a device such as cpu or cuda:1, got {getattr(self, name)!r}"
                ) from error

    @property
    def alike(self) -> bool:
        """Whether all networks are stored in one way and in one place."""
        return not (self.teacher_device or self.ema_device) and self.teacher_dtype == "float32"


class Networks(pl.LightningModule):
    """Keeps frozen networks frozen, in eval mode, where ``memory`` wants them, and out of checkpoints.

    Args:
        memory: how networks are stored.
        frozen_networks: attributes that hold frozen networks.
    """

    def __init__(self, memory: MemoryOptions, frozen_networks: Sequence[str]) -> None:
        super().__init__()
        self.memory, self.frozen_networks = memory, tuple(frozen_networks)
        self.ema: AveragedModel | None = None
        self._hashes: dict[str, str] = {}
        self._are_sharded = False

    # -- frozen --------------------------------------------------------------------------------------------------

    def freeze_networks(self) -> None:
        """To be called once they are built.

        Raises:
            ValueError: networks that share a base under adapters are to be stored otherwise or apart.
        """
        memory = self.memory
        if not memory.alike and self._share_a_base():
            raise ValueError(
                "all networks share one base under their adapters: leave memory.teacher_device, ema_device and "
                "teacher_dtype as they are, and set the source's lora.base_dtype: bfloat16 to store the base in half"
            )
        for name in self.frozen_networks:
            network: nn.Module = getattr(self, name).requires_grad_(False)
            if memory.teacher_dtype == "bfloat16" and isinstance(network, Denoiser):
                self.frozen_hash(name)  # of the weights as they came
                network.to_bfloat16()
            if memory.teacher_device is not None and isinstance(network, Denoiser):
                network.to(memory.teacher_device)
        if self.ema is not None and memory.ema_device is not None:
            self.ema.to(memory.ema_device)

    def train(self, mode: bool = True) -> Networks:
        super().train(mode)
        for name in self.frozen_networks:
            if (network := getattr(self, name, None)) is not None:
                network.eval()
        if self.ema is not None:
            self.ema.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Networks:
        # Moves of the whole module leave networks with a place of their own alone.
        stay = set(self.frozen_networks) - {"codec"} if self.memory.teacher_device is not None else set()
        stay |= {"ema"} if self.memory.ema_device is not None else set()
        modules = self._modules
        self._modules = {name: module for name, module in modules.items() if name not in stay}
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules = modules
        return self

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def denoisers(self) -> dict[str, Denoiser]:
        """Place in the state dict -> network, the average included."""
        networks = {name: child for name, child in self.named_children() if isinstance(child, Denoiser)}
        if self.ema is not None and isinstance(self.ema.module, Denoiser):
            networks["ema.module"] = self.ema.module
        return networks

    def _share_a_base(self) -> bool:
        return any(network.shared_weights for network in self.denoisers().values())

    def unsaved_weights(self) -> set[str]:
        """Names in the state dict of what comes from sources: frozen networks and bases under adapters."""
        shared = {f"{place}.{key}" for place, network in self.denoisers().items() for key in network.shared_weights}
        prefixes = tuple(f"{name}." for name in self.frozen_networks)
        return shared | {key for key in self.state_dict() if prefixes and key.startswith(prefixes)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, the networks being built for it; what is in no checkpoint stays as its source gave it."""
        self.configure_model()  # builds them
        own = self.state_dict()
        kept = {name: own[name] for name in self.unsaved_weights()}
        return super().load_state_dict(kept | dict(state_dict), strict, assign)

    def refuse_diverged(self) -> None:
        """End a run whose trained weights, or their average, are not finite or out of all bounds."""
        average = [] if self.ema is None else self.ema.named_parameters("ema")
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        refuse_diverged([*trained, *average])

    def frozen_hash(self, name: str) -> str:
        """sha256 of a frozen network's weights as its source gave them."""
        if name not in self._hashes:  # frozen: computed once
            network: nn.Module = getattr(self, name)
            self._hashes[name] = content_hash(network, getattr(network, "shared_weights", None) or None)
        return self._hashes[name]

    def frozen_hashes(self) -> dict[str, str]:
        """What a checkpoint keeps of all that it does not hold."""
        based = [name for name, network in self.denoisers().items() if network.shared_weights and name != "ema.module"]
        return {name: self.frozen_hash(name) for name in (*self.frozen_networks, *based)}

    def check_hashes(self, hashes: Mapping[str, str]) -> None:
        """Compare the frozen networks with those of a checkpoint.

        Raises:
            RuntimeError: they are others; names the network.
        """
        own = self.frozen_hashes()
        if set(hashes) != set(own):
            raise RuntimeError(
                f"the checkpoint was trained with the frozen networks {sorted(hashes)}, this run has {sorted(own)}: "
                f"use the config the run started with"
            )
        for name, seen in hashes.items():
            if own[name] != seen:
                raise RuntimeError(
                    f"the checkpoint was trained with another {name!r} network: its sha256 is {seen[:16]}..., "
                    f"this run's is {own[name][:16]}.... Point the config at the network the run started with."
                )

    # -- sharded over ranks --------------------------------------------------------------------------------------

    def refuse_to_shard(self) -> str | None:
        """Why the networks of this module cannot be sharded, None if they can."""
        if not self.memory.alike:
            return "it shards all networks alike: leave memory.teacher_device, ema_device and teacher_dtype as they are"
        if self._share_a_base():
            return "networks that share one base under adapters are small already: use unidad_ddp"
        if self.trainer.precision == "16-mixed":
            return "it has no loss scaling: use precision bf16-mixed"
        return None

    def shard_networks(self) -> None:
        """Shard every network, average and heads included, if the strategy does that; once they are built and frozen.

        Raises:
            RuntimeError: a setting that does not go with shards.
        """
        trainer = self._trainer
        if trainer is None or not isinstance(trainer.strategy, fsdp.ShardedStrategy) or self._are_sharded:
            return
        reason = self.refuse_to_shard()
        if reason is not None:
            raise RuntimeError(f"strategy {fsdp.NAME} cannot be used here: {reason}")
        for name in self.frozen_hashes():  # while the weights are whole
            self.frozen_hash(name)
        mesh = trainer.strategy.device_mesh["data_parallel"]
        for name, child in self.named_children():
            network: nn.Module = child.module if name == "ema" else child  # type: ignore[assignment]
            if name != "codec" and any(True for _ in network.parameters()):
                fsdp.shard(network, mesh)
        self._are_sharded = True


def predict_on_own_device(
    network: Denoiser,
    x: Tensor,
    sigma: Tensor,
    cond: Condition | None,
    unconditional: Condition | None = None,
    guidance_scale: float = 1.0,
) -> Prediction:
    """The :func:`~unidad_pl.denoiser.guided` prediction on the network's own device; arguments travel there, the answer
    back to that of ``x``."""
    device = next(network.parameters()).device
    cond = None if cond is None else cond.to(device)
    unconditional = None if unconditional is None else unconditional.to(device)
    there = guided(network, x.to(device), sigma.to(device), cond, unconditional, guidance_scale)
    return Prediction(*(part.to(x.device) for part in there))


def content_hash(module: nn.Module, names: Collection[str] | None = None) -> str:
    """sha256 over names, shapes and float32 bytes of a module's parameters and buffers, or of those in ``names``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if names is not None and name not in names:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained(*networks: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``networks`` that are trained: all but the base under adapters."""
    return [p for network in networks for p in network.parameters() if p.requires_grad]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradient reaches the parameters of ``modules`` inside; every flag is restored exactly afterwards."""
    held = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """The moving average of a network's weights; early on its decay is ``(1 + n) / (10 + n)``."""

    @torch.no_grad()
    def average(means: Any, values: Any, count: Tensor | int) -> None:
        n = float(count)  # read from the device once for all of them
        if means[0].is_floating_point():  # a base in four bits is shared, and no number
            torch._foreach_lerp_(means, values, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=average).requires_grad_(False)


def refuse_diverged(weights: Iterable[tuple[str, Tensor]]) -> None:
    """End a run whose weights are of no use any more, on every rank alike; one value is read from the device.

    Args:
        weights: (name, trained weight or average).

    Raises:
        RuntimeError: one is not finite, or above :data:`LARGEST_WEIGHT`; names it.
    """
    parts = [(name, fsdp.local_shard(weight.detach())) for name, weight in weights if weight.is_floating_point()]
    parts = [(name, part) for name, part in parts if part.numel()]
    if not parts:
        return
    device = parts[0][1].device
    largest = torch.stack([torch.linalg.vector_norm(part, math.inf).float().to(device) for _, part in parts])
    wrong = ~(largest <= LARGEST_WEIGHT)  # NaN is wrong too
    anywhere = wrong.any().float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    if anywhere:
        seen = [f"{parts[i][0]} reached {float(largest[i]):.3g}" for i in wrong.nonzero().flatten().tolist()]
        found = f"{seen[0]}{f' (and {len(seen) - 1} more)' if len(seen) > 1 else ''}" if seen else "on another rank"
        raise RuntimeError(
            f"the weights have diverged: {found}. No checkpoint is written of them, "
            f"earlier ones are as they were: resume from one of those in 32-true precision, or begin again with a "
            f"lower learning rate"
        )


def alike(network: Denoiser, source: Denoiser) -> Denoiser:
    """``network``, of an ``init_from``, if it can stand beside the source model's.

    Raises:
        ValueError: it works on other images or conditions; says on which.
    """
    own, wanted = _takes(network), _takes(source)
    if own != wanted:
        raise ValueError(
            f"init_from has a model of {own}, the source is one of {wanted}: all networks of a run work on the same "
            f"images, latents and conditions"
        )
    return network


def _takes(network: Denoiser) -> str:
    cond = network.blank_condition(1)
    widths = {} if cond is None else {name: part.shape[-1] for name, part in cond.parts.items() if part.ndim > 1}
    known = widths if network.num_classes is None else {"classes": network.num_classes}
    words = [f"{name} {size}" for name, size in known.items()]
    return ", ".join([f"images {tuple(network.image_shape)}", *words])


def warn_of_distilled(source: Denoiser) -> None:
    """Say that a source model is no good teacher."""
    if source.distilled:
        rank_zero_warn(
            "the source model was distilled (for guidance or few steps), so its scores are not those of its training "
            "data: where its base is to be had, give that as the source and this one as student.init_from"
        )
