"""The same seeds by several networks; the samples nearest to, and most different from, each shot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.callbacks.toys import SHOTS, SIZE, Data, Toy, trainer
from tests.metrics.toys import TinyFeatures, refused
from tests.worlds import fit, tiny_unet, unidad
from unidad_pl.callbacks import IntraLPIPS, TeacherGrid, read_records
from unidad_pl.callbacks.cluster_pictures import ClusterPictures
from unidad_pl.callbacks.environment import environment, processor
from unidad_pl.data.pictures import as_uint8, to_rows
from unidad_pl.sampling import heun, sampling_sigmas, seeded_noise


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def drawn(folder: Path, module: Any, *callbacks: TeacherGrid, steps: int = 2, every: int = 1) -> Path:
    fit(module, steps, default_root_dir=folder, callbacks=list(callbacks), limit_val_batches=1,
        val_check_interval=every, check_val_every_n_epoch=None, num_sanity_val_steps=1)  # fmt: skip
    return folder / "samples" / "networks"


def test_each_network_draws_the_same_seeds(tmp_path: Path) -> None:
    module = unidad(target_teacher__adaptation=None, target_teacher__init_from=tiny_unet())
    calls: list[str] = []
    draw = module.sample_network
    module.sample_network = lambda name, *options: (calls.append(name), draw(name, *options))[1]  # type: ignore
    place = drawn(tmp_path, module, TeacherGrid(count=3, num_steps=2))
    assert sorted(path.name for path in place.iterdir()) == ["val_step00000001", "val_step00000002"]
    assert calls == ["target_teacher", "source_teacher"]  # frozen, both: once is enough
    expected = to_rows(as_uint8(module.sample([0, 1, 2])), 2)
    assert torch.equal(pixels(place / "val_step00000002" / "student.png"), expected)
    noise = seeded_noise([0, 1, 2], module.source_teacher.image_shape, "cpu")
    with torch.no_grad():
        images = heun(module.source_teacher, noise, sampling_sigmas(2)).clamp(-1, 1)
    assert torch.equal(pixels(place / "val_step00000002" / "source_teacher.png"), to_rows(as_uint8(images), 2))


def test_options_of_teacher_grid(tmp_path: Path) -> None:
    module = unidad()
    callbacks = [TeacherGrid(1, 1), TeacherGrid(2, 3, ["fake_score"], name="other")]
    place = drawn(tmp_path, module, *callbacks, steps=1)
    assert sorted(path.stem for path in (place / "val_step00000001").iterdir()) == [
        "source_teacher", "student", "target_teacher"]  # fmt: skip
    other = place / "other_val_step00000001"
    assert sorted(path.stem for path in other.iterdir()) == ["fake_score", "student"]
    assert pixels(other / "student.png").shape == (3, 32, 16)
    few, more = (as_uint8(module.sample_network("fake_score", [0, 1], steps)) for steps in (1, 3))
    assert torch.equal(pixels(other / "fake_score.png"), to_rows(more, 1))
    assert not torch.equal(few, more)


def test_what_teacher_grid_cannot_draw(tmp_path: Path) -> None:
    refused("count must be a whole number of at least 1, got 0", TeacherGrid, count=0)
    refused("num_steps", TeacherGrid, num_steps=0)
    refused("networks must be a list of names", TeacherGrid, networks="fake_score")
    with pytest.raises(TypeError, match="TeacherGrid needs a module with sample_network"):
        trainer(tmp_path, TeacherGrid()).validate(Toy(), datamodule=Data(), verbose=False)
    with pytest.raises(ValueError, match="there is no network 'teacher', this module has"):
        drawn(tmp_path, unidad(), TeacherGrid(networks=["teacher"]))
    with pytest.raises(ValueError, match="has no network 'codec'"):
        unidad().sample_network("codec", [0])


def test_cluster_pictures_are_the_extremes_of_all_samples() -> None:
    random = torch.Generator().manual_seed(0)
    distances = torch.rand(60, 4, generator=random, dtype=torch.float64)
    distances[:, 3] += 2  # nobody's nearest shot
    images = torch.randint(0, 256, (60, 3, 2, 2), generator=random, dtype=torch.uint8)
    pictures = ClusterPictures(2)
    order = torch.randperm(60, generator=random)
    for part in [*order.split(7), order[:5]]:  # some come twice
        pictures.update(images[part], part, distances[part])
    shown, listed = pictures.of_clusters(4)
    nearest, cluster = distances.min(1)
    for number in range(3):
        own = sorted((float(nearest[i]), i) for i in range(60) if cluster[i] == number)
        assert listed[number]["nearest"] == [[i, d] for d, i in own[:2]]
        assert listed[number]["most_different"] == [[i, d] for d, i in own[:-3:-1]]
        assert torch.equal(shown[number], images[[own[0][1], own[1][1], own[-1][1], own[-2][1]]])
    assert listed[3] == {"nearest": [], "most_different": []}
    assert bool((shown[3] == 255).all())
    assert pictures.count("images") <= 4 * 2 * 2


def test_intra_lpips_draws_the_clusters(tmp_path: Path) -> None:
    module = Toy()
    for wanted, name in ((2, "intra_lpips"), (0, "intra_none")):
        callback = IntraLPIPS(TinyFeatures(), pictures=wanted, name=name)
        trainer(tmp_path, callback).validate(module, datamodule=Data(), verbose=False)
    record, without = read_records(tmp_path / "metrics.jsonl")
    assert "picture" not in without
    assert len(list((tmp_path / "samples" / "clusters").iterdir())) == 1
    picture = pixels(tmp_path / record["picture"])
    assert picture.shape == (3, len(SHOTS) * SIZE, 5 * SIZE)
    assert torch.equal(picture[:, :SIZE, :SIZE], as_uint8(SHOTS)[0])
    flat = TinyFeatures().eval()
    samples = module.sample(torch.arange(24))
    distances = (flat(samples)[:, None] - flat(SHOTS)[None]).square().flatten(2).sum(2)
    for number, row in enumerate(record["clusters"]):
        own = [i for i in range(24) if int(distances[i].argmin()) == number]
        assert {seed for seed, _ in row["nearest"]} == set(sorted(own, key=lambda i: float(distances[i, number]))[:2])
        for seed, distance in row["nearest"] + row["most_different"]:
            assert distance == pytest.approx(float(distances[seed, number]), rel=1e-4)
    filled = next(number for number, row in enumerate(record["clusters"]) if row["nearest"])
    seed, top = record["clusters"][filled]["nearest"][0][0], filled * SIZE
    assert torch.equal(picture[:, top : top + SIZE, SIZE : 2 * SIZE], as_uint8(samples)[seed])
    refused("pictures must be a whole number of at least 0, got -1", IntraLPIPS, TinyFeatures(), pictures=-1)


def test_the_processor_is_recorded(tmp_path: Path) -> None:
    record = environment(trainer(tmp_path))
    assert record["processor"] == processor()
    assert record["cores"] >= 1
