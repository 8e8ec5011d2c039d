"""Prompts on their way to a tiny Stable Diffusion: refused early, told by role, with pictures of the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_sd import listen, save_tiny, subject, text_unidad
from tests.worlds import fit
from unidad_pl.data import Prior, PromptOptions
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Codec
from unidad_pl.training.conditions import check_prompts, encode_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd") / "sd")


def test_every_call_of_every_network_is_told_its_role(folder: Path, photos: Path) -> None:
    """Row by row: S sees the template T, F and G see, with the class word; T alone also the class's own pictures."""
    model = text_unidad(folder, student__update_every=1)
    model.configure_model()
    calls = listen(model, ["a prt dog", "red prt dog", "a dog", "red dog", "photo of dog", ""])
    prompts = PromptOptions(["a {}", "red {}"])
    served = subject(photos, seed=0, prompts=prompts, prior=Prior(str(photos), "photo of {}"))
    batch = next(iter(served.train_dataloader()))
    told, source = batch.prompts, batch.source_prompts
    assert sorted(told) == ["a prt dog", "red prt dog"]  # of seed 0: both templates in one batch
    fit(model, 1, served, limit_val_batches=1.0)
    student, target = calls["student.predict"], calls["target_teacher.predict"]
    assert [rows for rows in student if len(rows) == 2] == [told, told]  # two steps; four are an evaluation's
    assert calls["fake_score.predict"] == [told, told]  # in the DMD and its own loss; its taps are the critic's
    guided = [rows for rows in target if "" in rows]
    assert sorted(guided[0]) == sorted([*told, *[""] * (len(guided[0]) - 2)])
    assert [rows for rows in target if "" not in rows][-2:] == [told, ["photo of dog"] * 2]
    flat = [text for rows in calls["source_teacher.predict"] for text in rows]
    assert [text for text in flat if text] == source
    assert set(flat) == {*source, ""}


def test_a_prompt_that_is_too_long_ends_the_run_before_training(folder: Path, photos: Path) -> None:
    model = text_unidad(folder)
    with pytest.raises(ValueError, match=r"the prompt 'a prt dog x x.* has \d+ tokens, 77 can be read"):
        fit(model, 1, subject(photos, prompts=PromptOptions(evaluation="a {} " + "x " * 90)))
    assert int(model.iteration) == 0


def test_a_token_of_many_pieces_is_warned_of(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    codec: Any = text_unidad(folder).source.codec()

    class Served:
        every_prompt = ("a prt dog",)
        token = "zzyzx"

    check_prompts(codec, Served())
    assert any("rare token 'zzyzx' as 5 pieces" in str(w.message) for w in recwarn)
    recwarn.clear()
    Served.token = "dog"
    check_prompts(codec, Served())
    check_prompts(codec, None)
    check_prompts(Codec(), Served())  # a pixel model reads no prompts
    assert not recwarn.list


def test_a_prior_needs_prompts() -> None:
    assert encode_prior(None, slice(0, 1), Codec()) is None
    with pytest.raises(ValueError, match="need prompts that say what they show"):
        encode_prior(Batch(torch.zeros(1, 3, 8, 8)), slice(0, 1), Codec())


def test_pictures_of_the_class_that_nothing_learns_from_are_refused(folder: Path, photos: Path) -> None:
    served = subject(photos, prior=Prior(str(photos), "photo of {}"))
    served.setup("fit")
    model = text_unidad(folder, target_teacher=None)
    model.configure_model()
    with pytest.raises(ValueError, match="leave the data's prior out"):
        list(model.micro_batches(next(iter(served.train_dataloader()))))
