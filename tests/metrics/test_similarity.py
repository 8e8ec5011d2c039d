"""Similarity to a subject and diversity over prompts, against loops over pairs."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.metrics.toys import TinyFeatures, WordVectors, images, refused
from unidad_pl.metrics import IntraClusterLPIPS, PromptLPIPS, SubjectCosines
from unidad_pl.metrics.similarity import mean_cosine, without_token

PROMPTS = ["a prt dog", "a prt dog", "red prt dog", "a prt dog", "red prt dog", "alone"]


class Flat(nn.Module):
    """An encoder whose embeddings are the pictures' first two values."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, :2]


def test_scores_equal_loops_over_pairs() -> None:
    photos, samples = images(3, seed=1), images(6, seed=2)
    clip, dino, texts = TinyFeatures(), TinyFeatures(seed=4), WordVectors()
    metric = SubjectCosines({"clip_i": clip, "dino": dino}, texts, token="prt", batch_size=2)
    metric.set_photos(photos)
    metric.update(samples, PROMPTS, torch.arange(6))
    found = metric.result()
    clip.eval(), dino.eval()

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a.double(), b.double(), dim=0))

    with torch.no_grad():
        for name, encoder in (("clip_i", clip), ("dino", dino)):
            pairs = [[cosine(encoder(s[None])[0], encoder(p[None])[0]) for p in photos] for s in samples]
            by_sample = [sum(row) / 3 for row in pairs]
            assert found.means[name] == pytest.approx(sum(by_sample) / 6, rel=1e-5)
            assert found.by_prompt["red prt dog"][name] == pytest.approx((by_sample[2] + by_sample[4]) / 2, rel=1e-5)
        meant = texts([p.replace("prt ", "") for p in PROMPTS])
        by_text = [cosine(clip(s[None])[0], text) for s, text in zip(samples, meant, strict=True)]
    assert found.means["clip_t"] == pytest.approx(sum(by_text) / 6, rel=1e-5)
    assert found.by_prompt["alone"]["clip_t"] == pytest.approx(by_text[5], rel=1e-5)
    assert list(found.by_prompt) == ["a prt dog", "red prt dog", "alone"]


def test_the_rare_token_changes_nothing_once_removed() -> None:
    def clip_t(prompt: str, token: str | None) -> float:
        metric = SubjectCosines({"clip_i": TinyFeatures()}, WordVectors(), token=token)
        metric.set_photos(images(1))
        metric.update(images(2), [prompt] * 2, torch.arange(2))
        return metric.result().means["clip_t"]

    assert clip_t("a prt dog", "prt") == clip_t("a dog", None) == clip_t("a xyz dog", "xyz")
    assert clip_t("a prt dog", None) != clip_t("a dog", None)


def test_closed_forms() -> None:
    def of(*values: float) -> Tensor:
        picture = torch.zeros(1, 3, 4, 4)
        picture[0, 0, 0, :2] = torch.tensor(values)
        return picture

    metric = SubjectCosines({"clip_i": Flat()})
    metric.set_photos(torch.cat([of(1, 0), of(0, 0.5)]))  # cosines do not know lengths
    samples = torch.cat([of(1, 0), of(-0.1, 0), of(0.6, 0.8)])
    metric.update(samples, ["x", "y", "z"], torch.arange(3))
    by_prompt = metric.result().by_prompt
    assert [by_prompt[p]["clip_i"] for p in "xyz"] == pytest.approx([0.5, -0.5, 0.7], abs=1e-6)
    metric.reset()
    metric.set_photos(of(0.3, 0.4).expand(4, -1, -1, -1))
    metric.update(of(0.3, 0.4).expand(5, -1, -1, -1), ["x"] * 5, torch.arange(5))
    assert metric.result().means["clip_i"] == pytest.approx(1, abs=1e-6)  # the same picture


