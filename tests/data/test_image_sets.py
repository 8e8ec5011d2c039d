"""Every place images may lie in, and every kind of bad picture."""

from __future__ import annotations

import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.metrics.toys import refused
from unidad_pl.callbacks import SampleGrid
from unidad_pl.data import Augmentation, FewShotDataModule, Reference
from unidad_pl.data.image_sets import open_images
from unidad_pl.data.images import load_image

SIZE = 12


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


PIXELS = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(6)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, some in folders of the folder."""
    place = tmp_path / "pictures"
    for i in range(6):
        path = place / ("deep/er" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
    (place / ".git").mkdir()
    (place / ".git" / "hidden.png").write_bytes(b"junk")
    (place / "notes.txt").write_text("not a picture")
    return place


def zipped(folder: Path) -> Path:
    path = folder.parent / "pictures.zip"
    with zipfile.ZipFile(path, "w") as made:
        for file in sorted(folder.rglob("*.*")):
            made.write(file, file.relative_to(folder))
        made.writestr("__MACOSX/0.png", b"junk")
    return path


def write_lmdb(place: Path, number: str = "%d", **changes: bytes | None) -> Path:
    records = {f"images_{number % i}_data": image.numpy().tobytes() for i, image in enumerate(PIXELS)}
    records |= {f"labels_{number % i}_data": np.int64(i % 3).tobytes() for i in range(6)}
    records |= {"images_shape": f"6 3 {SIZE} {SIZE}".encode(), "labels_shape": b"6"}
    if number != "%d":
        records |= {f"prompts_{number % i}_data": f"a prt dog, {i}".encode() for i in range(6)}
    with lmdb.open(str(place), map_size=2**22) as env, env.begin(write=True) as transaction:
        for key, value in (records | changes).items():
            if value is not None:
                transaction.put(key.encode(), value)
    return place


def saved_dataset(place: Path) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(picture(i)) for i in range(6)], "kind": [i % 3 for i in range(6)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(place))
    return place


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", "1000001", f"{10**12}", f"{10**400}", "9" * 5000])
def test_renders_have_an_end(count: str) -> None:
    refused(
        r"'builtin:cats:.*' *: .* from 1 to 1000000, where the shots begin, got ", open_images, f"builtin:cats:{count}"
    )
    assert len(open_images("builtin:cats:1000000")) == 1_000_000


def by_value(images: Tensor) -> list[Any]:
    return sorted(images.flatten(1).tolist())


def test_all_places_hold_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    places = [folder, zipped(folder), write_lmdb(tmp_path / "few"), write_lmdb(tmp_path / "subject", "%06d"),
              saved_dataset(tmp_path / "rows")]  # fmt: skip
    for place in places:
        assert by_value(open_images(place).load(SIZE)) == by_value(PIXELS), place
        data = FewShotDataModule(root=str(place), shots=4, resolution=SIZE)
        assert by_value(torch.cat([((data.shots + 1) * 127.5).round().byte(), data.reference])) == by_value(PIXELS)
        SampleGrid(shots=str(place))
    assert open_images(folder).names == ["0.png", "2.png", "4.png", "deep/er/1.png", "deep/er/3.png", "deep/er/5.png"]


@pytest.mark.parametrize("make", [write_lmdb, saved_dataset])
def test_labels_travel_with_their_images(make: Any, tmp_path: Path) -> None:
    place = make(tmp_path / "place")
    data = FewShotDataModule(root=str(place), shots=4, resolution=SIZE, batch_size=4, labels=True,
                             augmentation=Augmentation(flip=False))  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    kinds = {PIXELS[i].numpy().tobytes(): i % 3 for i in range(6)}
    seen = ((batch.images + 1) * 127.5).round().byte()
    assert batch.labels.tolist() == [kinds[image.numpy().tobytes()] for image in seen]
    assert next(iter(FewShotDataModule(root=str(place), shots=4, resolution=SIZE).train_dataloader())).labels is None


def test_labels_that_are_not_there_are_refused(folder: Path) -> None:
    for root in (str(folder), "builtin:cats"):
        refused("without class labels", FewShotDataModule(root, shots=4, resolution=SIZE, labels=True).setup)


def test_shots_are_left_out_of_the_reference_by_content(folder: Path, tmp_path: Path) -> None:
    shots = tmp_path / "shots"
    shots.mkdir()
    for i in range(2):
        Image.fromarray(picture(i)).save(shots / f"renamed{i}.bmp")
    options: dict[str, Any] = dict(root=str(shots), shots=2, resolution=SIZE)
    data = FewShotDataModule(**options, reference=Reference(str(folder)))
    assert by_value(data.reference) == by_value(PIXELS[2:])
    assert data.excluded == 2
    assert len(FewShotDataModule(**options, reference=Reference(str(folder), exclude_shots=False)).reference) == 6
    assert len(FewShotDataModule(str(folder), 4, SIZE, reference=Reference(exclude_shots=False)).reference) == 6
    for place, error in ((str(shots), "nothing but the shots"), (str(tmp_path / "none"), "none' does not exist")):
        data = FewShotDataModule(**options, reference=Reference(place))
        assert len(data.shots) == 2  # a run without metrics needs no reference
        refused(error, getattr, data, "reference", error=(ValueError, FileNotFoundError))


def test_copies_count_once(folder: Path) -> None:
    Image.fromarray(picture(0)).save(folder / "again.bmp")
    with pytest.warns(UserWarning, match=r"again\.bmp is the same picture as|is the same picture as again\.bmp"):
        assert len(FewShotDataModule(root=str(folder), shots=6, resolution=SIZE).shots) == 6
    copies = r"holds 6 images \(7 with copies\), but shots=7"
    refused(copies, FewShotDataModule(root=str(folder), shots=7, resolution=SIZE).setup)


@pytest.mark.parametrize(("name", "record", "message"), [
    ("images_shape", None, "no record 'images_shape'"),
    ("images_shape", b"ten", "must be like '10 3 256 256', got 'ten'"),
    ("images_3_data", b"short", "images_3_data has 5 bytes"),
    ("images_3_data", None, "no record 'images_3_data'"),
    ("labels_2_data", b"\0", "label 2 must be 8 bytes"),
    ("images_shape", b"0 3 12 12", "holds no image"),
])  # fmt: skip
def test_broken_lmdbs_are_named(name: str, record: bytes | None, message: str, tmp_path: Path) -> None:
    place = write_lmdb(tmp_path / "place", **{name: record})
    refused(message, open_images, place, error=(ValueError, FileNotFoundError))
    (place / "data.mdb").write_bytes(b"x" * 5000)
    refused(r"place/data\.mdb. is no readable LMDB", open_images, place)


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_lmdb(tmp_path / "place")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"unidad_pl\[lmdb\]", open_images, place, error=ImportError)
    refused(r"unidad_pl\[hf\]", open_images, "hf:someone/pictures", error=ImportError)


def test_datasets_without_one_image_column_are_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    refused(r"one image column, its columns are.*text", open_images, tmp_path / "text")
    two = datasets.DatasetDict({"left": datasets.Dataset.from_dict({"a": [1]})})
    two.save_to_disk(str(tmp_path / "two"))
    refused("the splits left and no 'train'", open_images, tmp_path / "two")


def test_two_pictures_of_one_name_in_a_zip_are_refused(tmp_path: Path) -> None:
    for names in (("a.png", "a.png"), ("./b.png", "b.png")):
        with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.zip", "w") as made:
            warnings.simplefilter("ignore")  # zipfile's own, of a name given twice
            for name in names:
                made.writestr(name, name)
        refused(f"two of its entries are '{names[1]}'", open_images, tmp_path / "twice.zip")


def test_no_place_is_not_the_current_folder() -> None:
    refused("root must be a path, got ''", open_images, "")
    refused("root must be a path, got ''", FewShotDataModule, "")
    refused("root must be given", FewShotDataModule, None)


def test_broken_and_encrypted_zips_are_named(folder: Path) -> None:
    path = zipped(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(r"pictures\.zip. is no readable zip", open_images, path)
    place = whole.index(b"0.png") + 5 + 20  # inside the first picture
    path.write_bytes(whole[:place] + bytes(b ^ 255 for b in whole[place : place + 30]) + whole[place + 30 :])
    refused(r"pictures\.zip/0\.png", open_images(path).load, SIZE)
    flagged = bytearray(whole)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(re.escape(signature), whole):
            flagged[found.start() + offset] |= 1  # "encrypted"
    path.write_bytes(bytes(flagged))
    refused(r"pictures\.zip/.*encrypted", open_images(path).load, SIZE)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a.txt", "x")
    refused(r"holds no image.*a\.txt", open_images, path, error=FileNotFoundError)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_file_cut_anywhere_is_an_error_with_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.asarray(Image.fromarray(picture(0)).resize((64, 64)))).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(rf"a\.{suffix}. is no readable picture", load_image, path, 8)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp", "bmp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture(1)).save(path, **({} if suffix == "bmp" else {"exif": exif}))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 5)] = random.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            try:
                assert load_image(path, 4).shape == (3, 4, 4)
            except ValueError as error:
                assert f"a.{suffix}" in str(error)  # noqa: PT017


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    for name in ("text.png", "empty.jpg", "lost.png"):
        refused(f"{name}. is no readable picture", load_image, tmp_path / name, 8)
    (tmp_path / "folder.png").mkdir()
    assert "folder.png" not in open_images(tmp_path).names
    if os.geteuid() != 0:
        Image.fromarray(picture(0)).save(tmp_path / "secret.png")
        (tmp_path / "secret.png").chmod(0)
        refused(r"Permission.*secret\.png", load_image, tmp_path / "secret.png", 8, error=PermissionError)


def test_a_decompression_bomb_is_an_error(tmp_path: Path) -> None:
    """20000 x 20000 pixels in a file of a few hundred kilobytes, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 20000
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    refused(r"bomb\.png.*decompression bomb", load_image, path, 8)


