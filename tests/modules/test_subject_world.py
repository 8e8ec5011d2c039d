"""A world of texts where every answer is known: latents N(mu(prompt), 1), one affine step for a student.

What keeps the class in its place is that the student, F and T are only ever told the subject's prompt, and S only the
class's: where prompts have embeddings of their own, no gradient reaches the class's mean. Where they share words, T
needs pictures of the class (prior preservation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.modules.test_gaussian_world import EXACT, fixed_point
from tests.worlds import GaussianDenoiser, fit, unidad
from unidad_pl import UniDAD
from unidad_pl.condition import Condition
from unidad_pl.data.batch import Batch
from unidad_pl.data.stream import SeedBatches
from unidad_pl.denoiser import Codec, Denoiser, DenoiserSource, Prediction
from unidad_pl.schedules import karras

SUBJECT, CLASS = "a prt dog", "a dog"
OTHER = "a cat"
CLASS_MEAN, SUBJECT_MEAN, UNTAUGHT = -2.0, 2.0, 6.0
WORDS = ["a", "prt", "dog", "cat"]


class Texts(Codec):
    """Prompts -> vectors: one dimension per whole prompt, or the sum of one per word."""

    def __init__(self, shared_words: bool) -> None:
        self.shared_words = shared_words

    def embed(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        known = WORDS if self.shared_words else [SUBJECT, CLASS, OTHER]
        rows = [[float(entry in (p.split() if self.shared_words else [p])) for entry in known] for p in prompts]
        return Condition(pooled=torch.tensor(rows, device=device))


class Conditional(Denoiser):
    """The exact denoiser of N(mu, 1) with ``mu = cond.pooled @ means``."""

    def __init__(self, means: list[float]) -> None:
        super().__init__()
        self.image_shape = (1, 4, 4)
        self.means = nn.Parameter(torch.tensor(means))

    def mu(self, cond: Condition | None) -> Tensor:
        assert cond is not None
        assert cond.pooled is not None
        return (cond.pooled @ self.means).view(-1, 1, 1, 1)

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return Prediction((x + s2 * self.mu(cond)) / (1 + s2), (x - self.mu(cond)) * s2.sqrt() / (1 + s2))

    taps = GaussianDenoiser.taps
    tap_channels = GaussianDenoiser.tap_channels


class OneStep(Conditional):
    """``G(x, sigma) = x / sigma + mu``: one step from noise gives N(mu, 1) exactly."""

    def predict(self, x: Tensor, sigma: Tensor, cond: Condition | None = None) -> Prediction:
        z = x / sigma.view(-1, 1, 1, 1)
        return Prediction(z + self.mu(cond), z)


class World(DenoiserSource):
    def __init__(self, means: list[float], kind: type[Conditional] = Conditional, shared_words: bool = False) -> None:
        self.means, self.kind, self.shared_words = means, kind, shared_words

    def build(self) -> Denoiser:
        return self.kind(self.means)

    def codec(self) -> Codec:
        return Texts(self.shared_words)


class Photos(pl.LightningDataModule):
    """Photos of the subject, told both ways, and if wanted pictures of the class."""

    def __init__(self, prior: float | None = None) -> None:
        super().__init__()
        self.prior = prior

    def train_dataloader(self) -> Any:
        def of(value: float, **more: Any) -> Batch:
            return Batch(torch.full((32, 1, 4, 4), value), **more)

        prior = None if self.prior is None else of(CLASS_MEAN, prompts=[CLASS] * 32, weight=self.prior)
        batch = of(SUBJECT_MEAN, prompts=[SUBJECT] * 32, source_prompts=[CLASS] * 32, prior=prior)
        return DataLoader(SeedBatches([batch] * 1000), batch_size=None)  # type: ignore[list-item]


def personalise(a: float, **target: Any) -> UniDAD:
    world, student = World([UNTAUGHT, CLASS_MEAN, 0.5]), World([0.5, CLASS_MEAN, 0.5], OneStep)
    module = unidad(world, student__init_from=student, target_teacher__weight=a, **(EXACT | target))
    fit(module, 350, Photos())
    return module


def mean_of(network: Any, prompt: str, shared_words: bool = False) -> float:
    return float(network.mu(Texts(shared_words).embed([prompt])))


@pytest.mark.slow
def test_the_subjects_prompt_moves_and_the_class_stays() -> None:
    module = personalise(1.0, target_teacher__adaptation__update="every")
    assert mean_of(module.target_teacher, SUBJECT) == pytest.approx(SUBJECT_MEAN, abs=0.02)
    assert mean_of(module.student, SUBJECT) == pytest.approx(SUBJECT_MEAN, abs=0.05)
    assert mean_of(module.fake_score, SUBJECT) == pytest.approx(SUBJECT_MEAN, abs=0.1)
    assert not hasattr(module, "source_teacher")  # it weighs nothing
    for network in (module.student, module.fake_score, module.target_teacher):
        assert mean_of(network, CLASS) == CLASS_MEAN
        assert mean_of(network, OTHER) == 0.5
    images = module.sample(range(400), prompts=[SUBJECT] * 200 + [CLASS] * 200)
    shift = torch.distributions.Normal(0, 1)

    def clamped(mu: float) -> float:  # samples are clamped to [-1, 1]
        low, high = torch.tensor(-1 - mu), torch.tensor(1 - mu)
        inside = mu * (shift.cdf(high) - shift.cdf(low)) + (shift.log_prob(low).exp() - shift.log_prob(high).exp())
        return float(inside - shift.cdf(low) + 1 - shift.cdf(high))

    assert float(images[:200].mean()) == pytest.approx(clamped(SUBJECT_MEAN), abs=0.05)
    assert float(images[200:].mean()) == pytest.approx(clamped(CLASS_MEAN), abs=0.05)


@pytest.mark.slow
def test_the_source_pulls_the_subject_towards_its_class_by_the_closed_form() -> None:
    """Told the subject's prompt, S would pull to UNTAUGHT, on the other side of the subject."""
    target = World([SUBJECT_MEAN, CLASS_MEAN, 0.5])
    module = personalise(0.45, target_teacher__init_from=target, target_teacher__adaptation=None)
    want = fixed_point(0.55, 0.45, karras().double()[20:981])
    assert CLASS_MEAN < want < SUBJECT_MEAN
    assert mean_of(module.student, SUBJECT) == pytest.approx(want, abs=0.07)
    assert mean_of(module.student, CLASS) == CLASS_MEAN


