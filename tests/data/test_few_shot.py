"""Folders, the cartoon domains, the training stream and the seed loaders."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.metrics.toys import refused
from tests.worlds import groups
from unidad_pl.data import Augmentation, Evaluation, FewShotDataModule, Reference
from unidad_pl.data.image_sets import open_images
from unidad_pl.data.images import load_image
from unidad_pl.data.stream import ShotStream
from unidad_pl.denoiser import to_float, to_uint8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, suffix in enumerate(("png", "jpg", "webp", "bmp", "jpeg", "PNG")):
        Image.new("RGB", (40, 30), (40 * i, 100, 200 - 30 * i)).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"junk")
    return tmp_path


def test_a_folder_of_all_formats(folder: Path) -> None:
    data = FewShotDataModule(root=str(folder), shots=4, resolution=16)
    assert data.shots.shape == (4, 3, 16, 16)
    assert data.shots.dtype == torch.float32
    assert -1 <= data.shots.min() <= data.shots.max() <= 1
    assert len(data.shot_names) == len(set(data.shot_names)) == 4
    assert data.reference.shape == (2, 3, 16, 16)  # the two that are not shots
    assert FewShotDataModule(root=str(folder), shots=None, resolution=16).shots.shape[0] == 6


def test_centre_crop_and_resize_against_pil(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    ours = load_image(tmp_path / "a.png", 20)
    square = Image.fromarray(noise[15:75])
    theirs = torch.from_numpy(np.array(square.resize((20, 20), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))
    elif mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    else:
        image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}", 8)
    assert loaded.shape == (3, 8, 8)
    expected = 100 if mode == "I;16" else 255  # transparent shows white, as in a photo viewer
    assert (loaded.int() - expected).abs().max() <= 1


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    loaded = load_image(tmp_path / "a.jpg", 32)
    assert loaded[:, -4:].float().mean() > 250
    assert loaded[:, :4].float().mean() < 5


def test_unreadable_images_are_named(folder: Path) -> None:
    whole = (folder / "1.jpg").read_bytes()
    for name, content in (("broken.png", b"\x89PNG not really"), ("cut.jpg", whole[: len(whole) // 2])):
        (folder / name).write_bytes(content)
        refused(re.escape(name), FewShotDataModule(root=str(folder), shots=2).setup)
        (folder / name).unlink()


def test_missing_empty_and_small_folders_are_named(tmp_path: Path, folder: Path) -> None:
    nowhere, empty = (FewShotDataModule(root=str(tmp_path / name)) for name in ("nowhere", "empty"))
    refused("nowhere", nowhere.setup, error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(r"empty.*it is empty", empty.setup, error=FileNotFoundError)
    (tmp_path / "empty" / "a.mp4").write_bytes(b"film")
    refused(r"holds no image.*a\.mp4", empty.setup, error=FileNotFoundError)
    refused(r"holds 6 images.*shots=10", FewShotDataModule(root=str(folder), shots=10).setup)


@pytest.mark.parametrize(("options", "message"), [
    ({"root": "builtin:dogs"}, r"'dogs'.*faces, sunglasses, cats, sketches"), ({"shots": None}, "endless"),
    ({"shots": 0}, "shots must be a whole number of at least 1"), ({"batch_size": 0}, "batch_size"),
    ({"evaluation__val_samples": 0}, "val_samples"),
])  # fmt: skip
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    refused(message, lambda: FewShotDataModule(**groups(**({"root": "builtin:cats"} | options))))


def test_cartoon_shots_are_not_in_the_reference_set() -> None:
    data = FewShotDataModule("builtin:cats", reference=Reference("builtin:cats:50"))
    assert data.reference.shape == (50, 3, 32, 32)
    gap = (to_uint8(data.shots)[:, None].int() - data.reference[None].int()).abs().flatten(2).max(-1).values
    assert gap.min() > 0


def first_batch(**options: Any) -> torch.Tensor:
    settings: dict[str, Any] = dict(root="builtin:faces", shots=10, batch_size=10)
    return next(iter(FewShotDataModule(**groups(**(settings | options))).train_dataloader())).images


def test_every_argument_acts(folder: Path) -> None:
    base = first_batch()
    changes: Any = dict(root="builtin:cats", shots=5, resolution=16, batch_size=4, seed=1)
    changes |= dict(augmentation__flip=False, augmentation__shift=1, grey=True)
    for name, value in changes.items():
        other = first_batch(**{name: value})
        assert other.shape != base.shape or not torch.equal(other, base), name
    assert first_batch(root=str(folder), shots=5).shape == base.shape
    evaluation = Evaluation(val_samples=7, test_samples=8, predict_samples=9, batch_size=4, first_seed=100)
    data = FewShotDataModule("builtin:faces", reference=Reference(str(folder)), evaluation=evaluation)
    assert len(data.reference) == 6
    whole = FewShotDataModule("builtin:faces").reference
    assert len(whole) == 1000
    assert torch.equal(open_images("builtin:faces:3").load(32), whole[:3])
    refused("from 1 to 1000000, where the shots begin, got '-3'", open_images, "builtin:faces:-3")
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader(), "predict": data.predict_dataloader()}
    seeds = {k: torch.cat([b["seeds"] for b in loader]).tolist() for k, loader in loaders.items()}
    assert seeds == {k: list(range(100, 100 + n)) for k, n in (("val", 7), ("test", 8), ("predict", 9))}
    assert [len(b["seeds"]) for b in loaders["predict"]] == [4, 4, 1]
    tested = {name.split("__")[0] for name in changes} | {"reference", "evaluation", "labels"}  # test_image_sets.py
    assert tested == set(inspect.signature(FewShotDataModule.__init__).parameters) - {"self"}


def test_the_stream_is_a_function_of_seed_and_position() -> None:
    images = torch.arange(7 * 3 * 4 * 4).reshape(7, 3, 4, 4).remainder(256).to(torch.uint8)
    whole = ShotStream(images, 4, flip=True, seed=3)
    iterator = iter(whole)
    batches = [next(iterator).images for _ in range(6)]
    resumed = iter(ShotStream(images, 4, flip=True, seed=3, start=lambda: 4))
    assert torch.equal(next(resumed).images, batches[4])
    assert torch.equal(next(resumed).images, batches[5])
    ranks = [iter(ShotStream(images, 2, flip=True, seed=3, world=2, rank=r)) for r in (0, 1)]
    for batch in batches:  # two ranks of 2 see what one rank of 4 sees
        assert torch.equal(torch.cat([next(r).images for r in ranks]), batch)


def test_an_epoch_visits_every_shot_once_and_flips_half() -> None:
    images = torch.zeros(10, 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(10) + 1
    stream = ShotStream(images, 10, flip=True, seed=0)
    iterator = iter(stream)
    flips = 0
    for _ in range(40):
        batch = ((next(iterator).images + 1) * 127.5).round()
        assert sorted(batch.amax((1, 2, 3)).int().tolist()) == list(range(1, 11))
        flips += int((batch[..., 1] > 0).sum())
    assert 150 < flips < 250


def test_uint8_and_float_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_every_epoch_continues_the_stream() -> None:
    """limit_train_batches ends an epoch early; the next one must go on, not begin again."""
    positions = iter((0, 3))
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
    stream = ShotStream(images, 2, flip=False, seed=0, start=lambda: next(positions))
    first = [b.images for b, _ in zip(stream, range(3), strict=False)]
    second = [b.images for b, _ in zip(stream, range(3), strict=False)]
    assert len({round(float(v), 4) for v in torch.cat(first + second[:1]).flatten()}) == 8


def test_shifts_move_whole_pixels_and_repeat_the_edge() -> None:
    images = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8)
    stream = ShotStream(images, 1, False, 0, shift=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")[0]
    windows = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    found = set()
    for position in range(200):
        moved = to_uint8(stream.batch_at(range(position, position + 1)).images)[0]
        found |= {next(i for i, window in enumerate(windows) if torch.equal(moved, window))}
    assert len(found) == 25  # every window of the edge-padded image, and nothing else
    message = "shift must be below the resolution of 32 pixels, got 32"
    refused(message, FewShotDataModule, "builtin:faces", augmentation=Augmentation(shift=32))
