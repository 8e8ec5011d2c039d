"""CLIP-I, CLIP-T and DINO of a personalised model's samples, and their diversity over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import STAGES, EvaluationCallback, Report, feature_name
from unidad_pl.callbacks.sources import Images, ImageSource, model_range
from unidad_pl.metrics import similarity as metric
from unidad_pl.metrics.encoders import CLIPImages, CLIPTexts, DINOImages
from unidad_pl.metrics.features import LPIPSFeatures

SCORES = ("clip_i", "clip_t", "dino")


class SubjectSimilarity(EvaluationCallback):
    """Logs ``<stage>/clip_i``, ``clip_t`` and ``dino``: the mean cosine of samples with the photos, and with prompts.

    The record in ``metrics.jsonl`` names the subject and has the means of every prompt. The step must return
    ``prompts``. Photos and samples have one size and take one way into an encoder.

    Args:
        scores: which of ``clip_i``, ``clip_t`` and ``dino``; the encoders of the others are not loaded.
        image_encoder: for ``clip_i`` and the samples of ``clip_t``: pictures [N, 3, H, W] in [-1, 1] -> [N, D];
            default CLIP ViT-B/32, whose weights must be there before training begins.
        text_encoder: for ``clip_t``: N texts -> [N, D] in the same space; default CLIP ViT-B/32's.
        dino: encoder of pictures for ``dino``; default DINO ViT-S/16.
        photos: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]). Default: ``trainer.datamodule.shots``.
        token: rare word that is taken out of prompts for ``clip_t``. Default: ``trainer.datamodule.token``, if any.
        subject: what the record calls the subject. Default: ``trainer.datamodule.subject``, if any.
        batch_size: pictures per pass.
        key: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.
        dataloader_idx: see there.
        stages: see there.

    Raises:
        ValueError: an unknown score or none, or ``batch_size`` below 1.
    """

    def __init__(
        self,
        scores: Sequence[str] = SCORES,
        image_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        dino: nn.Module | None = None,
        photos: Images = None,
        token: str | None = None,
        subject: str | None = None,
        batch_size: int = 16,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[str] = STAGES,
    ) -> None:
        super().__init__(key, dataloader_idx, stages)
        if not scores or any(score not in SCORES for score in scores) or batch_size < 1:
            raise ValueError(
                f"SubjectSimilarity: scores must be some of {', '.join(SCORES)} and batch_size >= 1, "
                f"got {list(scores)} and {batch_size}"
            )
        self.scores, self.token, self.subject = tuple(scores), token, subject
        encoders: dict[str, nn.Module] = {}
        if {"clip_i", "clip_t"} & set(scores):
            encoders["clip_i"] = CLIPImages() if image_encoder is None else image_encoder
        if "dino" in scores:
            encoders["dino"] = DINOImages() if dino is None else dino
        texts = (CLIPTexts() if text_encoder is None else text_encoder) if "clip_t" in scores else None
        self._metric = metric.SubjectSimilarity(encoders, texts, batch_size=batch_size)
        self.photos = ImageSource("SubjectSimilarity", "shots", photos)
        self._photos_set = False

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for encoder in self._metric.networks().values():
            self.load_features(trainer, encoder)
        self.photos.check(trainer)
        self._photos_set = False  # another run may have another subject
        self._metric.token = self.token or getattr(getattr(trainer, "datamodule", None), "token", None)

    def begin(self, pl_module: pl.LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        if not self._photos_set:
            photos = self.photos.load(trainer, (images.shape[2], images.shape[3]))
            self._metric.set_photos(model_range(photos.to(images.device)))
            self._photos_set = True
        self._metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        found = self._metric.compute()
        chosen = {name: encoder for name, encoder in self._metric.networks().items() if name in self.scores}
        details: dict[str, Any] = {
            "subject": self.subject or getattr(getattr(trainer, "datamodule", None), "subject", None),
            "token": self._metric.token,
            "extractor": {name: feature_name(encoder) for name, encoder in chosen.items()},
            "prompts": {text: self._wanted(scores) for text, scores in found.by_prompt.items()},
        }
        return Report(self._wanted(found.means), details)

    def _wanted(self, scores: dict[str, float]) -> dict[str, float]:
        return {name: scores[name] for name in self.scores}


class PromptDiversity(EvaluationCallback):
    """Logs ``<stage>/intra_prompt_lpips`` and ``inter_prompt_lpips``: how different two samples of one prompt are, and
    two of different prompts; see :class:`unidad_pl.metrics.PromptDiversity`. The step must return ``prompts``.

    Args:
        features: extractor; default LPIPS-VGG, whose weights must be there before training begins.
        batch_size: pictures per pass.
        key: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.
        dataloader_idx: see there.
        stages: see there.

    Raises:
        ValueError: ``batch_size`` below 1.
    """

    def __init__(
        self,
        features: nn.Module | None = None,
        batch_size: int = 8,
        key: str = "samples",
        dataloader_idx: int = 0,
        stages: Sequence[str] = STAGES,
    ) -> None:
        super().__init__(key, dataloader_idx, stages)
        if batch_size < 1:
            raise ValueError(f"PromptDiversity: batch_size must be at least 1, got {batch_size}")
        self.features = LPIPSFeatures("vgg") if features is None else features
        self._metric = metric.PromptDiversity(self.features, batch_size)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.load_features(trainer, self.features)

    def begin(self, pl_module: pl.LightningModule) -> None:
        self._metric.to(pl_module.device).reset()

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self._metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        found = self._metric.compute()
        values = {f"{name}_prompt_lpips": value for name, value in found.means.items()}
        prompts = {text: scores["intra"] for text, scores in found.by_prompt.items()}
        return Report(values, {"extractor": feature_name(self.features), "intra_by_prompt": prompts})