SHARED = [-1.0, 0.0, -1.0, 1.5]  # the means of WORDS


def teach(prior: float | None) -> Any:
    """T where prompts share their words: "a prt dog" begins at the class's mean, as "prt" means nothing yet."""
    still = dict(student__update_every=1000, student__init_from=World(SHARED, OneStep, True))
    target = dict(target_teacher__weight=1.0, target_teacher__adaptation__update="every")
    module = unidad(World(SHARED, shared_words=True), **(EXACT | still | target))
    fit(module, 300, Photos(prior))
    return module.target_teacher


@pytest.mark.slow
def test_where_words_are_shared_pictures_of_the_class_keep_it_in_place() -> None:
    kept, lost = teach(1.0), teach(None)
    for teacher in (kept, lost):
        assert mean_of(teacher, SUBJECT, True) == pytest.approx(SUBJECT_MEAN, abs=0.05)
    assert mean_of(kept, CLASS, True) == pytest.approx(CLASS_MEAN, abs=0.05)
    # Adam moves the three words alike, and two of them are the class's.
    drift = (SUBJECT_MEAN - CLASS_MEAN) * 2 / 3
    assert mean_of(lost, CLASS, True) == pytest.approx(CLASS_MEAN + drift, abs=0.05)


def test_the_weight_of_the_prior_scales_its_gradient() -> None:
    def gradient(weight: float | None) -> Tensor:
        module = unidad(World(SHARED, shared_words=True), target_teacher__weight=1.0, gan=None)
        module.configure_model()
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        batch = next(iter(Photos(weight).train_dataloader()))
        batch.images, batch.prompts = batch.images[:4], batch.prompts[:4]
        if batch.prior is not None:
            batch.prior.images = torch.full((4, 1, 4, 4), 3.0)
        part = next(module.micro_batches(batch))
        loss = module.target_loss(part.images, part.cond, part.prior)
        return torch.autograd.grad(loss, module.target_teacher.means)[0]

    plain, half, whole = gradient(None), gradient(0.5), gradient(1.0)
    assert not torch.allclose(half, plain)
    torch.testing.assert_close(whole - plain, 2 * (half - plain))
