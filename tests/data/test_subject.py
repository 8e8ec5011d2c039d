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

from tests.metrics.toys import refused
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


def pictures(place: Path, *colours: tuple[int, int, int]) -> Path:
    place.mkdir()
    for i, colour in enumerate(colours):
        Image.new("RGB", (16, 12), colour).save(place / f"{i}.png")
    return place


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "list.txt").write_text(LIST)
    return pictures(tmp_path / "dog6", *((60 * i, 10, 90) for i in range(4)))


def subject(photos: Path, class_word: str | None = "dog", **flat: Any) -> SubjectDataModule:
    return SubjectDataModule(str(photos), class_word, **groups(**flat))


def test_batches_carry_the_prompts_of_both_roles(photos: Path) -> None:
    data = subject(photos, token="xyz", prompts__train="a photo of {}", resolution=8, batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.prompts == ["a photo of xyz dog"] * 3
    assert batch.source_prompts == ["a photo of dog"] * 3


def test_templates_are_drawn_by_seed_and_position_alike_for_both_roles(photos: Path) -> None:
    def prompts(seed: int, batch_size: int) -> list[str]:
        data = subject(photos, prompts__train=["a {}", "red {}"], seed=seed, batch_size=batch_size)
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
    data = subject(photos, None, prompts__dreambooth=listed, prompts__augment=True)
    assert data.class_word == "dog"
    assert data.templates == ["a {}", "a {} in a hat"]
    assert data.eval_templates == ["a {} in a hat"]
    assert subject(photos, None, prompts__dreambooth=listed).templates == ["a {}"]
    known = read_dreambooth(listed)
    assert known.object_templates == ["a {}", "a red {}"]
    assert known.templates_of("cup") == ["a red {}"]  # "a {}" is none of DreamBooth's 25
    refused("'sofa' is not in the list: dog6, mug", known.class_of, "sofa")


def test_evaluation_draws_so_many_images_of_every_prompt(photos: Path) -> None:
    evaluation = SubjectEvaluation(samples_per_prompt=2, batch_size=4, first_seed=7)
    data = subject(photos, prompts__evaluation=["a {}", "red {}", "wet {}"], evaluation=evaluation)
    batches, names = list(data.test_dataloader()), ["a prt dog", "red prt dog", "wet prt dog"]
    assert [seed for batch in batches for seed in batch["seeds"].tolist()] == list(range(7, 13))
    assert [prompt for batch in batches for prompt in batch["prompts"]] == [names[i // 2] for i in range(6)]
    assert all(len(batch["seeds"]) == len(batch["prompts"]) for batch in batches)
    assert len(next(iter(data.test_dataloader()))["seeds"]) == 4
    assert [b["prompts"] for b in data.val_dataloader()] == [["a prt dog"] * 2]
    assert sum(len(b["seeds"]) for b in data.predict_dataloader()) == 6


def test_options_of_the_photos(photos: Path) -> None:
    assert subject(photos, resolution=8).shots.shape == (4, 3, 8, 8)
    assert len(subject(photos, shots=2, resolution=8).shots) == 2
    for option in (dict(flip=True), dict(flip=False, shift=3)):
        options = ({}, {"augmentation": Augmentation(**option)})
        plain, moved = (subject(photos, batch_size=8, **own).train_dataloader().dataset for own in options)
        assert (plain.flip, plain.shift) != (moved.flip, moved.shift)  # type: ignore[attr-defined]


def test_a_single_photo_is_enough(tmp_path: Path) -> None:
    data = subject(pictures(tmp_path / "dog", (60, 10, 90)), batch_size=2, resolution=8)
    with pytest.warns(UserWarning, match="is a single photo"):
        data.setup()
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.images[0], batch.images[1])


def test_photos_of_several_folders_are_warned_of(photos: Path) -> None:
    pictures(photos.parent / "mug", (9, 10, 90))
    with pytest.warns(UserWarning, match=r"lie in 2 folders \(dog6, mug\)"):
        subject(photos.parent, resolution=8).setup()


def test_a_resumed_run_must_have_the_prompts_it_had(photos: Path) -> None:
    """The stream is a function of the position, and so are prompts: with others it would be another run."""
    made: dict[str, Any] = dict(prompts__train=["a {}", "red {}"], prior__root=str(photos), resolution=8)
    before = subject(photos, **made).state_dict()

    def resume(**changed: Any) -> None:
        data: Any = subject(photos, **(made | changed))
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
        data.load_state_dict(before)

    resume(prompts__evaluation="wet {}", evaluation=SubjectEvaluation(2))  # nothing that is trained on
    for name, value in (
        ("token", "sks"), ("class_word", "cat"), ("prompts__train", ["red {}", "a {}"]), ("prior", None),
        ("prior__template", "one {}"), ("prior__weight", 0.5),
    ):  # fmt: skip
        shown = name.replace("__train", "").replace("__", ".")
        refused(f"trained on other data: {shown} was", resume, error=RuntimeError, **{name: value})
    assert subject(photos, resolution=8).state_dict()["prior"] is None  # so that one that comes later is noticed


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
    others = pictures(tmp_path / "others", *((0, 0, 100 + i) for i in range(3)))

    def batches(**options: object) -> list[Batch]:
        data = subject(photos, **({"prior__root": str(others), "resolution": 8, "batch_size": 2} | options))
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
    data = subject(photos, prior=Prior("x", "photo of {}"), prompts__evaluation="wet {}")
    assert data.every_prompt == ["a prt dog", "wet prt dog", "a dog", "photo of dog"]


def test_the_subject_is_the_folders_name(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SubjectDataModule(str(photos) + "/", "dog").subject == "dog6"
    monkeypatch.chdir(photos)
    assert SubjectDataModule(".", "dog").subject == "dog6"
    zipped = SubjectDataModule("x/dog6.zip", prompts=PromptOptions(dreambooth=str(photos.parent / "list.txt")))
    assert (zipped.subject, zipped.class_word) == ("dog6", "dog")


def test_what_is_wrong_is_named(photos: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"class_word": None}, "say what"),
        ({"class_word": " "}, "class_word .* must be words, got ' '"),
        ({"prompts__train": "a dog"}, "must have {} once"),
        ({"prompts__train": "a {} {x}"}, "must have {} once"),
        ({"prompts__train": []}, "no prompt templates"),
        ({"prompts__augment": True}, "give dreambooth"),
        ({"token": " "}, "token must be words"),
        ({"prior__root": "x", "prior__weight": 0}, "prior's weight must be above 0"),
        ({"prior__root": "x", "prior__template": "a dog"}, "must have {} once"),
    ):
        refused(message, subject, photos, **options)
    refused("samples_per_prompt must be a whole number", SubjectEvaluation, samples_per_prompt=0)
    missing, wrong, binary = (
        FileNotFoundError,
        tmp_path / "wrong.txt",
        r"file .*: save it as UTF-8 text",
    )
    refused(r"no template file at 'none\.txt'", subject, photos, prompts__train="none.txt", error=missing)
    refused(r"no prompts file", subject, photos, None, prompts__dreambooth="none.txt", error=missing)
    wrong.write_bytes(b"a {}\xff\xfe")
    refused(rf"wrong\.txt. is no readable template {binary}", subject, photos, prompts__train=str(wrong))
    refused(rf"wrong\.txt. is no readable prompts {binary}", read_dreambooth, wrong)
    wrong.write_text(LIST.replace("mug,cup", "mug,"))
    refused("no class word after the comma for 'mug'", read_dreambooth, wrong)
    wrong.write_text("hello")
    refused("it has 0 'subject_name,class' lines and 0 lists", read_dreambooth, wrong)
    refused("", subject(pictures(tmp_path / "empty")).train_dataloader, error=missing)
