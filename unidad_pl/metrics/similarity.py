"""How much samples resemble a subject's photos (CLIP-I, DINO) and their prompts (CLIP-T), and how varied they are.

Every score is one sample's mean of cosines and needs no other sample, so the means over a prompt or over everything are
the same on any number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidad_pl.checks import check_whole
from unidad_pl.metrics.features import check_network, extract, float_images
from unidad_pl.metrics.gather import RowMetric, distinct_in_order, double


def mean_cosine(embeddings: Tensor, others: Tensor) -> Tensor:
    """The mean cosine [N] of each of ``embeddings`` [N, D] with all of ``others`` [M, D], in float64."""
    # Each row alone, and no matrix product: its last bits depend on the number of rows, and so on the number of ranks.
    directions = F.normalize(double(others), dim=1).to(embeddings.device)
    return (F.normalize(double(embeddings), dim=1).to(directions) * directions.mean(0)).sum(1)


def without_token(prompt: str, token: str | None) -> str:
    """``prompt`` without the rare word ``token``: an encoder that was not trained on it cannot know it."""
    if token is None:
        return prompt
    return " ".join(re.sub(rf"(?<!\w){re.escape(token.strip())}(?!\w)", " ", prompt).split())


class PromptMetric(RowMetric):
    """A :class:`~unidad_pl.metrics.gather.RowMetric` whose rows belong to numbered samples with prompts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("index", 1, torch.long, numbers="index")
        self.add_rows("lengths", 1, torch.long)
        self.add_rows("letters", 1, torch.uint8)  # all prompts one after the other, in UTF-8

    def add_samples(
        self, state: str, rows: Tensor, prompts: Sequence[str], indices: Tensor | Sequence[int] | None
    ) -> None:
        """Samples with their ``prompts`` and numbers, and what ``state`` keeps of them: ``rows`` [B, ...].

        Raises:
            ValueError: another number of prompts or of indices, or indices in one update and none in another.
        """
        numbers = self.number("index", len(prompts), indices)
        texts = [prompt.encode() for prompt in prompts]
        self.append(state, rows)
        self.append("index", numbers)
        self.append("lengths", torch.tensor([len(text) for text in texts], dtype=torch.long))
        self.append("letters", torch.tensor(list(b"".join(texts)), dtype=torch.uint8))

    def by_prompt(self) -> dict[str, Tensor]:
        """Prompt -> positions of its samples among the rows, every sample number once; for use in ``compute``.

        Samples are in the order of their numbers, prompts in the order of their first samples.

        Raises:
            ValueError: no samples.
        """
        lengths = self.rows("lengths")
        if not len(lengths):
            raise ValueError(f"{type(self).__name__} has no samples: call update before compute")
        letters, ends = bytes(self.rows("letters").tolist()), lengths.cumsum(0).tolist()
        groups: dict[str, list[int]] = {}
        for position in distinct_in_order(self.rows("index")).tolist():
            text = letters[ends[position - 1] if position else 0 : ends[position]].decode()
            groups.setdefault(text, []).append(position)
        return {text: torch.tensor(positions) for text, positions in groups.items()}


