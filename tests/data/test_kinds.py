"""Every kind of picture, colour and place in the file system, made here with Pillow."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from tests.metrics.toys import refused
from unidad_pl.data import FewShotDataModule
from unidad_pl.data.image_sets import open_images
from unidad_pl.data.images import load_image, readable
from unidad_pl.files import BrokenFile

OLD_PILLOW = int(PIL.__version__.partition(".")[0]) < 13


def shown(image: Image.Image, path: Path, **options: Any) -> Tensor:
    image.save(path, **options)
    return load_image(path, 8)


def flat(value: Any, dtype: Any = np.uint8) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype))


def profile(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float], gamma: float) -> bytes:
    """A display profile of version 2, written by hand: three primaries (xy), D65 adapted to D50, one gamma."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    primaries = np.stack([xyz(*red), xyz(*green), xyz(*blue)], 1)
    white = xyz(0.3127, 0.3290)
    matrix = primaries * np.linalg.solve(primaries, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = (bradford @ np.array([0.9642, 1, 0.8249])) / (bradford @ white)
    matrix = np.linalg.solve(bradford, np.diag(scale) @ bradford) @ matrix

    def numbers(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"P\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0X\0\0\0", b"wtpt": numbers(0.9642, 1, 0.8249),
            b"rXYZ": numbers(*matrix[:, 0]), b"gXYZ": numbers(*matrix[:, 1]), b"bXYZ": numbers(*matrix[:, 2]),
            b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp")
    return head.ljust(68, b"\0") + numbers(0.9642, 1, 0.8249)[8:] + bytes(48) + table + body


P3 = profile((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), 2.2)
WIDE = profile((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), 1.0)  # sRGB's primaries, linear


@pytest.mark.parametrize("suffix", ["tif", "tiff", "gif", "jfif", "jpe", "jp2", "ppm", "tga", "qoi", "avif", "pcx"])
def test_kinds_beside_png_and_jpeg_are_read(suffix: str, tmp_path: Path) -> None:
    if suffix in ("avif", "qoi") and Image.registered_extensions().get(f".{suffix}") not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    colours = [Image.new("RGB", (8, 8), colour) for colour in ((200, 30, 40), (10, 20, 250))]
    options: Any = {"format": "JPEG"} if suffix in ("jfif", "jpe") else {}
    if suffix in ("gif", "tif", "avif"):  # of several frames the first counts
        options |= {"save_all": True, "append_images": colours[1:]}
    colours[0].save(tmp_path / f"a.{suffix}", **options)
    colours[1].save(tmp_path / "b.PNG")
    place = open_images(tmp_path)
    assert place.names == [f"a.{suffix}", "b.PNG"]
    assert (place.load(8)[0].float().mean((1, 2)) - torch.tensor([200.0, 30, 40])).abs().max() < 6


def test_heic_is_read_where_its_package_is_and_named_where_not(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    if ".heic" in readable():
        refused(r"b\.heic. is no readable picture", open_images(tmp_path).load, 8)
    else:
        with pytest.warns(UserWarning, match=r"1 left out .*b\.heic \(pip install 'unidad_pl\[heif\]'"):
            assert open_images(tmp_path).names == ["a.png"]


def test_what_is_left_out_is_named_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("film.mp4", "photo.cr2", "caption.txt", ".hidden.mov", *(f"more{i}.mov" for i in range(9))):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"11 left out beside 1 pictures: film\.mp4 \(\.mp4 is no kind") as seen:
        open_images(tmp_path)
    assert len(seen) == 1
    assert "caption" not in str(seen[0].message)
    for name in ("film.mp4", "photo.cr2", *(f"more{i}.mov" for i in range(9))):
        (tmp_path / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_images(tmp_path)) == 1


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for place, value in ((root / "z", 10), (other / "in", 20)):
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8), (value, 0, 0)).save(place / "a.png")
    for link, target in (("again", root / "z"), ("linked", other), ("z/up", root), ("z/self", root / "z")):
        (root / link).symlink_to(target, target_is_directory=True)
    (other / "back").symlink_to(other)
    (root / "one.png").symlink_to(other / "in" / "a.png")
    (root / "out").symlink_to(tmp_path)  # the folder that this one lies in
    with pytest.warns(UserWarning, match="out .a link to a folder that this one lies in"):
        assert open_images(root).names == ["linked/in/a.png", "one.png", "z/a.png"]


