"""Large JPEGs at a part of their size, pictures by threads, and how much memory a reference takes."""

from __future__ import annotations

import os
import pickle
import random
import re
import threading
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps
from torch import Tensor

from tests.data.test_image_sets import saved_dataset, write_lmdb
from unidad_pl.cli.report_memory import LiveBytes
from unidad_pl.data import FewShotDataModule, Reference, few_shot, images
from unidad_pl.data.image_sets import FolderImages, open_images
from unidad_pl.data.images import MARGIN, load_image

BICUBIC = Image.Resampling.BICUBIC


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photograph(size: tuple[int, int]) -> Image.Image:
    """Forms of every size, the smaller the fainter."""
    forms = [noise(n, n, n).resize(size, BICUBIC) for n in (6, 60, 240)]
    return Image.blend(Image.blend(forms[0], forms[1], 0.35), forms[2], 0.15)


def writing(size: tuple[int, int]) -> Image.Image:
    page = Image.new("RGB", size, "white")
    for line in range(0, size[1], 13):
        ImageDraw.Draw(page).text((0, line), "The quick brown fox jumps " * 12, fill=(line % 256, 20, 60))
    return page


def resized(picture: Image.Image, resolution: int) -> Tensor:
    """The centre square of all of its pixels."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((resolution, resolution), BICUBIC)
    return torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1)


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes at which pictures are decoded."""
    sizes: list[tuple[int, int]] = []
    shown = images.as_shown

    def spy(opened: Image.Image, name: str) -> Image.Image:
        sizes.append(opened.size)
        return shown(opened, name)

    monkeypatch.setattr(images, "as_shown", spy)
    return sizes


