"""Damaged files of every kind end in one sentence that names them, or are read; and what large places cost."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_image_sets import PIXELS, SIZE, picture, saved_dataset, write_lmdb
from tests.metrics.toys import refused
from unidad_pl.data import FewShotDataModule, Reference, image_sets
from unidad_pl.data.choice import SMALL
from unidad_pl.data.image_sets import FolderImages, open_images
from unidad_pl.data.images import load_image
from unidad_pl.files import BrokenFile

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def damaged(whole: bytes, seed: int, flips: int) -> Iterator[bytes]:
    """Cut short, emptied, replaced by a web page, with bits turned at random."""
    random, content = np.random.default_rng(seed), np.frombuffer(whole, np.uint8)
    yield from (whole[: int(share * len(whole))] for share in (0, 0.02, 0.3, 0.7, 0.97))
    yield from (HTML, bytes(len(whole)))
    for i in range(flips):
        other, reach = content.copy(), len(whole) if i % 2 else min(300, len(whole))
        at = random.integers(0, reach, (1, 4, 30)[i % 3])
        other[at] ^= (1 << random.integers(0, 8, len(at))).astype(np.uint8)
        yield other.tobytes()


def survives(file: Path, seed: int, flips: int, call: Callable[[], Any], name: str) -> int:
    """Every damage is one line that names the file, or read; how many were refused."""
    whole, count = file.read_bytes(), 0
    for content in damaged(whole, seed, flips):
        file.write_bytes(content)
        try:
            call()
        except (BrokenFile, FileNotFoundError) as error:
            assert name in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            count += 1
    file.write_bytes(whole)
    return count


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "jp2", "ppm", "avif", "qoi"])
def test_damaged_pictures(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    if Image.registered_extensions().get(f".{suffix}") not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    Image.fromarray(picture(0)).resize((40, 30)).save(file)
    assert survives(file, 1, 12, lambda: load_image(file, 8), f"a.{suffix}") >= 5


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for i in range(3):
            content = BytesIO()
            Image.fromarray(picture(i)).save(content, "BMP")
            made.writestr(f"{i}.bmp", content.getvalue())
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_zips(method: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", method)
    assert survives(path, 2, 12, lambda: open_images(path).load(8), "a.zip") >= 10  # most: it has checksums


def test_zips_that_are_too_large_or_have_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("bomb.webp", bytes(2**20))
    assert image_sets.MAX_BYTES == 2**29
    monkeypatch.setattr(image_sets, "MAX_BYTES", 2**20 - 1)
    refused(r"a\.zip/bomb\.webp.*1048576 bytes when unpacked, at most", open_images(path).load, 8)
    image = BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with zipfile.ZipFile(path, "w") as made:
        for name in ("../../up.png", "/abs.png", "a\\b.png", "é.png", "deep/" * 50 + "a.png"):
            made.writestr(name, image.getvalue())
    assert open_images(path).load(8).shape == (5, 3, 8, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]  # nothing was unpacked


def test_damaged_lmdbs(tmp_path: Path) -> None:
    place = write_lmdb(tmp_path / "few")
    assert survives(place / "data.mdb", 3, 4, lambda: open_images(place).load(8), "few") >= 5


def test_an_lmdb_that_would_end_the_process_is_an_error(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "few"), map_size=2**24) as env, env.begin(write=True) as records:
        for i in range(40):
            records.put(f"images_{i}_data".encode(), bytes(3 * 40 * 40))
        records.put(b"images_shape", b"40 3 40 40")
    file = tmp_path / "few" / "data.mdb"
    whole = file.read_bytes()
    assert len(open_images(tmp_path / "few")) == 40
    for share in (0.3, 0.6, 0.9):
        file.write_bytes(whole[: int(share * len(whole)) // 4096 * 4096])
        refused(r"data\.mdb. is no readable LMDB .*cut short, it has \d+ of \d+ bytes", open_images, tmp_path / "few")
    wild = bytearray(whole)
    for header in (0, 4096):  # the root page lies far outside of the file
        struct.pack_into("<Q", wild, header + 128, 2**40)
    file.write_bytes(bytes(wild))
    refused("is no readable LMDB", open_images, tmp_path / "few")


@pytest.mark.parametrize("shape", ["1000000000 3 12 12", "6 3 4294967296 4294967296", "6 3 65536 65536", "6 3 0 12",
                                   "6 3 -12 -12", "-6 3 12 12", "6 3 1" + "0" * 5000 + " 1", "6 3 12",
                                   "6 4 12 12"])  # fmt: skip
def test_absurd_shapes_of_an_lmdb(shape: str, tmp_path: Path) -> None:
    place = write_lmdb(tmp_path / "few", images_shape=shape.encode())
    refused(
        "few. is no readable LMDB .*images_shape|few. is no readable LMDB .*digits",
        open_images,
        place,
        error=BrokenFile,
    )


def test_damaged_datasets(tmp_path: Path) -> None:
    place = saved_dataset(tmp_path / "rows")
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        assert survives(place / name, 4, 1, lambda: open_images(place).load(8), "rows") >= 5
    for name in ("dataset_info.json", "state.json"):
        kept = (place / name).read_bytes()
        for text in ("[" * 100_000, '{"a":' * 50_000, "null", "[]", "3", "{}"):
            (place / name).write_text(text)
            try:
                assert open_images(place).load(8).shape == (6, 3, 8, 8)
            except BrokenFile as error:
                assert re.match(r"'.*rows' is no readable dataset .*: write or download it again$", str(error))  # noqa: PT017
        (place / name).write_bytes(kept)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    place = write_lmdb(tmp_path / "few", labels_3_data=struct.pack("<q", -7))
    assert len(FewShotDataModule(str(place), 6, SIZE).shots) == 6  # nobody asked for them
    refused("images_3_data' .* has the label -7", FewShotDataModule(str(place), 6, SIZE, labels=True).setup)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More pictures than are all decoded, two of them copies of the first."""
    for i in range(3 * SMALL):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 77)).save(tmp_path / f"{i:04d}.bmp")
    for i in (1, 2):
        os.link(tmp_path / "0000.bmp", tmp_path / f"copy{i}.bmp")
    return tmp_path


