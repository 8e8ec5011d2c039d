"""CLIP-I, CLIP-T and DINO of a personalised model's samples, and their diversity over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor, nn

from unidad_pl.callbacks.base import EvaluationCallback, Report, check_some, feature_name
from unidad_pl.callbacks.given_images import GivenImages, Images, model_range
from unidad_pl.callbacks.outputs import Samples
from unidad_pl.checks import check_whole
from unidad_pl.metrics.encoders import CLIPImages, CLIPTexts, DINOImages
from unidad_pl.metrics.features import LPIPSFeatures, check_network
from unidad_pl.metrics.similarity import PromptLPIPS, SubjectCosines

Score = Literal["clip_i", "clip_t", "dino"]
SCORES: tuple[Score, ...] = get_args(Score)


class SubjectSimilarity(EvaluationCallback):
    """Logs ``<stage>/clip_i``, ``clip_t`` and ``dino``: the mean cosine of samples with the photos, and with prompts.

        >>> trainer = pl.Trainer(callbacks=[SubjectSimilarity(scores=["dino"], photos="photos/dog")])

    The record in ``metrics.jsonl`` names the subject and has the means of every prompt. The step must return
    ``prompts``. Photos have the samples' size, so that an encoder treats both alike.

    Args:
        scores: which of ``clip_i``, ``clip_t`` and ``dino``; the encoders of the others are not loaded.
        image_encoder: for ``clip_i`` and the samples of ``clip_t``: pictures [N, 3, H, W] in [-1, 1] -> [N, D];
            default CLIP ViT-B/32, whose weights must be there before training begins.
        text_encoder: for ``clip_t``: N texts -> [N, D] in the same space; default CLIP ViT-B/32's.
        dino: encoder of pictures for ``dino``; default DINO ViT-S/16.
        photos: folder or tensor [k, 3, H, W] (uint8, or float in [-1, 1]), or a list of images. Default:
            ``trainer.datamodule.shots``.
        token: rare word that is taken out of prompts for ``clip_t``. Default: ``trainer.datamodule.token``, if any.
        subject: what the record calls the subject. Default: ``trainer.datamodule.subject``, if any.
        batch_size: pictures per pass.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: an unknown score or none, or ``batch_size`` below 1.
        TypeError: an encoder that is no module.
    """

    needs_prompts = True

    def __init__(
        self,
        scores: Sequence[Score] = SCORES,
        image_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        dino: nn.Module | None = None,
        photos: Images = None,
        token: str | None = None,
        subject: str | None = None,
        batch_size: int = 16,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_some("scores", scores, Score)
        check_whole(1, batch_size=batch_size)
        given = {"image_encoder": image_encoder, "text_encoder": text_encoder, "dino": dino}
        check_network(**{argument: network for argument, network in given.items() if network is not None})
        self.scores, self.token, self.subject = tuple(scores), token, subject
        encoders: dict[str, nn.Module] = {}
        if {"clip_i", "clip_t"} & set(scores):
            encoders["clip_i"] = CLIPImages() if image_encoder is None else image_encoder
        if "dino" in scores:
            encoders["dino"] = DINOImages() if dino is None else dino
        texts = (CLIPTexts() if text_encoder is None else text_encoder) if "clip_t" in scores else None
        self.metric: SubjectCosines = SubjectCosines(encoders, texts, batch_size=batch_size)
        self.photos = GivenImages("SubjectSimilarity", "photos", photos, attribute="shots")
        self._ready = False

    def produces(self) -> tuple[Score, ...]:
        return self.scores

    def forget(self) -> None:
        self._ready = False
        self.photos.forget()

    def inspect(self, trainer: pl.Trainer, samples: Samples) -> None:
        self.photos.check_size(trainer, (samples.images.shape[2], samples.images.shape[3]))

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for encoder in self.metric.networks().values():
            self.load_features(trainer, encoder)
        self.photos.check(trainer)
        self._ready = False  # another run may have another subject
        self.metric.token = self.token or getattr(getattr(trainer, "datamodule", None), "token", None)

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        if not self._ready:
            if self.photos.are_new(trainer, self._size):
                self.metric.set_photos(model_range(self.photos.load(trainer, self._size).to(images.device)))
            self._ready = True
        self.metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        found = self.metric.result()
        chosen = {name: encoder for name, encoder in self.metric.networks().items() if name in self.scores}
        details: dict[str, Any] = {
            "subject": self.subject or getattr(getattr(trainer, "datamodule", None), "subject", None),
            "token": self.metric.token,
            "extractor": {name: feature_name(encoder) for name, encoder in chosen.items()},
            "prompts": {text: self._wanted(scores) for text, scores in found.by_prompt.items()},
        }
        return Report(self._wanted(found.means), details)

    def _wanted(self, scores: dict[str, float]) -> dict[str, float]:
        return {name: scores[name] for name in self.scores}


class PromptDiversity(EvaluationCallback):
    """Logs ``<stage>/intra_prompt_lpips`` and ``inter_prompt_lpips``: how different two samples of one prompt are, and
    two of different prompts; see :class:`unidad_pl.metrics.PromptLPIPS`. The step must return ``prompts``. What has no
    such pair of samples is left out, with a warning.

        >>> trainer = pl.Trainer(callbacks=[PromptDiversity(LPIPSFeatures("alex"), stages=["test"])])

    Args:
        features: extractor; default LPIPS-VGG, whose weights must be there before training begins.
        batch_size: pictures per pass.
        common: see :class:`~unidad_pl.callbacks.base.EvaluationCallback`.

    Raises:
        ValueError: ``batch_size`` below 1.
        TypeError: ``features`` is no module.
    """

    needs_prompts = True

    def __init__(self, features: nn.Module | None = None, batch_size: int = 8, **common: Any) -> None:
        super().__init__(**common)
        self.features: nn.Module = LPIPSFeatures("vgg") if features is None else features
        self.metric: PromptLPIPS = PromptLPIPS(self.features, batch_size)

    def produces(self) -> list[str]:
        return ["intra_prompt_lpips", "inter_prompt_lpips"]

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, seeds: Tensor) -> None:
        self.metric.update(images, self.needed_prompts(), seeds)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> Report:
        found = self.metric.result()
        known = {name: value for name, value in found.means.items() if not math.isnan(value)}
        for absent, need in {"intra": "two samples of one prompt", "inter": "samples of two prompts"}.items():
            if absent not in known:
                self.warn_once(f"{absent}_prompt_lpips is left out: it needs {need}. Draw more samples", once=absent)
        values = {f"{name}_prompt_lpips": value for name, value in known.items()}
        prompts = {text: scores["intra"] for text, scores in found.by_prompt.items()}
        return Report(values, {"extractor": feature_name(self.features), "intra_by_prompt": prompts})