def test_what_only_looks_like_a_file_never_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(tmp_path)  # the paths of sockets are short
        made.bind("socket.png")
        os.chdir(here)
        for name in ("pipe", "device", "link", "socket"):
            refused(rf"{name}\.png. is no readable picture .no regular file", load_image, tmp_path / f"{name}.png", 8)
    refused("no regular file", FewShotDataModule(str(tmp_path), shots=1).setup)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "dataset_info.json").write_text("{}")
    os.mkfifo(tmp_path / "records" / "data.arrow")
    refused(r"data\.arrow. is no readable part of a dataset", open_images, tmp_path / "records")


@pytest.mark.parametrize("text", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", b"%PDF-1.4\n",
                                  b"\xd7\xcd\xc6\x9a" + bytes(40), b"SIMPLE  =                    T"])  # fmt: skip
def test_no_picture_starts_a_program(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, started)
    (tmp_path / "a.png").write_bytes(text)
    refused(r"a\.png. is no readable picture .UnidentifiedImageError", load_image, tmp_path / "a.png", 8)


def test_colour_profiles_are_turned_into_srgb(tmp_path: Path) -> None:
    colour = (200, 60, 90)
    plain = shown(Image.new("RGB", (8, 8), colour), tmp_path / "plain.png")[:, 0, 0].int()
    for number, icc in enumerate((P3, WIDE)):
        source = ImageCms.ImageCmsProfile(BytesIO(icc))
        wanted = ImageCms.profileToProfile(
            Image.new("RGB", (8, 8), colour), source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert wanted is not None
        for suffix in ("png", "tif", "webp"):
            options: Any = {"lossless": True} if suffix == "webp" else {}
            seen = shown(Image.new("RGB", (8, 8), colour), tmp_path / f"{number}.{suffix}", icc_profile=icc, **options)
            assert seen[:, 0, 0].tolist() == list(wanted.getpixel((0, 0)))  # type: ignore[call-overload]
            assert (seen[:, 0, 0].int() - plain).abs().max() > 10
    linear = shown(Image.new("RGB", (8, 8), (55, 55, 55)), tmp_path / "linear.png", icc_profile=WIDE)
    assert (linear[:, 0, 0].int() - 128).abs().max() <= 1  # 55 of 255 in linear light is half grey in sRGB
    clear = shown(Image.new("RGBA", (8, 8), (55, 55, 55, 0)), tmp_path / "clear.png", icc_profile=WIDE)
    assert clear.eq(255).all()
    grey = shown(Image.new("L", (8, 8), 55), tmp_path / "grey.png", icc_profile=WIDE)
    assert torch.equal(grey, linear)


def test_an_srgb_profile_changes_no_bit_and_a_broken_one_is_warned_of(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain = shown(noise, tmp_path / "plain.png")
    standard = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert torch.equal(shown(noise, tmp_path / "srgb.png", icc_profile=standard), plain)
    for bad in (b"junk", P3[:200], P3[:16] + b"CMYK" + P3[20:]):
        with pytest.warns(UserWarning, match=r"colour profile of .*bad\.png") as seen:
            assert torch.equal(shown(noise, tmp_path / "bad.png", icc_profile=bad), plain)
        assert len(seen) == 1


@pytest.mark.skipif(OLD_PILLOW, reason="reads the whole block or nothing: a picture with such a block is warned of")
def test_only_the_orientation_is_read_of_exif(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    # Big-endian: a text at an offset that is nowhere, a number of no known type, and the orientation (upside down).
    entries = [(0x010E, 2, 99, 0x7FFFFFFF), (0x011A, 77, 1, 5), (0x0112, 3, 1, 3 << 16), (0x829A, 5, 2, 0xFFFFFF00)]
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *e) for e in entries)
    for suffix in ("jpg", "png", "webp"):
        seen = shown(Image.fromarray(half), tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + block + bytes(4))
        assert seen[:, 6:].min() > 240, suffix
        assert seen[:, :2].max() < 15, suffix
    seen = shown(Image.fromarray(half), tmp_path / "broken.png", exif=b"Exif\0\0no block at all")
    assert seen[:, :2].min() == 255


def test_clear_parts_are_white_in_every_mode(tmp_path: Path) -> None:
    palette = flat(3).convert("P")
    cases = {
        "rgba": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), {}), "la": (Image.new("LA", (8, 8), (9, 0)), {}),
        "l": (flat(9), {"transparency": 9}), "deep": (flat(9 * 257, np.uint16), {"transparency": 9 * 257}),
        "rgb": (Image.new("RGB", (8, 8), (9, 8, 7)), {"transparency": (9, 8, 7)}),
        "palette": (palette, {"transparency": 3}), "bytes": (palette, {"transparency": bytes(256)}),
        "one": (Image.new("1", (8, 8), 0), {"transparency": 0}),
    }  # fmt: skip
    for name, (image, options) in cases.items():
        assert shown(image, tmp_path / f"{name}.png", **options).eq(255).all(), name
    assert shown(palette, tmp_path / "a.gif", transparency=3).eq(255).all()
    half = shown(Image.new("LA", (8, 8), (0, 128)), tmp_path / "half.png")
    assert torch.equal(half, shown(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), tmp_path / "half2.png"))
    assert half.eq(127).all()