def check_prompts(prompts: Sequence[str], images: Tensor) -> None:
    """Refuse what is not one prompt per image.

    Raises:
        ValueError: says how many they are.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of strings, got {prompts!r}")
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: give one per image")


@dataclass
class Scores:
    """What :class:`SubjectCosines` and :class:`PromptLPIPS` find.

    Attributes:
        means: score -> mean over all samples.
        by_prompt: prompt -> score -> mean over its samples.
    """

    means: dict[str, float]
    by_prompt: dict[str, dict[str, float]]


class SubjectCosines(PromptMetric):
    """``set_photos(photos)``, then ``update(images, prompts, indices)``, then ``compute()``: score -> float64 scalar.

        >>> metric = SubjectCosines({"pixels": nn.Flatten()})
        >>> metric.set_photos(torch.ones(2, 3, 4, 4))
        >>> metric.update(torch.full((1, 3, 4, 4), 0.5), ["a dog"])
        >>> round(float(metric.compute()["pixels"]), 4)  # brightness does not count
        1.0
        >>> list(metric.result().by_prompt)
        ['a dog']

    Args:
        image_encoders: score -> encoder of pictures [N, 3, H, W] in [-1, 1]; the score is the mean cosine with the
            photos.
        text_encoder: encoder of texts for ``clip_t``, the cosine with the sample's prompt; None: no such score.
        text_side: which of ``image_encoders`` shares a space with ``text_encoder``.
        token: word that is taken out of prompts before they are encoded.
        batch_size: pictures per pass.
        kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: no encoder, ``text_side`` names none, or a number out of range.
        TypeError: an encoder that is no module.
    """

    higher_is_better = True

    def __init__(
        self,
        image_encoders: Mapping[str, nn.Module],
        text_encoder: nn.Module | None = None,
        text_side: str = "clip_i",
        token: str | None = None,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not image_encoders or (text_encoder is not None and text_side not in image_encoders):
            raise ValueError(
                f"text_side must name one of the image encoders, got {text_side!r} and {list(image_encoders)}"
            )
        check_whole(1, batch_size=batch_size)
        check_network(**image_encoders)
        check_network(text_encoder=nn.Identity() if text_encoder is None else text_encoder)
        self.encoders = nn.ModuleDict(dict(image_encoders))
        self.text_encoder, self.text_side, self.token, self.batch_size = text_encoder, text_side, token, batch_size
        self.names = [*image_encoders, *(["clip_t"] if text_encoder is not None else [])]
        self.add_rows("scores", 2, torch.float64, on_cpu=True)
        # A MetricCollection lets metrics share states that are equal at first; with other tokens they need not stay so.
        told = torch.tensor(list(f"{token} {text_side}".encode()), dtype=torch.long)
        self.add_state("told", told.sum() * 1009 + (told * torch.arange(len(told))).sum(), dist_reduce_fx="max")
        self._photos: dict[str, Tensor] = {}
        self._embedded: dict[str, Tensor] = {}

    def networks(self) -> dict[str, nn.Module]:
        """Score -> the encoder it is measured with (``clip_t``: that of texts)."""
        named = dict(self.encoders.items())
        return named if self.text_encoder is None else named | {"clip_t": self.text_encoder}

    def set_photos(self, photos: Tensor) -> None:
        """The subject's photos [k, 3, H, W] in [-1, 1]; ``reset`` keeps them.

        Raises:
            ValueError: no such images, or none.
        """
        photos = float_images(photos, "photos")
        if not len(photos):
            raise ValueError("photos must be [k, 3, H, W] with k >= 1, got none")
        self._photos = {name: extract(encoder, photos, self.batch_size) for name, encoder in self.encoders.items()}

    def update(self, images: Tensor, prompts: Sequence[str], indices: Tensor | Sequence[int] | None = None) -> None:
        """Samples [B, 3, H, W] in [-1, 1], their prompts and their numbers [B]; see :meth:`TwoSample.update`.

        Raises:
            ValueError: no photos yet, images with NaN or outside [-1, 1], another number of prompts or of indices.
        """
        if not self._photos:
            raise ValueError("SubjectCosines has no photos: call set_photos before update")
        images = float_images(images, "samples")
        check_prompts(prompts, images)
        if not len(images):
            return
        found = {name: extract(encoder, images, self.batch_size) for name, encoder in self.encoders.items()}
        columns = [mean_cosine(rows, self._photos[name]) for name, rows in found.items()]
        if self.text_encoder is not None:
            texts = double(self._texts_of(prompts))
            columns.append((F.normalize(double(found[self.text_side]), dim=1).to(texts.device) * texts).sum(1))
        self.add_samples("scores", torch.stack([column.cpu() for column in columns], 1), prompts, indices)

    def _texts_of(self, prompts: Sequence[str]) -> Tensor:
        assert self.text_encoder is not None
        texts = [without_token(prompt, self.token) for prompt in prompts]  # the token may change from run to run
        for text in dict.fromkeys(texts):
            if text not in self._embedded:
                with torch.no_grad():
                    self._embedded[text] = F.normalize(self.text_encoder([text]).float(), dim=1)[0]
        return torch.stack([self._embedded[text] for text in texts])

    def result(self) -> Scores:
        """The means over all samples of all ranks, and by prompt.

        Raises:
            ValueError: no samples.
        """
        with self.everyones():
            groups, scores = self.by_prompt(), self.rows("scores")
        every = scores[torch.cat(list(groups.values()))].mean(0)
        return Scores(
            means=dict(zip(self.names, every.tolist(), strict=True)),
            by_prompt={
                text: dict(zip(self.names, scores[rows].mean(0).tolist(), strict=True)) for text, rows in groups.items()
            },
        )

    def compute(self) -> dict[str, Tensor]:
        """Score -> mean over all samples of all ranks.

        Raises:
            ValueError: no samples.
        """
        return {name: self.scalar(value) for name, value in self.result().means.items()}


class PromptImages(PromptMetric):
    """Keeps samples, rounded to 8 bits, by prompt: ``compute()`` is prompt -> [n, 3, H, W] uint8, seeds ascending."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("images", 4, torch.uint8)
        self._image_shape: tuple[int, ...] | None = None

    def update(self, images: Tensor, prompts: Sequence[str], indices: Tensor | Sequence[int] | None = None) -> None:
        """Samples [B, 3, H, W] in [-1, 1], their prompts and their numbers [B]; see :meth:`TwoSample.update`.

        Raises:
            ValueError: images with NaN or outside [-1, 1], another number of prompts or of indices.
        """
        images = float_images(images, "samples")
        check_prompts(prompts, images)
        if len(images):
            shape = tuple(images.shape[1:])
            if self.index and self._image_shape not in (None, shape):
                raise ValueError(
                    f"samples are {shape} here and were {self._image_shape} before: all must have one size"
                )
            self._image_shape = shape
            self.add_samples("images", ((images.clamp(-1, 1) + 1) * 127.5).round(), prompts, indices)

    def samples(self) -> dict[str, Tensor]:
        """Prompt -> the samples of all ranks.

        Raises:
            ValueError: no samples.
        """
        with self.everyones():
            images = self.rows("images")
            return {text: images[rows] for text, rows in self.by_prompt().items()}

    def compute(self) -> dict[str, Tensor]:
        return self.samples()


