"""Intra-LPIPS and memorisation of the generated images with respect to the shots."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.cluster_pictures import FOLDER, ClusterPictures
from unidad_pl.callbacks.given_images import GivenImages, Images, model_range, share
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.callbacks.records import on_rank_zero, run_folder, trained_iterations
from unidad_pl.checks import check_whole
from unidad_pl.data.pictures import as_uint8, grid, write_png
from unidad_pl.metrics.cache import ReferenceCache
from unidad_pl.metrics.features import LPIPSFeatures
from unidad_pl.metrics.intra_lpips import IntraClusterLPIPS, IntraClusterResult, Protocol


class IntraLPIPS(EvaluationCallback):
    """Logs ``<stage>/intra_lpips``, ``memorised`` and ``empty_clusters``; see :mod:`unidad_pl.metrics.intra_lpips`.

        >>> from unidad_pl import CartoonFeatures
        >>> trainer = pl.Trainer(callbacks=[IntraLPIPS(), IntraLPIPS(CartoonFeatures(), name="intra_cartoon")])

    ``memorised`` is the share of samples nearer than ``threshold`` to a shot. The record in ``metrics.jsonl`` also has
    the clusters one by one, and the mean with small clusters counted as 0.

    Args:
        features: extractor; default LPIPS-VGG, whose weights must be there before training begins.
        protocol: ``cdc`` or ``crdi``; see :class:`unidad_pl.metrics.IntraClusterLPIPS`.
        cap: how many members of a cluster are compared, at most; default 50 (``cdc``) or 100 (``crdi``).
        threshold: distance to a shot below which a sample counts as memorised.
        shots: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]), or a list of images. Default:
            ``trainer.datamodule.shots``.
        pictures: of each cluster, how many of the samples nearest to its shot and as many of those most different from
            it are drawn in ``<run folder>/samples/clusters/<stage>_step<step>.png``, a row for each shot: memorisation
            at a glance. Their seeds and distances are in the record. 0: none.
        relative: also log ``intra_lpips_relative``: the value over that of the reference images, the share of the
            target domain's diversity that was kept; left out, with a warning, where that has none. And
            ``nearest_relative``: the samples' mean distance to their nearest shot over that of the reference images. 1:
            as far from the shots as any other image of the domain; 0: copies.
        reference: images for ``relative``. Default: ``trainer.datamodule.reference``.
        name: what the value is logged as. With another name than ``intra_lpips`` the others are called
            ``<name>_memorised`` and so on, so that several of these callbacks can be used together.
        batch_size: images per pass of the extractor.
        cache: whether what was found of reference images is kept for other runs, by their content and the extractor's;
            or a folder to keep it in. Default: ``$XDG_CACHE_HOME/unidad_pl/references``. Extractors without a
            ``fingerprint`` keep nothing.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: an unknown protocol, a number out of range, or an empty name.
        TypeError: ``features`` is no module.
    """

    main = "intra_lpips"

    def __init__(
        self,
        features: nn.Module | None = None,
        protocol: Protocol = "cdc",
        cap: int | None = None,
        threshold: float = 0.1,
        shots: Images = None,
        pictures: int = 3,
        relative: bool = False,
        reference: Images = None,
        name: str = "intra_lpips",
        batch_size: int = 8,
        cache: bool | str = True,
        **common: Any,
    ) -> None:
        super().__init__(name=name, **common)
        self.features: nn.Module = LPIPSFeatures("vgg") if features is None else features
        self.metric: IntraClusterLPIPS = IntraClusterLPIPS(self.features, protocol, cap, threshold, batch_size)
        check_whole(0, pictures=pictures)
        self.shots = GivenImages("IntraLPIPS", "shots", shots)
        self.pictures = ClusterPictures(pictures)
        self.relative = relative
        self.reference = GivenImages("IntraLPIPS(relative=True)", "reference", reference)
        self.cache = ReferenceCache(cache)
        self._ready = False
        self._of_reference: IntraClusterResult | None = None

    def produces(self) -> list[str]:
        relative = ["intra_lpips_relative", "nearest_relative"] if self.relative else []
        return ["intra_lpips", "memorised", "empty_clusters", *relative]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self.shots.check(trainer)
        if self.relative:
            self.reference.check(trainer, least=2)
            if self.reference.are_shots(trainer):
                self.warn_once("intra_lpips_relative compares with the shots themselves: there are no other images")
        self._ready = False  # another run may have other images

    def forget(self) -> None:
        self._ready = False
        self.shots.forget()
        self.reference.forget()

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        for given in (self.shots, self.reference) if self.relative else (self.shots,):
            given.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._set_shots(trainer)
        self.metric.update(images, seeds)
        if self.pictures.wanted:
            self.pictures.update(as_uint8(images), seeds, self.metric.rows("distances")[-len(images) :])

    def begin(self, pl_module: pl.LightningModule) -> None:
        super().begin(pl_module)
        self.pictures.to(pl_module.device).reset()

    def _set_shots(self, trainer: pl.Trainer) -> None:
        if self._ready:
            return
        if self.shots.are_new(trainer, self._size):
            self.metric.set_shots(model_range(self.shots.load(trainer, self._size).to(self.metric.device)))
            self._of_reference = None
        if self.relative and self.reference.are_new(trainer, self._size):
            self._of_reference = None
        self._ready = True

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        self._set_shots(trainer)  # a rank that got no sample takes part in the gathering
        result = self.metric.result()
        values = {
            "intra_lpips": result.mean,
            "memorised": result.memorised,
            "empty_clusters": float(result.empty_clusters),
        }
        if math.isnan(result.mean):
            self.warn_once(f"{self.name} is NaN: no cluster has two samples; draw more than the number of shots")
        details: dict[str, Any] = {
            "protocol": self.metric.protocol,
            "cap": self.metric.cap,
            "threshold": self.metric.threshold,
            "extractor": feature_name(self.features),
            "shots": len(result.cluster_sizes),
            **{name: value for name, value in vars(result).items() if name not in ("mean", "memorised")},
        }
        if self.pictures.wanted:
            details |= self._draw(trainer, stage)
        if self.relative:
            known = self._of_reference = self._of_reference or self._measure_reference(trainer)
            details |= {"intra_lpips_of_reference": known.mean, "nearest_of_reference": known.nearest_mean,
                        "reference": sum(known.cluster_sizes)}  # fmt: skip
            if self.reference.are_shots(trainer):
                details["reference_is_shots"] = True
            if known.mean > 0:
                values["intra_lpips_relative"] = result.mean / known.mean
            else:
                self.warn_once(
                    f"intra_lpips_relative is left out: the reference images have an intra-LPIPS of {known.mean}; give "
                    f"some that differ, and more than there are shots"
                )
            if known.nearest_mean > 0:  # else they are the shots
                values["nearest_relative"] = result.nearest_mean / known.nearest_mean
        return Report(values, details)

    def _draw(self, trainer: pl.Trainer, stage: str) -> dict[str, Any]:
        """Write the picture; where it is, and whose samples it shows, for the record."""
        images, listed = self.pictures.of_clusters(len(self.metric.shot_features))
        shots = as_uint8(self.shots.load(trainer, self._size))
        name = stage if self.name in (None, self.main) else f"{self.name}_{stage}"
        place = f"{FOLDER}/{name}_step{trained_iterations(trainer):08d}.png"
        path = run_folder(trainer) / place
        rows = torch.cat([shots[:, None], images.to(shots.device)], 1).flatten(0, 1)
        on_rank_zero(trainer, path, lambda: write_png(grid(rows, None, 1 + images.shape[1], 1), path))
        return {"picture": place, "clusters": listed}

    def _measure_reference(self, trainer: pl.Trainer) -> IntraClusterResult:
        """The same of the reference images, shared out over ranks, or known from an earlier run."""
        every, shots = (given.load(trainer, self._size) for given in (self.reference, self.shots))
        device = self.metric.device
        how = self.metric.protocol, self.metric.cap, self.metric.threshold
        key = self.cache.key(every, self.features, device, "intra", shots, how)
        known = self.cache.read(key)
        if trainer.strategy.reduce_boolean_decision(known is not None, all=True) and known is not None:
            found: dict[str, Any] = {name: value.tolist() for name, value in known.items()}
            return IntraClusterResult(**found)
        self.metric.reset()
        for images, numbers in share(trainer, every, device, batch_size=64):
            self.metric.update(images, numbers)
        result = self.metric.result()
        self.metric.reset()
        if trainer.is_global_zero:
            self.cache.write(key, {name: torch.from_numpy(np.array(value)) for name, value in vars(result).items()})
        return result