def test_neither_order_nor_batches_nor_repetitions_count() -> None:
    samples = images(6, seed=2)

    def found(order: list[int], part: int) -> list[dict[str, float]]:
        similar = SubjectCosines({"clip_i": TinyFeatures()}, WordVectors(), token="prt")
        similar.set_photos(images(3, seed=1))
        varied = PromptLPIPS(TinyFeatures(), batch_size=2)
        for start in range(0, len(order), part):
            rows = order[start : start + part]
            for metric in (similar, varied):
                metric.update(samples[rows], [PROMPTS[i] for i in rows], torch.tensor(rows))
        return [similar.result().means, varied.result().means]

    base = found([0, 1, 2, 3, 4, 5], 6)
    for order, part in (([5, 2, 0, 4, 1, 3], 1), ([0, 1, 2, 3, 4, 5, 0, 0, 2], 4)):
        for got, want in zip(found(order, part), base, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def test_photos_in_another_order_score_the_same() -> None:
    photos, samples = Flat()(images(4, seed=1)), Flat()(images(3, seed=2))
    torch.testing.assert_close(mean_cosine(samples, photos), mean_cosine(samples, photos.flip(0)))


def test_diversity_equals_loops_over_pairs() -> None:
    samples, features = images(6, seed=2), TinyFeatures(spatial=True)
    metric = PromptLPIPS(features, batch_size=2)
    metric.update(samples, PROMPTS, torch.arange(6))
    found = metric.result()
    features.eval()
    rounded = ((samples + 1) * 127.5).round() / 127.5 - 1
    with torch.no_grad():
        phi = features(rounded).double()
    distance = {(i, j): float((phi[i] - phi[j]).square().sum()) for i, j in combinations(range(6), 2)}
    intra: dict[str, list[float]] = {}
    for (i, j), value in distance.items():
        intra.setdefault(PROMPTS[i] if PROMPTS[i] == PROMPTS[j] else "", []).append(value)
    inter = intra.pop("")
    assert found.means["inter"] == pytest.approx(sum(inter) / len(inter), rel=1e-5)
    means = {prompt: sum(values) / len(values) for prompt, values in intra.items()}
    assert found.means["intra"] == pytest.approx(sum(means.values()) / 2, rel=1e-5)
    assert found.by_prompt["red prt dog"]["intra"] == pytest.approx(means["red prt dog"], rel=1e-5)
    assert math.isnan(found.by_prompt["alone"]["intra"])


def test_equal_samples_have_no_diversity_and_single_ones_none_to_speak_of() -> None:
    metric = PromptLPIPS(TinyFeatures())
    same = images(1).expand(4, -1, -1, -1)
    metric.update(same, ["x", "x", "y", "y"], torch.arange(4))
    assert metric.result().means == {"intra": 0, "inter": 0}
    metric.reset()
    metric.update(same[:1], ["x"], torch.arange(1))
    assert all(math.isnan(value) for value in metric.result().means.values())


def test_words_are_removed_whole() -> None:
    assert without_token("a prt dog", "prt") == "a dog"
    assert without_token("prt, a prting dog", " prt ") == ", a prting dog"
    assert without_token("a <s*> dog", "<s*>") == "a dog"
    assert without_token("a prt dog", None) == "a prt dog"


def test_what_is_wrong_is_named() -> None:
    refused(r"text_side must name .* got 'clip_i' and", SubjectCosines, {"dino": TinyFeatures()}, WordVectors())
    metric = SubjectCosines({"clip_i": TinyFeatures()})
    refused("call set_photos before update", metric.update, images(1), ["x"], torch.arange(1))
    metric.set_photos(images(1))
    refused("1 prompts for 2 images", metric.update, images(2), ["x"], torch.arange(2))
    for empty in (SubjectCosines({"clip_i": TinyFeatures()}), PromptLPIPS(TinyFeatures())):
        refused("has no samples", empty.compute)


def test_another_token_is_another_metric_in_a_collection() -> None:
    """The first prompts hold no token: both have equal scores then, and would share them for ever."""

    def made(token: str | None) -> SubjectCosines:
        metric = SubjectCosines({"clip_i": TinyFeatures()}, WordVectors(), token=token)
        metric.set_photos(images(3))
        return metric

    both, alone = MetricCollection({"plain": made(None), "told": made("prt")}), made("prt")
    for prompts in (["a dog", "a cat"], ["a prt dog", "a prt cat"]):
        both.update(images(2, seed=len(prompts[0])), prompts)
        alone.update(images(2, seed=len(prompts[0])), prompts)
    assert both.compute()["told_clip_t"] == alone.compute()["clip_t"] != both.compute()["plain_clip_t"]


def test_samples_of_two_sizes_are_refused_when_they_come() -> None:
    metric = PromptLPIPS(TinyFeatures())
    metric.update(images(2, 8), ["a"] * 2)
    refused(r"samples are \(3, 16, 16\) here and were \(3, 8, 8\) before", metric.update, images(2, 16), ["a"] * 2)
    metric.reset()
    metric.update(images(2, 16), ["a"] * 2)
    assert metric.samples()["a"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (["a", "b"], r"indices must be whole numbers, got \['a', 'b'\]"), ([None, None], "got .None"),
        ([2**70, 1], "got .1180"), (torch.tensor([1j, 2]), "complex64"), ([-1, 0], "at least 0, got -1"),
        (torch.tensor([2**63, 0], dtype=torch.uint64), "indices must be"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_none_are_refused(numbers: Any, said: str) -> None:
    refused(said, PromptLPIPS(TinyFeatures()).update, images(2), ["a"] * 2, numbers)


@pytest.mark.parametrize("form", ["grey", "half", "double"])
def test_one_rule_for_the_images_of_metrics(form: str) -> None:
    """One channel is repeated, and other precisions are float32: what their networks take."""
    given = images(4).mean(1, keepdim=True) if form == "grey" else images(4).to(getattr(torch, form))
    same = given.float().expand(-1, 3, -1, -1)

    def scores(samples: Tensor) -> list[Tensor]:
        subject = SubjectCosines({"clip_i": TinyFeatures()}, WordVectors())
        subject.set_photos(samples[:3])
        subject.update(samples, ["a"] * 4)
        diverse, near = PromptLPIPS(TinyFeatures()), IntraClusterLPIPS(TinyFeatures())
        diverse.update(samples, ["a"] * 4)
        near.set_shots(samples[:1])
        near.update(samples)
        return [*subject.compute().values(), diverse.compute()["intra"], near.compute()]

    assert scores(given) == scores(same)
    refused(r"samples must be a tensor \[N, 3, H, W\], got shape \(4, 2, 8, 8\)", PromptLPIPS(TinyFeatures()).update,
            torch.zeros(4, 2, 8, 8), ["a"] * 4)  # fmt: skip
