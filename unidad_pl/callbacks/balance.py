"""How strongly each loss term pulls on the student's images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from unidad_pl.checks import check_whole


class LossBalance(pl.Callback):
    """Logs, for every term of the student's loss, the norm of its gradient with respect to the generated images.

        >>> trainer = pl.Trainer(callbacks=[LossBalance(every_n_iterations=100)])

    ``balance/<term>`` is the L2 norm over the batch of the weighted term's gradient, ``balance/<term>_share`` that norm
    over the sum of all norms: a term with a share near 0 has no say, whatever the size of its loss.

    The module does the work on request: while ``keep_image_gradients`` is True, an iteration that updates the student
    leaves ``image_gradients``, a dict from term name to its gradient [B, C, H, W]. The request stands until an
    iteration has answered it, as not every one updates the student.

    Args:
        every_n_iterations: ask again when ``trainer.global_step`` is a multiple of it.

    Raises:
        ValueError: ``every_n_iterations`` below 1.
        TypeError: in ``setup``, a module that cannot answer.
    """

    def __init__(self, every_n_iterations: int = 50) -> None:
        check_whole(1, every_n_iterations=every_n_iterations)
        self.every_n_iterations = every_n_iterations
        self._due = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        missing = [name for name in ("keep_image_gradients", "image_gradients") if not hasattr(pl_module, name)]
        if stage == "fit" and missing:
            raise TypeError(
                f"LossBalance needs a module with {' and '.join(missing)}, as unidad_pl.modules.UniDAD has; "
                f"{type(pl_module).__name__} has none: remove the callback"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._due = self._due or trainer.global_step % self.every_n_iterations == 0
        module: Any = pl_module
        module.keep_image_gradients = self._due

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        gradients: dict[str, torch.Tensor] = module.image_gradients
        if not (self._due and gradients):
            return
        norms = {term: gradient.float().norm() for term, gradient in gradients.items()}
        total = torch.stack(list(norms.values())).sum().clamp_min(torch.finfo(torch.float32).tiny)
        for term, norm in norms.items():
            pl_module.log(f"balance/{term}", norm, on_step=True, on_epoch=False, sync_dist=True)
            pl_module.log(f"balance/{term}_share", norm / total, on_step=True, on_epoch=False, sync_dist=True)
        module.image_gradients = {}
        module.keep_image_gradients = self._due = False