@pytest.mark.parametrize("part", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(("make", "more", "apart"), [
    (photograph, 1, 1), (writing, 1.5, 6), (lambda size: noise(*size[::-1]), 2.6, 3),
])  # fmt: skip
def test_a_large_jpeg_is_as_near_to_what_it_shows_as_all_of_its_pixels(
    make: Callable[..., Image.Image], more: float, apart: float, subsampling: int, part: int, decoded: list[Any]
) -> None:
    """In grey levels of 255, root mean square, at the smallest margin there is; white noise is the worst case. Coloured
    letters come sharper than from all pixels, of which a JPEG has only every second one's colour."""
    size, resolution = (1003, 811), int(811 / part / MARGIN)
    original, file = make(size), BytesIO()
    original.save(file, "JPEG", quality=92, subsampling=subsampling)
    true, whole = resized(original, resolution), resized(Image.open(file), resolution)
    shrunk = load_image(file.getvalue(), resolution, "a.jpg")
    assert decoded == [(-(-1003 // part), -(-811 // part))]
    assert rms(shrunk, true) <= rms(whole, true) + more
    assert rms(shrunk, whole) <= apart
    assert torch.equal(shrunk, load_image(file.getvalue(), resolution, "a.jpg"))


@pytest.mark.parametrize("options", [
    {}, {"progressive": True}, {"format": "PNG"}, {"format": "WEBP", "lossless": True}, {"format": "MPO"},
])  # fmt: skip
def test_what_is_not_large_or_no_jpeg_keeps_all_of_its_pixels(options: dict[str, Any], decoded: list[Any]) -> None:
    file = BytesIO()
    jpeg = options.get("format", "MPO") == "MPO"
    more: dict[str, Any] = {"save_all": True, "append_images": [noise(9, 9)]} if "MPO" in options.values() else {}
    photograph((300, 200)).save(file, **{"format": "JPEG", **options}, **more)
    small, large = int(200 / 2 / MARGIN) + 1, 20
    for resolution in (small, large):
        loaded, whole = load_image(file.getvalue(), resolution, "a"), resized(Image.open(file), resolution)
        assert (rms(loaded, whole) == 0) == (resolution == small or not jpeg)
        assert rms(loaded, whole) < 1
    assert decoded == [(300, 200), (75, 50) if jpeg else (300, 200)]


@pytest.mark.parametrize("size", [(800, 608), (608, 800), (801, 607), (640, 640)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_square_is_the_same_however_a_large_jpeg_is_turned(size: tuple[int, int], orientation: int) -> None:
    """A square that lies half a pixel of the shrunk picture beside the right one is at least 1.4 away."""
    x, y = np.meshgrid(np.arange(size[0]) - size[0] // 3, np.arange(size[1]) - size[1] // 2)
    wave = 127.5 + 100 * np.sin(np.hypot(x, y) / 9)
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(wave.astype(np.uint8)).convert("RGB").save(file, "JPEG", quality=95, exif=exif)
    whole = resized(ImageOps.exif_transpose(Image.open(file)), 48)
    assert rms(load_image(file.getvalue(), 48, "a.jpg"), whole) < 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_colours_of_a_large_jpeg_are_those_of_all_of_its_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, options = BytesIO(), {}
    if mode == "RGB":
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph((640, 480)).convert(mode).save(file, "JPEG", quality=95, **options)
    shrunk = load_image(file.getvalue(), 32, "a.jpg")
    monkeypatch.setattr(images, "MARGIN", 1000)
    assert 0 < rms(shrunk, load_image(file.getvalue(), 32, "a.jpg")) < 1


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Four processors; the threads that have read."""
    seen: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    load = images.load_image

    def slow(*given: Any) -> Tensor:
        seen.add(threading.get_ident())
        time.sleep(random.random() / 200)
        return load(*given)

    for name in ("image_sets", "packed"):
        monkeypatch.setattr(f"unidad_pl.data.{name}.load_image", slow)
    return seen


def many(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        noise(9, 9, i).save(folder / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


def test_threads_read_what_one_reads_in_the_same_order(tmp_path: Path, four: set[int]) -> None:
    folder = many(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        for file in sorted(folder.iterdir()):
            made.write(file, file.name)
    for place in (folder, tmp_path / "all.zip", saved_dataset(tmp_path / "rows"), write_lmdb(tmp_path / "few")):
        four.clear()
        opened = open_images(place)
        alone = torch.stack([opened.read(i, 8) for i in range(len(opened))])
        four.clear()
        for _ in range(2):
            assert torch.equal(opened.load(8), alone)
        assert torch.equal(opened.load(8, [5, 0, 5]), alone[[5, 0, 5]])
        assert (len(four) > 1) == opened.threaded
        assert torch.equal(pickle.loads(pickle.dumps(opened)).load(8), alone)


def test_of_several_bad_pictures_the_first_is_named(tmp_path: Path, four: set[int]) -> None:
    folder = many(tmp_path / "folder")
    for name in ("007.png", "008.jpg", "031.png"):
        (folder / name).write_bytes(b"no picture")
    for _ in range(5):
        for indices, name in ((None, "007.png"), ([39, 31, 8, 7], "031.png"), (range(8, 40), "008.jpg")):
            with pytest.raises(ValueError, match=re.escape(name)):
                open_images(folder).load(8, indices)
    messages = set()
    for _ in range(5):
        with pytest.raises(ValueError, match="is no readable picture") as raised:
            FewShotDataModule(str(folder), 10, 8).setup()
        messages.add(str(raised.value))
    assert len(messages) == 1


def test_a_forked_process_opens_a_zip_of_its_own(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        for file in sorted(many(tmp_path / "folder").iterdir()):
            made.write(file, file.name)
    place = open_images(tmp_path / "all.zip")
    expected = place.load(8)
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(place.read(i, 8), expected[i]) for i in range(40)) else 1)
    assert all(torch.equal(place.read(i, 8), expected[i]) for i in range(40))
    assert os.waitpid(child, 0)[1] == 0


def test_pictures_are_sorted_as_paths(tmp_path: Path) -> None:
    """The choice of the shots goes by it."""
    for name in ("b.png", "a/b.png", "a-b/c.png", "a b/c.png", "a.png", "a/b/c.png", "B/a.PNG", "a/ä.png", "a."):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [PurePath(name) for name in open_images(tmp_path).names]
    assert found == sorted(found)
    assert len(found) == 8


@pytest.mark.parametrize("grey", [False, True])
def test_a_reference_lies_in_memory_once(tmp_path: Path, grey: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_shot, "CHUNK", 2)
    folder, side = many(tmp_path / "folder", 60), 64
    for reference in (Reference(), Reference(str(folder)), Reference(str(folder), exclude_shots=False)):
        data = FewShotDataModule(str(folder), 5, side, reference=reference, grey=grey)
        data.setup()
        with LiveBytes() as live:
            count = len(data.reference)
        picture = side**2 * (1 if grey else 3)
        assert count == (60 if reference.exclude_shots is False else 55)
        chunk = 2 * side**2 * 3 * (14 if grey else 3)  # grey: as whole numbers of 32 and 64 bits
        assert 55 * picture <= live.peak <= 60 * picture + chunk
        whole = FolderImages(folder).load(side)
        assert torch.equal(data.reference[:, 0], data.reference[:, 2]) == grey
        if not grey and reference.exclude_shots is False:
            assert torch.equal(data.reference, whole)
            assert not data.reference_is_shots