def test_numbers_of_16_and_32_bits_have_a_known_range_or_are_refused(tmp_path: Path) -> None:
    for name, value, dtype, wanted in (
        ("a.png", 200 * 257, np.uint16, 200), ("a.tif", 200 * 257, np.uint16, 200), ("b.tif", 200 * 257, np.int32, 200),
        ("c.tif", 0.5, np.float32, 128), ("d.tif", 1.0, np.float32, 255), ("e.tif", 200.0, np.float32, 200),
        ("f.tif", 0.0, np.float32, 0), ("g.tif", 0, np.int32, 0), ("h.png", 100, np.uint16, 0),
    ):  # fmt: skip
        assert shown(flat(value, dtype), tmp_path / name).eq(wanted).all(), name
    for value, dtype in ((1.5, np.float32), (-0.1, np.float32), (4000.0, np.float32), (np.nan, np.float32),
                         (np.inf, np.float32), (200, np.int32), (70_000, np.int32), (-5, np.int32)):  # fmt: skip
        with pytest.raises(BrokenFile, match=r"x\.tif.*its numbers go from .*: save it with 8 bits"):
            shown(flat(value, dtype), tmp_path / "x.tif")


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (200, 40, 40))
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    images = {"lab.tif": lab, "cmyk.tif": red.convert("CMYK"), "ycc.tif": red.convert("YCbCr")}
    if OLD_PILLOW:  # writes the last so that it cannot read it
        del images["ycc.tif"]
    for name, image in images.items():
        assert (shown(image, tmp_path / name)[:, 0, 0].int() - torch.tensor([200, 40, 40])).abs().max() <= 4, name


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from unidad_pl.data import Prior, PromptOptions, Reference, SubjectDataModule

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "t.txt").write_text("a {}")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    assert len(open_images("~/rows")) == 1
    assert len(FewShotDataModule("~/photos", 1, 8, reference=Reference("~/photos")).reference) == 2
    data = SubjectDataModule("~/photos", "dog", prompts=PromptOptions("~/t.txt"), prior=Prior("~/photos"), resolution=8)
    data.setup("fit")
    assert (data.subject, data.templates, data.class_images is None) == ("photos", ["a {}"], False)


def test_datasets_of_bytes_and_paths_are_read_alike(tmp_path: Path) -> None:
    import datasets

    Image.new("RGB", (8, 8), (7, 8, 9)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for decode in (True, False):
        kept = datasets.Dataset.from_dict(
            {"image": [{"bytes": content, "path": None}, {"bytes": content, "path": None}]}
        )
        kept.cast_column("image", datasets.Image(decode=decode)).save_to_disk(str(tmp_path / f"{decode}"))
        assert open_images(tmp_path / f"{decode}").load(8)[1, :, 0, 0].tolist() == [7, 8, 9]
    holes = datasets.Dataset.from_dict({"image": [None]}).cast_column("image", datasets.Image())
    holes.save_to_disk(str(tmp_path / "holes"))
    refused("image 0. is no readable picture .*the row has none", open_images(tmp_path / "holes").load, 8)
    for name in ("hf:", "hf: ", "hf::train"):
        refused("names no dataset: write hf:NAME", open_images, name)


def test_a_larger_limit_of_another_package_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = b"P6 20000 20000 255\n"
    (tmp_path / "a.ppm").write_bytes(header)
    refused(r"a\.ppm.*20000 x 20000 pixels: too many", load_image, tmp_path / "a.ppm", 8)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**30)
    refused(r"sparse\.png.*1073741824 bytes, at most", load_image, tmp_path / "sparse.png", 8)