class PromptLPIPS(PromptImages):
    """``update(images, prompts, indices)``, then ``compute()``: LPIPS between samples, as a dict of float64 scalars.

        >>> from unidad_pl.metrics import LPIPSFeatures
        >>> metric = PromptLPIPS(LPIPSFeatures("squeeze", pnet_rand=True))  # without pnet_rand: the real weights
        >>> metric.update(torch.rand(4, 3, 32, 32), ["a dog", "a dog", "a cat", "a cat"])
        >>> sorted(metric.compute())
        ['inter', 'intra']

    ``intra``: the mean distance of two samples of one prompt, averaged over prompts with two samples or more.
    ``inter``: the mean distance of two samples of different prompts. NaN where there is no such pair.

    Pictures are kept, rounded to 8 bits. With ``|phi(x) - phi(y)|^2`` for LPIPS, the distances of m samples sum to
    ``m S2 - |S1|^2`` (see :mod:`unidad_pl.metrics.intra_lpips`): one pass per picture, no pairs.

    Args:
        features: phi, e.g. :class:`~unidad_pl.metrics.LPIPSFeatures`.
        batch_size: pictures per pass.
        kwargs: for ``torchmetrics.Metric``.

    Raises:
        ValueError: ``batch_size`` below 1.
        TypeError: ``features`` is no module.
    """

    higher_is_better = True

    def __init__(self, features: nn.Module, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_network(features=features)
        check_whole(1, batch_size=batch_size)
        self.features, self.batch_size = features, batch_size

    def compute(self) -> dict[str, Tensor]:
        """``intra`` and ``inter`` over all samples of all ranks.

        Raises:
            ValueError: no samples.
        """
        return {name: self.scalar(value) for name, value in self.result().means.items()}

    def result(self) -> Scores:
        """The means over all samples of all ranks, and ``intra`` by prompt.

        Raises:
            ValueError: no samples.
        """
        groups = self.samples()
        prompts: dict[str, tuple[float, int]] = {}
        anchor: Tensor | None = None
        s1, s2 = torch.zeros(()), 0.0
        for text, images in groups.items():
            own1, own2 = torch.zeros(()), 0.0
            for part in images.split(self.batch_size):
                phi = double(extract(self.features, part.float() / 127.5 - 1, self.batch_size))
                anchor = phi[0] if anchor is None else anchor
                own1, own2 = own1 + (phi - anchor).sum(0), own2 + float((phi - anchor).square().sum())
            s1, s2 = s1 + own1, s2 + own2
            prompts[text] = distances_and_pairs(own1, own2, len(images))
        inside, within = (sum(values) for values in zip(*prompts.values(), strict=True))
        distances, pairs = distances_and_pairs(s1, s2, sum(map(len, groups.values())))
        known = [own / number for own, number in prompts.values() if number]
        return Scores(
            means={"intra": _ratio(sum(known), len(known)), "inter": _ratio(distances - inside, pairs - within)},
            by_prompt={text: {"intra": _ratio(*own)} for text, own in prompts.items()},
        )


def distances_and_pairs(s1: Tensor, s2: float, count: int) -> tuple[float, int]:
    """The sum of all distances between ``count`` samples, from their sums around any anchor, and how many there are."""
    return max(count * s2 - float(s1.square().sum()), 0.0), count * (count - 1) // 2  # in this order NaN stays NaN


def _ratio(total: float, count: int) -> float:
    return max(total, 0.0) / count if count else float("nan")
