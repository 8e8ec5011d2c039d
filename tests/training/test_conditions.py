"""Prompts on their way to a tiny Stable Diffusion: refused early, told by role, with pictures of the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modules.test_text_to_image import data, fit, module
from tests.tiny_sd import save_tiny
from unidad_pl.data import Prior, PromptOptions
from unidad_pl.data.batch import Batch
from unidad_pl.denoiser import Codec
from unidad_pl.training.conditions import check_prompts, encode_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd") / "sd")


def test_every_call_of_every_network_is_told_its_role(folder: Path, photos: Path, tmp_path: Path) -> None:
    """Row by row: S sees the template T, F and G see, with the class word; T alone also the class's own pictures."""
    model = module(folder, student__update_every=1)
    model.configure_model()
    texts = ["a prt dog", "red prt dog", "a dog", "red dog", "photo of dog", ""]
    known = {text: model.codec.embed([text])[0] for text in texts}
    calls: dict[str, list[list[str]]] = {}

    def spy(name: str, network: Any, method: str) -> None:
        original = getattr(network, method)

        def called(x: Tensor, sigma: Tensor, cond: Tensor) -> Any:
            named = [next(text for text, row in known.items() if torch.equal(row, given)) for given in cond]
            calls.setdefault(name, []).append(named)
            return original(x, sigma, cond)

        setattr(network, method, called)

    for name in ("student", "fake_score", "target_teacher", "source_teacher"):
        spy(name, getattr(model, name), "predict")
    served = data(photos, seed=0, prompts=PromptOptions(["a {}", "red {}"]), prior=Prior(str(photos), "photo of {}"))
    batch = next(iter(served.train_dataloader()))
    told, source = batch.prompts, batch.source_prompts
    assert sorted(told) == ["a prt dog", "red prt dog"]  # of seed 0: both templates in one batch
    fit(model, photos, 1, tmp_path, served=served)
    assert [rows for rows in calls["student"] if len(rows) == 2] == [told, told]  # two steps; four are an evaluation's
    assert calls["fake_score"] == [told, told]  # in the DMD and its own loss; its taps are the critic's
    guided = [rows for rows in calls["target_teacher"] if "" in rows]
    assert sorted(guided[0]) == sorted([*told, *[""] * (len(guided[0]) - 2)])
    assert [rows for rows in calls["target_teacher"] if "" not in rows][-2:] == [told, ["photo of dog"] * 2]
    flat = [text for rows in calls["source_teacher"] for text in rows]
    assert [text for text in flat if text] == source
    assert set(flat) == {*source, ""}


def test_a_prompt_that_is_too_long_ends_the_run_before_training(folder: Path, photos: Path, tmp_path: Path) -> None:
    model = module(folder)
    with pytest.raises(ValueError, match=r"the prompt 'a prt dog x x.* has \d+ tokens, 77 can be read"):
        fit(model, photos, 1, tmp_path, served=data(photos, prompts=PromptOptions(evaluation="a {} " + "x " * 90)))
    assert int(model.iteration) == 0


def test_a_token_of_many_pieces_is_warned_of(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    codec: Any = module(folder).source.codec()

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


def test_pictures_of_the_class_that_nothing_learns_from_are_refused(folder: Path, photos: Path, tmp_path: Path) -> None:
    served = data(photos, prior=Prior(str(photos), "photo of {}"))
    served.setup("fit")
    model = module(folder, target_teacher=None)
    model.configure_model()
    with pytest.raises(ValueError, match="leave the data's prior out"):
        list(model.micro_batches(next(iter(served.train_dataloader()))))