def test_pictures_look_as_in_a_photo_viewer(tmp_path: Path) -> None:
    def shown(image: Image.Image, name: str, **options: Any) -> Tensor:
        image.save(tmp_path / name, **options)
        return load_image(tmp_path / name, 8)

    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    cmyk = shown(Image.fromarray(red).convert("CMYK"), "cmyk.jpg", quality=100)
    assert (cmyk.float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 8
    palette = Image.fromarray(red).convert("P")
    assert shown(palette, "palette.png", transparency=palette.getpixel((0, 0))).eq(255).all()  # clear, so white
    assert shown(Image.new("LA", (8, 8), (10, 255)), "gray.png").eq(10).all()
    assert shown(Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)), "deep.png").eq(200).all()
    assert torch.equal(shown(Image.new("RGB", (1, 1), (9, 8, 7)), "dot.png")[:, 3, 3], torch.tensor([9, 8, 7]).byte())
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # the upper half is white
    for orientation, white in ((1, (slice(0, 3), slice(None))), (3, (slice(5, 8), slice(None))),
                               (6, (slice(None), slice(5, 8))), (8, (slice(None), slice(0, 3)))):  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = shown(Image.fromarray(half), f"turned{orientation}.png", exif=exif)
        assert turned[0][white].eq(255).all(), orientation
        assert turned.float().mean() == pytest.approx(127.5, abs=1)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    first = shown(frames[0], "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert first[0].eq(255).all()
