"""The DataModule of subject-driven personalisation: a few photos of one subject, and prompts by role."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from unidad_pl.data.batch import Batch
from unidad_pl.data.few_shot import FewShotDataModule, SeedBatches, ShotStream
from unidad_pl.data.image_sets import open_images
from unidad_pl.data.images import image_hash
from unidad_pl.data.prompts import read_dreambooth, read_templates
from unidad_pl.seeds import mix_seed

NAMED, CLASS = 3, 4  # numbers of the streams of draws that choose prompts and pictures of the class


class SubjectDataModule(FewShotDataModule):
    """Four to six photos of one subject, for a text-to-image model.

    Every template is filled in twice: with the rare token and the class word (``a prt dog``), which the student, the
    fake score and the target teacher are told, and with the class word alone (``a dog``) for the source teacher.

    Training photos are a stateless stream as in :class:`~unidad_pl.data.few_shot.FewShotDataModule`; so is the choice
    of the template. Validation draws ``samples_per_prompt`` images of every training prompt, test and prediction of
    every evaluation prompt.

    Args:
        root: the subject's photos, any place :class:`~unidad_pl.data.few_shot.FewShotDataModule` knows.
        class_word: what the subject is, e.g. ``dog``; null: looked up in ``dreambooth`` by the folder's name.
        token: the rare word that names the subject.
        prompts: training templates with ``{}`` in the subject's place: one, a list, or a ``.txt`` file with one a line.
        eval_prompts: the same for test and prediction; null: DreamBooth's 25 where ``dreambooth`` is given, else
            ``prompts``.
        dreambooth: DreamBooth's ``prompts_and_classes.txt``; it is data, nothing in it is run.
        augment: train with DreamBooth's 25 templates beside ``prompts``.
        class_images: pictures of other members of the class, made by the source model or found, any place ``root`` can
            name: the target teacher is also trained on them, told ``class_template``, so that it does not forget the
            class for the subject (DreamBooth's prior preservation). As many per iteration as photos. null: none.
        class_template: template they go with, filled in with the class word.
        class_weight: of the loss on them.
        samples_per_prompt: images of each prompt in an evaluation.
        shots: number of photos; null: all of them.
        resolution: side in pixels; must be the model's.
        batch_size: photos per iteration and rank.
        flip: mirror photos at random, left to right.
        shift: move photos at random by up to so many pixels.
        seed: of the choice of shots, their order and prompts; null: 0, or the command line's ``seed_everything``.
        eval_batch_size: images per evaluation batch.
        first_seed: seed of an evaluation's first image; the others follow.

    Raises:
        ValueError: no class word and no list to find it in, a blank one, a template without ``{}``, ``augment`` without
            ``dreambooth``, or ``class_weight`` not above 0.
    """

    def __init__(
        self,
        root: str,
        class_word: str | None = None,
        token: str = "prt",
        prompts: str | list[str] = "a {}",
        eval_prompts: str | list[str] | None = None,
        dreambooth: str | None = None,
        augment: bool = False,
        class_images: str | None = None,
        class_template: str = "a {}",
        class_weight: float = 1.0,
        samples_per_prompt: int = 4,
        shots: int | None = None,
        resolution: int = 512,
        batch_size: int = 1,
        flip: bool = False,
        shift: int = 0,
        seed: int | None = None,
        eval_batch_size: int = 4,
        first_seed: int = 0,
    ) -> None:
        super().__init__(
            root, None, shots, resolution, batch_size, flip, shift, seed,
            eval_batch_size=eval_batch_size, first_seed=first_seed,
        )  # fmt: skip
        known = None if dreambooth is None else read_dreambooth(dreambooth)
        if class_word is None and known is None:
            raise ValueError(
                f"say what {root!r} shows, as class_word: dog, or give dreambooth: prompts_and_classes.txt"
            )
        if class_word is not None and not class_word.strip():
            raise ValueError(f"class_word must say what {root!r} shows, e.g. dog, got {class_word!r}")
        self.subject = Path(os.path.abspath(root)).name.removesuffix(".zip")
        self.class_word = class_word or known.class_of(self.subject)  # type: ignore[union-attr]
        if augment and known is None:
            raise ValueError("augment: true takes its templates from DreamBooth's list: give dreambooth")
        if not token.strip() or samples_per_prompt < 1:
            raise ValueError(
                f"token must be a word and samples_per_prompt >= 1, got {token!r} and {samples_per_prompt}"
            )
        if class_weight <= 0:
            raise ValueError(f"class_weight must be above 0, got {class_weight}: leave class_images out for no prior")
        self.token, self.samples_per_prompt = token, samples_per_prompt
        self.class_root, self.class_weight = class_images, class_weight
        self.class_images: Tensor | None = None
        (self.class_template,) = read_templates([class_template])
        standard = [] if known is None else known.templates_of(self.class_word)
        own = read_templates(prompts)
        self.templates = own + [one for one in standard if one not in own] * augment
        self.eval_templates = read_templates(eval_prompts) if eval_prompts is not None else standard or own
        for stage, templates in (
            ("val", self.templates),
            ("test", self.eval_templates),
            ("predict", self.eval_templates),
        ):
            self.samples[stage] = len(templates) * samples_per_prompt

    def setup(self, stage: str | None = None) -> None:
        if self.class_root is not None and self.class_images is None and stage in (None, "fit"):
            self.class_images = open_images(self.class_root).load(self.resolution)
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
        """As of :class:`~unidad_pl.data.few_shot.FewShotDataModule`, and what the networks were told."""
        state = super().state_dict() | {"prompts": self.templates, "token": self.token, "class_word": self.class_word}
        if self.class_images is None:
            return state | {"class_images": None}
        content = image_hash(self.class_images.flatten(0, 1))
        return state | {
            "class_images": content, "class_template": self.class_template, "class_weight": self.class_weight
        }  # fmt: skip

    @property
    def every_prompt(self) -> list[str]:
        """All prompts that are ever served, of both roles, each once."""
        templates = [*self.templates, *self.eval_templates]
        source = [*self.templates, *([self.class_template] if self.class_root is not None else [])]
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

    def _seed_loader(self, stage: str) -> DataLoader[dict[str, Tensor]]:
        loader = super()._seed_loader(stage)
        templates = self.templates if stage == "val" else self.eval_templates
        batches: Any = loader.dataset
        named: list[dict[str, Any]] = [
            {**batch, "prompts": [self.subject_prompt(templates[n]) for n in self._template_of(batch["seeds"])]}
            for batch in batches
        ]
        return DataLoader(SeedBatches(named), batch_size=None)

    def _template_of(self, seeds: Tensor) -> list[int]:
        numbers: list[int] = torch.div(seeds - self.first_seed, self.samples_per_prompt, rounding_mode="floor").tolist()
        return numbers


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
        self.data = data
        self.prior: ShotStream | None = None
        if data.class_images is not None:
            seed = mix_seed(shots.seed, CLASS)
            self.prior = ShotStream(data.class_images, shots.batch_size, shots.flip, seed, shift=shots.shift)

    def batch_at(self, positions: range) -> Batch:
        templates = self.data.templates
        drawn = [templates[mix_seed(self.seed, NAMED, position) % len(templates)] for position in positions]
        return Batch(
            super().batch_at(positions).images,
            prompts=[self.data.subject_prompt(template) for template in drawn],
            source_prompts=[self.data.class_prompt(template) for template in drawn],
            prior=self._prior_at(positions),
        )

    def _prior_at(self, positions: range) -> Batch | None:
        if self.prior is None:
            return None
        prompts = [self.data.class_prompt(self.data.class_template)] * len(positions)
        return Batch(self.prior.batch_at(positions).images, prompts=prompts, weight=self.data.class_weight)
