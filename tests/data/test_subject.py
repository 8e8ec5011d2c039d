"""Photos of one subject and their prompts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from tests.worlds import groups
from unidad_pl.data import Augmentation, Prior, PromptOptions, SubjectDataModule, SubjectEvaluation
from unidad_pl.data.batch import Batch
from unidad_pl.data.prompts import read_dreambooth, read_templates

LIST = """Classes

subject_name,class
mug,cup
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a jungle pathway',
'a {0} {1}'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a hat'.format(unique_token, __import__('os').abort()),
]
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    place = tmp_path / "dog6"
    place.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 12), (60 * i, 10, 90)).save(place / f"{i}.png")
    (tmp_path / "list.txt").write_text(LIST)
    return place


def test_batches_carry_the_prompts_of_both_roles(photos: Path) -> None:
    data = SubjectDataModule(
        str(photos), "dog", token="xyz", prompts=PromptOptions("a photo of {}"), resolution=8, batch_size=3
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.prompts == ["a photo of xyz dog"] * 3
    assert batch.source_prompts == ["a photo of dog"] * 3


def test_templates_are_drawn_by_seed_and_position_alike_for_both_roles(photos: Path) -> None:
    def prompts(seed: int, batch_size: int) -> list[str]:
        data = SubjectDataModule(
            str(photos), "dog", prompts=PromptOptions(["a {}", "red {}"]), seed=seed, batch_size=batch_size
        )
        drawn = []
        for batch in islice(iter(data.train_dataloader()), 24 // batch_size):
            assert [p.replace("prt ", "") for p in batch.prompts] == batch.source_prompts
            drawn += batch.prompts
        return drawn

    assert prompts(0, 2) == prompts(0, 3)
    assert prompts(0, 2) != prompts(1, 2)
    assert set(prompts(0, 2)) == {"a prt dog", "red prt dog"}


def test_dreambooths_list_gives_class_templates_and_augmentation(photos: Path) -> None:
    listed = str(photos.parent / "list.txt")
    data = SubjectDataModule(str(photos), prompts=PromptOptions(dreambooth=listed, augment=True))
    assert data.class_word == "dog"
    assert data.templates == ["a {}", "a {} in a hat"]
    assert data.eval_templates == ["a {} in a hat"]
    assert SubjectDataModule(str(photos), prompts=PromptOptions(dreambooth=listed)).templates == ["a {}"]
    known = read_dreambooth(listed)
    assert known.object_templates == ["a {}", "a red {}"]
    assert known.templates_of("cup") == ["a red {}"]  # "a {}" is none of DreamBooth's 25
    with pytest.raises(ValueError, match="'sofa' is not in the list: dog6, mug"):
        known.class_of("sofa")


def test_evaluation_draws_so_many_images_of_every_prompt(photos: Path) -> None:
    data = SubjectDataModule(
        str(photos),
        "dog",
        prompts=PromptOptions(evaluation=["a {}", "red {}", "wet {}"]),
        evaluation=SubjectEvaluation(samples_per_prompt=2, batch_size=4, first_seed=7),
    )
    drawn = [
        (int(s), p) for batch in data.test_dataloader() for s, p in zip(batch["seeds"], batch["prompts"], strict=True)
    ]
    names = ["a prt dog", "red prt dog", "wet prt dog"]
    assert drawn == [(7 + i, names[i // 2]) for i in range(6)]
    assert len(next(iter(data.test_dataloader()))["seeds"]) == 4
    assert [b["prompts"] for b in data.val_dataloader()] == [["a prt dog"] * 2]
    assert sum(len(b["seeds"]) for b in data.predict_dataloader()) == 6


def test_options_of_the_photos(photos: Path) -> None:
    assert SubjectDataModule(str(photos), "dog", resolution=8).shots.shape == (4, 3, 8, 8)
    assert len(SubjectDataModule(str(photos), "dog", shots=2, resolution=8).shots) == 2
    for option in (dict(flip=True), dict(flip=False, shift=3)):
        plain = SubjectDataModule(str(photos), "dog", batch_size=8).train_dataloader().dataset
        moved = (
            SubjectDataModule(str(photos), "dog", batch_size=8, augmentation=Augmentation(**option))
            .train_dataloader()
            .dataset
        )
        assert (plain.flip, plain.shift) != (moved.flip, moved.shift)  # type: ignore[attr-defined]


def test_a_single_photo_is_enough(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (16, 12), (60, 10, 90)).save(tmp_path / "dog" / "a.png")
    data = SubjectDataModule(str(tmp_path / "dog"), "dog", batch_size=2, resolution=8)
    with pytest.warns(UserWarning, match="is a single photo"):
        data.setup()
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.images[0], batch.images[1])


def test_photos_of_several_folders_are_warned_of(photos: Path) -> None:
    (photos.parent / "mug").mkdir()
    Image.new("RGB", (16, 12), (9, 10, 90)).save(photos.parent / "mug" / "a.png")
    with pytest.warns(UserWarning, match=r"lie in 2 folders \(dog6, mug\)"):
        SubjectDataModule(str(photos.parent), "dog", resolution=8).setup()


def test_a_resumed_run_must_have_the_prompts_it_had(photos: Path) -> None:
    """The stream is a function of the position, and so are prompts: with others it would be another run."""
    made: dict[str, Any] = dict(
        class_word="dog", prompts__train=["a {}", "red {}"], prior__root=str(photos), resolution=8
    )  # fmt: skip
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    before = SubjectDataModule(str(photos), **groups(**made)).state_dict()

    def resume(**changed: Any) -> None:
        data = SubjectDataModule(str(photos), **groups(**{**made, **changed}))
        data.trainer = trainer
        data.load_state_dict(before)

    resume(prompts__evaluation="wet {}", evaluation=SubjectEvaluation(2))  # nothing that is trained on
    for name, value in (
        ("token", "sks"), ("class_word", "cat"), ("prompts__train", ["red {}", "a {}"]), ("prior", None),
        ("prior__template", "one {}"), ("prior__weight", 0.5),
    ):  # fmt: skip
        shown = name.replace("__train", "").replace("__", ".")
        with pytest.raises(RuntimeError, match=f"trained on other data: {shown} was"):
            resume(**{name: value})
    plain = SubjectDataModule(str(photos), "dog", resolution=8).state_dict()
    assert plain["prior"] is None  # so that a prior that comes later is noticed


def test_templates_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeffa {}\r\n\r\nthe {} at sea\r\n".encode())
    assert read_templates(str(tmp_path / "t.txt")) == ["a {}", "the {} at sea"]


@pytest.mark.parametrize(
    ("changed", "to"),
    [
        ("\n", "\r\n"), ("Classes", "\ufeffClasses"), ("name,class\n", "name,class\n\n"), ("cup\n", "cup \n\n"),
        ("'a red {0} {1}'", '"a red {0} {1}"'), ("\n'a", "\n    'a"), ("pathway',\n", "pathway', "),
    ],
)  # fmt: skip
def test_the_list_as_other_editors_save_it(tmp_path: Path, changed: str, to: str) -> None:
    (tmp_path / "plain.txt").write_text(LIST)
    (tmp_path / "list.txt").write_bytes(LIST.replace(changed, to).encode())
    assert read_dreambooth(tmp_path / "list.txt") == read_dreambooth(tmp_path / "plain.txt")


def test_pictures_of_the_class_come_with_the_class_prompt(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (0, 0, 100 + i)).save(tmp_path / "others" / f"{i}.png")

    def batches(**options: object) -> list[Batch]:
        made = {"prior__root": str(tmp_path / "others"), "resolution": 8, "batch_size": 2} | options
        data = SubjectDataModule(str(photos), "dog", **groups(**made))
        data.setup("test")  # a test before the fit must not lose them
        return list(islice(iter(data.train_dataloader()), 3))

    base = batches()
    assert {batch.weight for batch in base} == {1.0}
    for batch in base:
        assert batch.prior is not None
        assert batch.prior.prompts == ["a dog"] * 2
        assert bool((batch.prior.images[:, 0] == -1).all())
        assert batch.prior.weight == 1
    assert len({float(image[2, 0, 0]) for batch in base for image in batch.prior.images}) == 3
    other = batches(prior__template="photo of {}", prior__weight=0.5)[0].prior
    assert (other.prompts, other.weight) == (["photo of dog"] * 2, 0.5)
    plain = batches(prior=None)
    assert plain[0].prior is None
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain, base, strict=True))
    data = SubjectDataModule(
        str(photos), "dog", prior=Prior("x", "photo of {}"), prompts=PromptOptions(evaluation="wet {}")
    )  # fmt: skip
    assert data.every_prompt == ["a prt dog", "wet prt dog", "a dog", "photo of dog"]


def test_the_subject_is_the_folders_name(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SubjectDataModule(str(photos) + "/", "dog").subject == "dog6"
    monkeypatch.chdir(photos)
    assert SubjectDataModule(".", "dog").subject == "dog6"
    zipped = SubjectDataModule("x/dog6.zip", prompts=PromptOptions(dreambooth=str(photos.parent / "list.txt")))
    assert (zipped.subject, zipped.class_word) == ("dog6", "dog")


def test_what_is_wrong_is_named(photos: Path, tmp_path: Path) -> None:
    for options, message in (
        ({}, "say what"),
        ({"class_word": " "}, "class_word .* must be words, got ' '"),
        ({"class_word": "dog", "prompts__train": "a dog"}, "must have {} once"),
        ({"class_word": "dog", "prompts__train": "a {} {x}"}, "must have {} once"),
        ({"class_word": "dog", "prompts__train": []}, "no prompt templates"),
        ({"class_word": "dog", "prompts__augment": True}, "give dreambooth"),
        ({"class_word": "dog", "token": " "}, "token must be words"),
        ({"class_word": "dog", "prior__root": "x", "prior__weight": 0}, "prior's weight must be above 0"),
        ({"class_word": "dog", "prior__root": "x", "prior__template": "a dog"}, "must have {} once"),
    ):
        with pytest.raises(ValueError, match=message):
            SubjectDataModule(str(photos), **groups(**options))
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 1"):
        SubjectEvaluation(samples_per_prompt=0)
    with pytest.raises(FileNotFoundError, match=r"no template file at 'none\.txt'"):
        SubjectDataModule(str(photos), "dog", prompts=PromptOptions("none.txt"))
    with pytest.raises(FileNotFoundError, match=r"no prompts file"):
        SubjectDataModule(str(photos), prompts=PromptOptions(dreambooth="none.txt"))
    (tmp_path / "binary.txt").write_bytes(b"a {}\xff\xfe")
    with pytest.raises(ValueError, match=r"template file .*binary\.txt' cannot be read as UTF-8 text"):
        SubjectDataModule(str(photos), "dog", prompts=PromptOptions(str(tmp_path / "binary.txt")))
    with pytest.raises(ValueError, match=r"prompts file .*binary\.txt' cannot be read as UTF-8 text"):
        read_dreambooth(tmp_path / "binary.txt")
    (tmp_path / "other.txt").write_text(LIST.replace("mug,cup", "mug,"))
    with pytest.raises(ValueError, match="no class word after the comma for 'mug'"):
        read_dreambooth(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("hello")
    with pytest.raises(ValueError, match="it has 0 'subject_name,class' lines and 0 lists"):
        read_dreambooth(tmp_path / "other.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        SubjectDataModule(str(tmp_path / "empty"), "dog").train_dataloader()