def test_of_a_large_place_only_the_shots_are_decoded(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read = FolderImages.read

    def counted(self: FolderImages, index: int, resolution: int) -> torch.Tensor:
        decoded.append(index)
        return read(self, index, resolution)

    monkeypatch.setattr(FolderImages, "read", counted)
    data = FewShotDataModule(str(many), shots=10, resolution=8)
    data.setup()
    assert len(decoded) == len(set(decoded)) == 10
    order = torch.randperm(3 * SMALL + 2, generator=torch.Generator().manual_seed(choice_seed()))
    assert data.shot_names == [open_images(many).names[i] for i in sorted(order[:10].tolist())]
    assert len(data.reference) == 3 * SMALL + 2 - 10
    assert len(decoded) == 3 * SMALL + 2  # the shots are not decoded again
    assert not data.reference_is_shots
    hashes = {image.numpy().tobytes() for image in data.reference}
    assert not hashes & {((shot + 1) * 127.5).round().byte().numpy().tobytes() for shot in data.shots}
    whole = FewShotDataModule(str(many), shots=3 * SMALL, resolution=8)
    assert len(whole.shots) == 3 * SMALL  # copies are drawn again
    refused(r"holds 300 images \(302 with copies\), but shots=301", FewShotDataModule(str(many), 301, 8).setup)


def choice_seed() -> int:
    from unidad_pl.seeds import mix_seed

    return mix_seed(0, 1)


@pytest.mark.parametrize(("photos", "options", "count", "copies", "warned"), [
    (13, {}, 3, False, "there are 3 reference images: too few"),
    (10, {}, 10, True, "10 reference images are the shots"), (11, {}, 11, True, "are the shots"),
    (13, {"exclude_shots": False}, 13, True, "are the shots"),
    (40, {}, 30, False, None), (40, {"exclude_shots": False}, 40, False, None),
])  # fmt: skip
def test_a_reference_of_shots_or_of_few_is_said(
    photos: int, options: Any, count: int, copies: bool, warned: str | None, tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    for i in range(photos):
        Image.new("RGB", (8, 8), (5 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    data = FewShotDataModule(str(tmp_path), 10, 8, reference=Reference(**options))
    assert data.reference_is_shots is copies
    assert len(data.reference) == count
    said = [str(warning.message) for warning in recwarn if "reference images" in str(warning.message)]
    assert len(said) == (warned is not None)
    assert warned is None or warned in said[0]


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    data = FewShotDataModule(str(tmp_path), 4, SIZE, batch_size=4, grey=True)
    batch = next(iter(data.train_dataloader())).images
    assert batch.shape == (4, 1, SIZE, SIZE)
    wanted = [np.asarray(Image.open(tmp_path / name).convert("L")) for name in data.shot_names]
    assert np.array_equal(((data.shots + 1) * 127.5).round().byte()[:, 0].numpy(), np.stack(wanted))
    for images in (data.shots, data.reference):  # as metrics take them
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert torch.equal(images[:, 0], images[:, 2])
    assert FewShotDataModule("builtin:cats", 2, 16, grey=True).reference.shape == (1000, 3, 16, 16)


def test_the_state_tells_all_that_ranks_must_share(tmp_path: Path) -> None:
    place = str(write_lmdb(tmp_path / "few"))
    base: dict[str, Any] = dict(root=place, shots=4, resolution=SIZE, batch_size=2)
    states = [FewShotDataModule(**(base | change)).state_dict() for change in (
        {}, {"seed": 1}, {"batch_size": 3}, {"labels": True}, {"grey": True}, {"shots": 5}, {"resolution": 8},
    )]  # fmt: skip
    assert len({repr(state) for state in states}) == len(states)
    assert FewShotDataModule(**base).state_dict() == states[0]
    assert len(PIXELS) == 6
