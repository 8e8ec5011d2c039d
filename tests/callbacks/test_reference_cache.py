"""References on disk: found again by content, extractor and weights, never out of date, anew when damaged."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image

from tests.callbacks.toys import REFERENCE, SHOTS, Data, Toy, trainer
from tests.metrics.toys import TinyFeatures
from unidad_pl import FID, CartoonFeatures, IntraLPIPS
from unidad_pl.callbacks.records import read_records
from unidad_pl.metrics import LPIPSFeatures
from unidad_pl.metrics.cache import ReferenceCache, default_folder, digest_of, identity


class Counted(TinyFeatures):
    """Says what it follows from, and how many images it has seen."""

    def fingerprint(self) -> tuple[object, ...]:
        return (self,)

    @property
    def seen(self) -> int:
        return sum(self.batches)


class Silent(Counted):
    """Inherits a fingerprint that knows nothing of its own settings."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unidad_pl" / "references"


def evaluate(place: Path, *callbacks: Any) -> list[dict[str, Any]]:
    """The records of one test, in a folder of its own."""
    run = place / str(len(list(place.iterdir())))
    trainer(run, *callbacks).test(Toy(), Data(seeds=12), verbose=False)
    return [{k: v for k, v in record.items() if k != "time"} for record in read_records(run / "metrics.jsonl")]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


CALLBACKS = [FID, partial(IntraLPIPS, relative=True)]


@pytest.mark.parametrize("make", CALLBACKS)
def test_another_run_takes_what_is_there_and_finds_the_same(make: Any, folder: Path, runs: Path) -> None:
    first, second, without = Counted(), Counted(), Counted()
    records = [evaluate(runs, make(first)), evaluate(runs, make(second)), evaluate(runs, make(without, cache=False))]
    assert records[0] == records[1] == records[2]
    assert first.seen == without.seen == second.seen + len(REFERENCE)
    assert len(list(folder.iterdir())) == 1


def test_other_pictures_of_the_same_names_are_another_reference(folder: Path, runs: Path, tmp_path: Path) -> None:
    """With the same callback: as in a notebook."""

    def pictures(seed: int) -> None:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        for number in range(6):
            save_image(torch.rand(3, 8, 8, generator=generator), tmp_path / "pictures" / f"{number}.png")

    def fid() -> Any:
        return FID(TinyFeatures(), reference=str(tmp_path / "pictures"))

    same, found = fid(), []
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "gone").symlink_to("nowhere")
    for seed in (1, 2):
        pictures(seed)
        found += [evaluate(runs, same)[-1]["values"], evaluate(runs, fid())[-1]["values"]]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_folder_can_be_given(make: Any, folder: Path, runs: Path, tmp_path: Path) -> None:
    evaluate(runs, make(Counted(), cache=str(tmp_path / "own")))
    assert len(list((tmp_path / "own").iterdir())) == 1
    assert not folder.exists()


def test_other_images_weights_or_settings_are_another_entry(folder: Path, runs: Path) -> None:
    changed = REFERENCE.clone()
    changed[3, 0, 0, 0] ^= 1
    fids = [FID(Counted()), FID(Counted(), reference=changed), FID(Counted(seed=1)), FID(Counted(width=9))]
    relative = [{}, {"cap": 4}, {"protocol": "crdi"}, {"threshold": 0.3}, {"shots": SHOTS[:2]}]
    intra = [IntraLPIPS(Counted(spatial=True), relative=True, **one) for one in relative]
    for number, callback in enumerate([*fids, *intra], start=1):
        evaluate(runs, callback)
        assert len(list(folder.iterdir())) == number
    for plain in (TinyFeatures(), Silent()):  # what says nothing of its settings keeps nothing
        evaluate(runs, FID(plain))
    assert len(list(folder.iterdir())) == len(fids) + len(intra)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle"])
def test_a_damaged_entry_is_computed_anew_with_one_warning(damage: str, folder: Path, runs: Path) -> None:
    expected = evaluate(runs, FID(Counted()))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    file.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "pickle": b"\x80\x04cos\nsystem\n"}[damage])
    again = Counted()
    with pytest.warns(UserWarning, match="computed anew") as warned:
        assert evaluate(runs, FID(again)) == expected
    assert sum("computed anew" in str(one.message) for one in warned) == 1
    assert again.seen > len(REFERENCE)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning_only(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = evaluate(runs, FID(Counted(), cache=str(tmp_path / "file")))
    assert found == evaluate(runs, FID(Counted(), cache=False))


def test_our_extractors_say_what_they_follow_from() -> None:
    kinds = [CartoonFeatures(), CartoonFeatures(layer="pooled"), LPIPSFeatures("squeeze", pnet_rand=True)]
    names = [identity(one) for one in kinds]
    assert None not in names
    assert len(set(names)) == len(kinds)
    assert identity(CartoonFeatures()) == names[0]
    with torch.no_grad():
        for parameter in (next(kinds[0].load().parameters()), next(kinds[2].parameters())):
            parameter[(0,) * parameter.ndim] += 1e-3
    assert {identity(kinds[0]), identity(kinds[2])}.isdisjoint(names)


def test_digests_tell_apart_what_prints_alike() -> None:
    long = torch.zeros(3000)
    other = long.clone()
    other[1500] = 1
    pairs = [(long, other), (long, long.view(2, -1)), (long, long.int()), ([long], [other]),
             ({"a": long}, {"a": other}), (("ab", "c"), ("a", "bc")), (1, "1"), (None, "None")]  # fmt: skip
    for a, b in pairs:
        assert digest_of(a) != digest_of(b)
        assert digest_of(a) == digest_of(a)
    with pytest.raises(TypeError, match="a object has no digest"):
        digest_of(object())


def test_the_machinery_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, images, phi = ReferenceCache(str(tmp_path)), torch.zeros(2, 3, 8, 8), Counted()
    keys = {cache.key(images, phi, torch.device(kind)) for kind in ("cpu", "cuda")}
    monkeypatch.setattr("unidad_pl.metrics.cache.version", lambda name: "99")
    keys.add(cache.key(images, phi, torch.device("cpu")))
    assert len(keys) == 3
    assert ReferenceCache(False).key(images, phi, torch.device("cpu")) is None


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path(os.path.expanduser("~")) / ".cache" / "unidad_pl" / "references"


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    cache = ReferenceCache(str(tmp_path))
    given = {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.tensor([1, 2**60])}
    cache.write("key", given)
    found = cache.read("key")
    assert found is not None
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in given.items())
    assert cache.read("other") is None
    assert cache.read(None) is None
