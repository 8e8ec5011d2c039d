"""CMMD of the generated images against reference images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from unidad_pl.callbacks.base import Report
from unidad_pl.callbacks.given_images import Images
from unidad_pl.callbacks.reference import ReferenceCallback
from unidad_pl.metrics.encoders import CLIP_336, CLIPImages
from unidad_pl.metrics.kernel import gaussian_mmd

SIGMA, SCALE = 10.0, 1000.0  # of its authors


class CMMD(ReferenceCallback):
    """Logs ``<stage>/cmmd``: the maximum mean discrepancy of CLIP's embeddings, times 1000 (Jayasumana et al. 2024).

        >>> trainer = pl.Trainer(callbacks=[CMMD(reference="path/to/images", stages=["test"])])

    See :func:`unidad_pl.metrics.gaussian_mmd`. Unlike FID it assumes nothing of how features are distributed, and says
    something of a few hundred images already.

    Args:
        features: encoder; default CLIP ViT-L/14 at 336 pixels, whose weights must be there before training begins.
        reference: folder or tensor [N, 3, H, W] (uint8, or float in [-1, 1]), or a list of images; at least 2. Default:
            ``trainer.datamodule.reference``.
        name: what the value is logged as.
        batch_size: images per pass of the encoder.
        cache: whether the embeddings of reference images are kept for other runs, by their content and the encoder's;
            or a folder to keep them in. Default: ``$XDG_CACHE_HOME/unidad_pl/references``.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1, or an empty name. In ``setup``: fewer than 2 reference images.
        TypeError: ``features`` is no module.
    """

    main = "cmmd"

    def __init__(
        self,
        features: nn.Module | None = None,
        reference: Images = None,
        name: str = "cmmd",
        batch_size: int = 16,
        cache: bool | str = True,
        **common: Any,
    ) -> None:
        encoder = CLIPImages(CLIP_336) if features is None else features
        super().__init__(encoder, reference, batch_size, cache, name=name, **common)

    def produces(self) -> list[str]:
        return ["cmmd"]

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        x, y, details = self.both(trainer)
        return Report({"cmmd": gaussian_mmd(x, y, SIGMA, SCALE)}, details | {"sigma": SIGMA, "scale": SCALE})
