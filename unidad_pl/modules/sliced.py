"""Networks sliced over ranks, for models that do not fit one device (strategy ``unidad_fsdp``)."""

from __future__ import annotations

from torch import nn

from unidad_pl.modules.frozen import FrozenNetworks
from unidad_pl.sharding import NAME, ShardedStrategy, shard


class SlicedNetworks(FrozenNetworks):
    """Slices every network of a module, the average and the discriminator's heads included."""

    _is_sliced = False

    def refuse_to_slice(self) -> str | None:
        """Why the networks of this module cannot be sliced, None if they can."""
        memory = self.memory
        if memory.teacher_device or memory.ema_device or memory.teacher_dtype != "float32":
            return "it slices all networks alike: leave memory.teacher_device, ema_device and teacher_dtype as they are"
        if any(network.shared_weights for network in self._denoisers().values()):
            return "networks that share one base under adapters are small already: use unidad_ddp"
        if self.trainer.precision == "16-mixed":
            return "it has no loss scaling: use precision bf16-mixed"
        return None

    def slice_networks(self) -> None:
        """To be called once they are built and frozen. Does nothing with another strategy.

        Raises:
            RuntimeError: a setting that does not go with slices.
        """
        trainer = self._trainer
        if trainer is None or not isinstance(trainer.strategy, ShardedStrategy) or self._is_sliced:
            return
        reason = self.refuse_to_slice()
        if reason is not None:
            raise RuntimeError(f"strategy {NAME} cannot be used here: {reason}")
        for name in self._frozen_hashes():  # while the weights are whole
            self.frozen_hash(name)
        mesh = trainer.strategy.device_mesh["data_parallel"]
        for name, child in self.named_children():
            network: nn.Module = child.module if name == "ema" else child  # type: ignore[assignment]
            if any(True for _ in network.parameters()):
                shard(network, mesh)
        self._is_sliced = True
