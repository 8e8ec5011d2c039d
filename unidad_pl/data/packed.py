"""Pictures as records of one large file: an LMDB of the authors' layouts, a Hugging Face dataset."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unidad_pl.data.images import ImageSet, check_regular, load_image, square
from unidad_pl.files import BrokenFile, expanded, reading

HUGGING_FACE = "hf:"
PROBE = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True, lock=False, create=False) as env, env.begin(buffers=True) as records:
    for _, value in records.cursor():
        value[:1], bytes(value[-1:])
"""
"""Touches every record. The library trusts the file: one that is damaged ends the process, or never ends."""
PROBE_SECONDS = 120


class LMDBImages(ImageSet):
    """The released code's LMDB: raw CHW bytes ``images_<i>_data``, the shape of all as text, labels.

    Numbers are plain (few-shot sets) or have six digits (subjects).

        >>> LMDBImages(Path("nowhere"))
        Traceback (most recent call last):
        ...
        unidad_pl.files.BrokenFile: 'nowhere/data.mdb' is no readable LMDB (No such file or directory): replace it ...
    """

    threaded = False  # the library opens a place once in a process

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            import lmdb  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{str(folder)!r} is an LMDB: pip install 'unidad_pl[lmdb]' to read it") from error
        check_lmdb(folder / "data.mdb")
        with reading(folder, "LMDB"):
            with self._open() as env, env.begin(buffers=True) as records:
                self._sizes = {bytes(key).decode("utf-8", "replace"): len(value) for key, value in records.cursor()}
            shape = self._record("images_shape").decode("ascii", "replace")
            if not re.fullmatch(r"[0-9]+ [13] [0-9]+ [0-9]+", shape):
                raise ValueError(f"images_shape must be like '10 3 256 256', got {shape[:100]!r}")
            count, *self._shape = map(int, shape.split())
            if not count:
                raise FileNotFoundError(f"LMDB {str(folder)!r} holds no image: images_shape is {shape!r}")
            self._number = "%d" if "images_0_data" in self._sizes else "%06d"
            if count > len(self._sizes):
                raise ValueError(f"images_shape {shape!r} means {count} images, but it has {len(self._sizes)} records")
            self.names = [f"images_{self._number % i}_data" for i in range(count)]
            wanted = math.prod(self._shape)
            for name in self.names:
                if (size := self._size(name)) != wanted or not wanted:
                    raise ValueError(f"{name} has {size} bytes, images_shape {shape!r} means {wanted}")
            if f"labels_{self._number % 0}_data" in self._sizes:
                self.labels = [self._label(i) for i in range(count)]

    def _open(self) -> Any:
        import lmdb

        return lmdb.open(str(self.folder), readonly=True, lock=False, create=False)

    def _size(self, key: str) -> int:
        if key not in self._sizes:
            raise ValueError(f"it has no record {key!r}, only {', '.join(list(self._sizes)[:5])}")
        return self._sizes[key]

    def _record(self, key: str) -> bytes:
        self._size(key)
        with self._open() as env, env.begin() as records:
            return bytes(records.get(key.encode()))

    def _label(self, index: int) -> int:
        value = self._record(f"labels_{self._number % index}_data")
        if len(value) != 8:
            raise ValueError(f"label {index} must be 8 bytes (int64), got {len(value)}")
        return int.from_bytes(value, "little", signed=True)

    def read(self, index: int, resolution: int) -> Tensor:
        from PIL import Image

        with reading(f"{self.folder}/{self.names[index]}", "picture"):
            pixels = np.frombuffer(self._record(self.names[index]), np.uint8).reshape(self._shape)
        pixels = pixels.repeat(3 // len(pixels), 0).transpose(1, 2, 0)
        return square(Image.fromarray(np.ascontiguousarray(pixels)), resolution)


def check_lmdb(data: Path) -> None:
    """Refuse an LMDB file that the library could not survive: it is mapped into memory and trusted.

    Raises:
        BrokenFile: it is cut short, or damaged so that reading it ends a process; names it and why.
    """
    size = check_regular(data, "LMDB")
    with reading(data, "LMDB"):
        with data.open("rb") as file:
            first = file.read(152)
            page = struct.unpack_from("<I", first, 40)[0]  # page size: of the first of two headers, a page each
            if page not in [2**power for power in range(8, 17)]:
                raise ValueError("it does not begin as one")
            file.seek(page)
            headers = [first, file.read(152)]
        if any(struct.unpack_from("<I", header, 16)[0] != 0xBEEFC0DE for header in headers):
            raise ValueError("it does not begin as one")
        newest = max(headers, key=lambda header: struct.unpack_from("<Q", header, 144)[0])  # by transaction
        needed = (struct.unpack_from("<Q", newest, 136)[0] + 1) * page  # by its last page
        if size < needed:
            raise ValueError(f"cut short, it has {size} of {needed} bytes")
        try:
            tried = subprocess.run(
                [sys.executable, "-c", PROBE, str(data.parent)], capture_output=True, check=False, timeout=PROBE_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"reading it does not end in {PROBE_SECONDS} s") from error
        if tried.returncode not in (0, 1):  # 1: an error of the library, which follows here
            raise ValueError(f"damaged, reading it ends a process with {tried.returncode}")


class HuggingFaceImages(ImageSet):
    """A dataset with one image column: ``hf:NAME``, ``hf:NAME:SPLIT`` (``train`` by default), or saved to disk.

    >>> HuggingFaceImages("hf:")
    Traceback (most recent call last):
    ...
    ValueError: 'hf:' names no dataset: write hf:NAME or hf:NAME:SPLIT, e.g. hf:huggan/few-shot-cat
    """

    def __init__(self, name: str) -> None:
        repository, _, split = name.removeprefix(HUGGING_FACE).partition(":")
        if name.startswith(HUGGING_FACE) and not repository.strip():
            raise ValueError(f"{name!r} names no dataset: write hf:NAME or hf:NAME:SPLIT, e.g. hf:huggan/few-shot-cat")
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{name!r} is a Hugging Face dataset: pip install 'unidad_pl[hf]' to read it") from error
        self.name = name
        if name.startswith(HUGGING_FACE):
            with reading(name, "dataset", "check its name and the network, or save it to disk and give its folder"):
                rows: Any = datasets.load_dataset(str(expanded(repository)), split=split or "train")
        else:
            for file in Path(name).rglob("*"):
                if not file.is_dir():
                    check_regular(file, "part of a dataset")
            with reading(name, "dataset"):
                rows = datasets.load_from_disk(name)
        with reading(name, "dataset"):
            self._look_into(rows)

    def _look_into(self, rows: Any) -> None:
        import datasets

        if isinstance(rows, dict):
            if "train" not in rows:
                raise BrokenFile(
                    f"dataset {self.name!r} has the splits {', '.join(rows)} and no 'train': name a split's folder"
                )
            rows = rows["train"]
        rows.data.table.validate(full=True)  # Arrow trusts what it maps
        images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise BrokenFile(
                f"dataset {self.name!r} must have one image column, its columns are {dict(rows.features)}: save it so"
            )
        if not len(rows):
            raise FileNotFoundError(f"dataset {self.name!r} holds no image: it has no rows")
        classes = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(classes) == 1:
            self.labels = [-1 if label is None else int(label) for label in rows[classes[0]]]
        self.names = [f"{images[0]} {i}" for i in range(len(rows))]
        self._column = images[0]
        # As bytes, so that they are decoded as those of any other place, whatever the dataset says.
        self._rows = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False))

    def read(self, index: int, resolution: int) -> Tensor:
        shown = f"{self.name}/{self.names[index]}"
        with reading(shown, "picture"):
            row = self._rows[index][self._column]
            if not row or not (row.get("bytes") or row.get("path")):
                raise ValueError("the row has none")
        return load_image(row["bytes"] or row["path"], resolution, shown)
