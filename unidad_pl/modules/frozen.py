"""Frozen networks of a LightningModule: never trained, not in checkpoints, stored in less memory or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unidad_pl.denoiser import Denoiser, Prediction, guided
from unidad_pl.modules.optimization import check_choices, content_hash


@dataclass
class Memory:
    """What trades time for memory. The defaults are the fastest.

    Attributes:
        checkpointing: what is computed again in the backward pass instead of being kept: ``steps``: each of the
            student's K network evaluations; ``blocks``: the blocks inside the trained networks; ``both``, or ``none``.
        teacher_dtype: how frozen networks are stored and computed, ``float32`` or ``bfloat16``; the output layer stays
            in float32.
        teacher_device: where frozen networks are kept and computed, e.g. ``cpu`` or ``cuda:1``; null: with the rest.
        ema_device: where the average of the student is kept, e.g. ``cpu``; null: with the rest.
    """

    checkpointing: Literal["none", "steps", "blocks", "both"] = "none"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_device: str | None = None
    ema_device: str | None = None

    def __post_init__(self) -> None:
        check_choices(
            checkpointing=(self.checkpointing, ("none", "steps", "blocks", "both")),
            teacher_dtype=(self.teacher_dtype, ("float32", "bfloat16")),
        )
        for device in (self.teacher_device, self.ema_device):
            if device is not None:
                torch.device(device)  # refuse a wrong name now


def predict_where_it_is(
    network: Denoiser,
    x: Tensor,
    sigma: Tensor,
    cond: Tensor | None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Prediction:
    """The :func:`~unidad_pl.denoiser.guided` prediction on the network's own device; arguments travel there, the answer
    back to that of ``x``."""
    device = next(network.parameters()).device
    cond = None if cond is None else cond.to(device)
    unconditional = None if unconditional is None else unconditional.to(device)
    there = guided(network, x.to(device), sigma.to(device), cond, unconditional, guidance_scale)
    return Prediction(*(part.to(x.device) for part in there))


class FrozenNetworks(pl.LightningModule):
    """Keeps the networks named in :attr:`frozen_networks` frozen, in eval mode, where :attr:`memory` wants them, and
    out of checkpoints: their content hash is stored, and another network is refused."""

    frozen_networks: tuple[str, ...] = ()
    memory: Memory
    ema: AveragedModel | None
    _hashes: dict[str, str]

    def freeze_networks(self) -> None:
        """To be called once they are built.

        Raises:
            ValueError: networks that share a base under adapters are to be stored otherwise or apart.
        """
        memory = self.memory
        apart = memory.teacher_device or memory.ema_device or memory.teacher_dtype != "float32"
        if apart and any(network.shared_weights for network in self._denoisers().values()):
            raise ValueError(
                "all networks share one base under their adapters: leave memory.teacher_device, ema_device and "
                "teacher_dtype as they are, and set the source's lora.base_dtype: bfloat16 to store the base in half"
            )
        for name in self.frozen_networks:
            network: nn.Module = getattr(self, name).requires_grad_(False)
            if self.memory.teacher_dtype == "bfloat16":
                self.frozen_hash(name)  # of the weights as they came
                network.to_bfloat16() if isinstance(network, Denoiser) else network.bfloat16()
            if self.memory.teacher_device is not None:
                network.to(self.memory.teacher_device)
        if self.ema is not None and self.memory.ema_device is not None:
            self.ema.to(self.memory.ema_device)

    def train(self, mode: bool = True) -> FrozenNetworks:
        super().train(mode)
        for name in self.frozen_networks:
            if (network := getattr(self, name, None)) is not None:
                network.eval()
        if self.ema is not None:
            self.ema.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenNetworks:
        # Moves of the whole module leave networks with a place of their own alone.
        stay = set(self.frozen_networks) if self.memory.teacher_device is not None else set()
        stay |= {"ema"} if self.memory.ema_device is not None else set()
        modules = self._modules
        self._modules = {name: module for name, module in modules.items() if name not in stay}
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules = modules
        return self

    def frozen_hash(self, name: str) -> str:
        """sha256 of a frozen network's weights as its source gave them."""
        if name not in self._hashes:  # frozen: computed once
            network: nn.Module = getattr(self, name)
            self._hashes[name] = content_hash(network, getattr(network, "shared_weights", None) or None)
        return self._hashes[name]

    def _denoisers(self) -> dict[str, Denoiser]:
        """Place in the state dict -> network, the average included."""
        networks = {name: child for name, child in self.named_children() if isinstance(child, Denoiser)}
        if self.ema is not None and isinstance(self.ema.module, Denoiser):
            networks["ema.module"] = self.ema.module
        return networks

    def unsaved_weights(self) -> set[str]:
        """Names in the state dict of what comes from sources: frozen networks and bases under adapters."""
        shared = {f"{place}.{key}" for place, network in self._denoisers().items() for key in network.shared_weights}
        prefixes = tuple(f"{name}." for name in self.frozen_networks)
        return shared | {key for key in self.state_dict() if prefixes and key.startswith(prefixes)}

    def _frozen_hashes(self) -> dict[str, str]:
        """What a checkpoint keeps of all that it does not hold."""
        based = [name for name, network in self._denoisers().items() if network.shared_weights and name != "ema.module"]
        return {name: self.frozen_hash(name) for name in (*self.frozen_networks, *based)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in self.unsaved_weights():
            del checkpoint["state_dict"][key]
        checkpoint["frozen_sha256"] = self._frozen_hashes()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        hashes = checkpoint.get("frozen_sha256", {})
        if set(hashes) != set(self._frozen_hashes()):
            raise RuntimeError(
                f"the checkpoint was trained with the frozen networks {sorted(hashes)}, this run has "
                f"{sorted(self._frozen_hashes())}: use the config the run started with"
            )
        for name, seen in hashes.items():
            own = self.frozen_hash(name)
            if own != seen:
                raise RuntimeError(
                    f"the checkpoint was trained with another {name!r} network: its sha256 is {seen[:16]}..., "
                    f"this run's is {own[:16]}.... Point the config at the network the run started with."
                )
        # What is not in the checkpoint comes from its source; put it in so that loading stays strict for all the rest.
        weights = self.state_dict()
        checkpoint["state_dict"].update({key: weights[key] for key in self.unsaved_weights()})
