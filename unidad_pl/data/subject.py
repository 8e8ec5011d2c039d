"""The DataModule of subject-driven personalisation: a few photos of one subject, and prompts by role."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from unidad_pl.checks import check_arguments, check_given, check_options, check_path, check_positive, check_whole
from unidad_pl.data.batch import Batch
from unidad_pl.data.few_shot import MOST_SAMPLES, Augmentation, Evaluation, FewShotDataModule
from unidad_pl.data.image_sets import BUILTIN, open_images
from unidad_pl.data.images import image_hash
from unidad_pl.data.prompts import read_dreambooth, read_templates
from unidad_pl.data.stream import SeedBatches, ShotStream
from unidad_pl.files import expanded
from unidad_pl.seeds import mix_seed

NAMED, CLASS = 3, 4  # numbers of the streams of draws that choose prompts and pictures of the class


@dataclass
class PromptOptions:
    """Prompt templates with ``{}`` in the subject's place: one, a list, or a ``.txt`` file with one a line.

        >>> two = PromptOptions(["a photo of a {}", "a {} outdoors"])

    Attributes:
        train: templates of training.
        evaluation: templates of test and prediction; null: DreamBooth's 25 where ``dreambooth`` is given, else
            ``train``.
        dreambooth: DreamBooth's ``prompts_and_classes.txt``; it is data, nothing in it is run.
        augment: train with DreamBooth's 25 templates beside ``train``.
    """

    train: str | list[str] = "a {}"
    evaluation: str | list[str] | None = None
    dreambooth: str | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.augment and self.dreambooth is None:
            raise ValueError("augment: true takes its templates from DreamBooth's list: give dreambooth")


@dataclass
class Prior:
    """Other members of the subject's class, which the target teacher is also trained on, so that it does not forget the
    class for the subject (DreamBooth's prior preservation). As many per iteration as photos.

        >>> dogs = Prior("builtin:cats:100", template="a photo of a {}", weight=0.5)

    Attributes:
        root: pictures made by the source model, or found; see :func:`~unidad_pl.data.image_sets.open_images`.
        template: template they go with, filled in with the class word.
        weight: of the loss on them.
    """

    root: str
    template: str = "a {}"
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_given(root=self.root)
        check_path(root=self.root)
        if self.weight == 0:
            raise ValueError("the prior's weight must be above 0, got 0: leave the prior out for none")
        check_options(self)
        check_positive(weight=self.weight)


@dataclass
class SubjectEvaluation:
    """Which samples are drawn in evaluations: of every training prompt at validation, else of every evaluation prompt.

        >>> thorough = SubjectEvaluation(samples_per_prompt=16)

    Attributes:
        samples_per_prompt: images of each prompt.
        batch_size: images per batch.
        first_seed: seed of the first image; the others follow.
    """

    samples_per_prompt: int = 4
    batch_size: int = 4
    first_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(0, first_seed=self.first_seed)
        check_whole(1, batch_size=self.batch_size)
        check_whole(1, MOST_SAMPLES, samples_per_prompt=self.samples_per_prompt)

    def of(self, train: list[str], evaluation: list[str]) -> Evaluation:
        """The numbers of samples for so many templates."""
        val, test = len(train) * self.samples_per_prompt, len(evaluation) * self.samples_per_prompt
        return Evaluation(val, test, test, self.batch_size, self.first_seed)


class SubjectDataModule(FewShotDataModule):
    """Four to six photos of one subject, for a text-to-image model.

        >>> from unidad_pl import SubjectDataModule
        >>> data = SubjectDataModule("builtin:cats", class_word="cat", shots=4, resolution=32, batch_size=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.prompts, batch.source_prompts
        (['a prt cat', 'a prt cat'], ['a cat', 'a cat'])

    Every template is filled in twice: with the rare token and the class word (``a prt dog``), for the student, the
    fake score and the target teacher, and with the class word alone (``a dog``) for the source teacher.

    Training photos are a stateless stream as in :class:`~unidad_pl.data.few_shot.FewShotDataModule`; so is the choice
    of the template.

    Args:
        root: the subject's photos, any place :class:`~unidad_pl.data.few_shot.FewShotDataModule` knows.
        class_word: what the subject is, e.g. ``dog``; null: looked up in ``prompts.dreambooth`` by the folder's name.
        token: the rare word that names the subject.
        prompts: the templates.
        prior: pictures of other members of the class; null: none.
        shots: number of photos; null: all of them.
        resolution: side in pixels; must be the model's.
        batch_size: photos per iteration and rank.
        seed: of the choice of shots, their order and prompts; null: 0, or the command line's ``seed_everything``.
        augmentation: how photos are varied; not mirrored unless asked for.
        evaluation: which samples are drawn.

    Raises:
        ValueError: no class word and no list to find it in, a blank one, or a template without ``{}``.
    """

    def __init__(
        self,
        root: str | Path,
        class_word: str | None = None,
        token: str = "prt",
        prompts: PromptOptions = PromptOptions(),  # noqa: B008 (values, never mutated)
        prior: Prior | None = None,
        shots: int | None = None,
        resolution: int = 512,
        batch_size: int = 1,
        seed: int | None = None,
        augmentation: Augmentation = Augmentation(flip=False),  # noqa: B008
        evaluation: SubjectEvaluation = SubjectEvaluation(),  # noqa: B008
    ) -> None:
        check_arguments(SubjectDataModule.__init__, locals())
        if not isinstance(token, str) or not isinstance(class_word, (str, type(None))):
            raise ValueError(f"class_word and token must be words, got {class_word!r} and {token!r}")
        known = None if prompts.dreambooth is None else read_dreambooth(prompts.dreambooth)
        if class_word is None and known is None:
            raise ValueError(
                f"say what {root!r} shows, as class_word: dog, or give prompts.dreambooth: prompts_and_classes.txt"
            )
        if not token.strip() or (class_word is not None and not class_word.strip()):
            raise ValueError(f"class_word (e.g. dog) and token must be words, got {class_word!r} and {token!r}")
        self.subject = Path(os.path.abspath(expanded(root))).name.removesuffix(".zip").removeprefix(BUILTIN)
        self.class_word = class_word or known.class_of(self.subject)  # type: ignore[union-attr]
        self.token, self.samples_per_prompt = token, evaluation.samples_per_prompt
        self.prior = prior
        self.class_images: Tensor | None = None
        (self.class_template,) = read_templates([prior.template if prior is not None else "a {}"])
        standard = [] if known is None else known.templates_of(self.class_word)
        own = read_templates(prompts.train)
        self.templates = own + [one for one in standard if one not in own] * prompts.augment
        self.eval_templates = read_templates(prompts.evaluation) if prompts.evaluation is not None else standard or own
        super().__init__(
            root, shots, resolution, batch_size, seed, augmentation=augmentation,
            evaluation=evaluation.of(self.templates, self.eval_templates),
        )  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        if self.prior is not None and self.class_images is None and stage in (None, "fit"):
            self.class_images = open_images(self.prior.root).load(self.resolution)
        if self._shots is not None:
            return
        super().setup(stage)
        folders = sorted({str(PurePosixPath(name).parent) for name in self.shot_names})
        if len(folders) > 1:
            rank_zero_warn(
                f"the photos of {self.root!r} lie in {len(folders)} folders ({', '.join(folders[:5])}): all of them "
                f"are taken for one subject, {self.subject!r}. Name one subject's folder if they show several"
            )
        if self._shots is not None and len(self._shots) == 1:
            rank_zero_warn(
                f"{self.root!r} is a single photo: a student of it learns the pose and the background as the subject; "
                f"four to six photos in different places are what this is made for"
            )

    def state_dict(self) -> dict[str, Any]:
        """As of :class:`~unidad_pl.data.few_shot.FewShotDataModule`, and the prompts of the networks."""
        state = super().state_dict() | {"prompts": self.templates, "token": self.token, "class_word": self.class_word}
        if self.class_images is None or self.prior is None:
            return state | {"prior": None}
        content = image_hash(self.class_images.flatten(0, 1))
        return state | {"prior": content, "prior.template": self.class_template, "prior.weight": self.prior.weight}

    @property
    def every_prompt(self) -> list[str]:
        """All prompts that are ever served, of both roles, each once."""
        templates = [*self.templates, *self.eval_templates]
        source = [*self.templates, *([self.class_template] if self.prior is not None else [])]
        return list(dict.fromkeys([*map(self.subject_prompt, templates), *map(self.class_prompt, source)]))

    def subject_prompt(self, template: str) -> str:
        """``template`` with the rare token and the class word."""
        return template.replace("{}", f"{self.token} {self.class_word}")

    def class_prompt(self, template: str) -> str:
        """``template`` with the class word alone."""
        return template.replace("{}", self.class_word)

    def train_dataloader(self) -> DataLoader[Batch]:
        shots: Any = super().train_dataloader().dataset
        return DataLoader(PromptedStream(shots, self), batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._prompted(super().val_dataloader(), self.templates)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._prompted(super().test_dataloader(), self.eval_templates)

    predict_dataloader = test_dataloader

    def _prompted(self, loader: DataLoader[dict[str, Tensor]], templates: list[str]) -> DataLoader[dict[str, Tensor]]:
        batches: Any = loader.dataset
        first, each = self.evaluation.first_seed, self.samples_per_prompt

        def prompt(seed: int) -> str:
            return self.subject_prompt(templates[(seed - first) // each])

        named = [{**batch, "prompts": [*map(prompt, batch["seeds"].tolist())]} for batch in batches]
        return DataLoader(SeedBatches(named), batch_size=None)


class PromptedStream(ShotStream):
    """A :class:`~unidad_pl.data.few_shot.ShotStream` whose batches carry prompts.

    Args:
        shots: the photos' stream.
        data: what fills in the templates.
    """

    def __init__(self, shots: ShotStream, data: SubjectDataModule) -> None:
        super().__init__(
            shots.images, shots.batch_size, shots.flip, shots.seed, shots.start, shots.world, shots.rank, shots.shift
        )
        self.data, seed = data, mix_seed(shots.seed, CLASS)
        self.prior = None if data.class_images is None else ShotStream(
            data.class_images, shots.batch_size, shots.flip, seed, shift=shots.shift
        )  # fmt: skip

    def batch_at(self, positions: range) -> Batch:
        data, batch = self.data, super().batch_at(positions)
        drawn = [data.templates[mix_seed(self.seed, NAMED, place) % len(data.templates)] for place in positions]
        batch.prompts, batch.source_prompts = [*map(data.subject_prompt, drawn)], [*map(data.class_prompt, drawn)]
        if self.prior is not None and data.prior is not None:
            batch.prior = self.prior.batch_at(positions)
            batch.prior.prompts = [data.class_prompt(data.class_template)] * len(positions)
            batch.prior.weight = data.prior.weight
        return batch
