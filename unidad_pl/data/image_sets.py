"""Where a set of pictures may lie: a folder, a zip, an LMDB of the authors' layouts, a dataset, the cartoon world."""

from __future__ import annotations

import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidad_pl.cartoons.world import check_domain, render
from unidad_pl.data.images import EXTENSIONS, as_shown, load_image, square
from unidad_pl.denoiser import to_uint8

HUGGING_FACE, BUILTIN = "hf:", "builtin:"
HELD_OUT = 1000
"""Renders of a built-in domain that serve as its reference."""


class ImageSet(ABC):
    """Pictures in a fixed order.

    Attributes:
        names: a name for each, for messages.
        labels: their class numbers, or None where the place has none.
    """

    names: list[str]
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int, resolution: int) -> Tensor:
        """Picture ``index``, [3, resolution, resolution] uint8.

        Raises:
            ValueError: it cannot be decoded; names it.
        """

    def load(self, resolution: int) -> Tensor:
        """All of them: [N, 3, resolution, resolution] uint8.

        Raises:
            ValueError: see :meth:`read`.
        """
        return torch.stack([self.read(i, resolution) for i in range(len(self))])


def open_images(root: str | Path) -> ImageSet:
    """The pictures at ``root``; nothing is decoded yet.

    Args:
        root: a folder, looked through with all folders in it; a zip file; an LMDB folder of the released code
            (``images_<i>_data``, ``images_shape``); ``hf:NAME`` or ``hf:NAME:SPLIT``, a dataset of the Hugging Face
            hub; a folder that ``datasets`` saved to disk; or ``builtin:DOMAIN[:N]``, the first N renders (1000) of a
            domain of the cartoon world, which are never shots.

    Raises:
        FileNotFoundError: there is no such place, or no picture in it.
        ValueError: it cannot be read, or is of another layout.
        ImportError: the package that reads it is not installed; names the extra.
    """
    text = str(root)
    if text.startswith(HUGGING_FACE):
        return HuggingFaceImages(text)
    if text.startswith(BUILTIN):
        domain, _, count = text.removeprefix(BUILTIN).partition(":")
        if count and not (count.isdecimal() and int(count)):
            raise ValueError(f"{text!r}: the number of renders must be a whole number above 0, got {count!r}")
        return CartoonImages(domain, range(int(count or HELD_OUT)))
    place = Path(root).expanduser()
    if place.is_file():
        return ZipImages(place)
    if (place / "data.mdb").is_file():
        return LMDBImages(place)
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return HuggingFaceImages(text)
    return FolderImages(place)


def _is_picture(path: PurePath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in EXTENSIONS


def _nothing(kind: str, place: object, seen: list[str]) -> FileNotFoundError:
    inside = f"it holds {', '.join(seen[:5])}" if seen else "it is empty"
    return FileNotFoundError(f"{kind} {str(place)!r} holds no image ({', '.join(EXTENSIONS)}); {inside}")


class FolderImages(ImageSet):
    """Image files in a folder and the folders in it, sorted by path; hidden ones are left out."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"image folder {str(folder)!r} does not exist or is not a folder: put the images there, or name "
                f"another place with --data.root (or --data.reference.root)"
            )
        self.folder = folder
        inside = sorted(p.relative_to(folder) for p in folder.rglob("*"))
        self.names = [p.as_posix() for p in inside if _is_picture(p) and not (folder / p).is_dir()]
        if not self.names:
            raise _nothing("image folder", folder, [str(p) for p in inside])

    def read(self, index: int, resolution: int) -> Tensor:
        return load_image(self.folder / self.names[index], resolution)


class ZipImages(ImageSet):
    """Image files in a zip, at any depth, sorted by path; read without unpacking."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as opened:
                inside = sorted(opened.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{str(path)!r} is a file, but no zip of images that can be read: {error}") from error
        self.names = [name for name in inside if _is_picture(PurePath(name)) and not name.endswith("/")]
        if not self.names:
            raise _nothing("zip", path, inside)

    def read(self, index: int, resolution: int) -> Tensor:
        shown = f"{self.path}/{self.names[index]}"
        try:  # opened anew each time: an open zip cannot be shared with worker processes
            with zipfile.ZipFile(self.path) as opened, opened.open(self.names[index]) as entry:
                return load_image(entry, resolution, shown)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # broken, packed strangely, encrypted
            raise ValueError(f"cannot read image {shown!r}: {error}") from error


class LMDBImages(ImageSet):
    """The released code's LMDB: raw CHW bytes ``images_<i>_data``, the shape of all as text, labels.

    Numbers are plain (few-shot sets) or have six digits (subjects).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(f"{str(folder)!r} is an LMDB: pip install 'unidad_pl[lmdb]' to read it") from error
        try:
            with lmdb.open(str(folder), readonly=True, lock=False, create=False) as env, env.begin() as records:
                self._records = {bytes(key).decode("utf-8", "replace"): bytes(value) for key, value in records.cursor()}
        except lmdb.Error as error:
            raise ValueError(f"LMDB {str(folder)!r} cannot be read: {error}") from error
        shape = self._record("images_shape").decode("ascii", "replace")
        if not re.fullmatch(r"\d+ [13] \d+ \d+", shape):
            raise ValueError(f"LMDB {str(folder)!r}: images_shape must be like '10 3 256 256', got {shape!r}")
        count, *self._shape = map(int, shape.split())
        self._number = "%d" if "images_0_data" in self._records else "%06d"
        self.names = [f"images_{self._number % i}_data" for i in range(count)]
        if not count:
            raise FileNotFoundError(f"LMDB {str(folder)!r} holds no image: images_shape is {shape!r}")
        wanted = np.prod(self._shape)
        for name in self.names:
            if (size := len(self._record(name))) != wanted:
                seen = f"{name} has {size} bytes"
                raise ValueError(f"LMDB {str(folder)!r}: {seen}, images_shape {shape!r} means {wanted}")
        if f"labels_{self._number % 0}_data" in self._records:
            self.labels = [self._label(i) for i in range(count)]

    def _record(self, key: str) -> bytes:
        if key not in self._records:
            some = ", ".join(list(self._records)[:5])
            raise ValueError(f"LMDB {str(self.folder)!r} has no record {key!r}, only {some}")
        return self._records[key]

    def _label(self, index: int) -> int:
        value = self._record(f"labels_{self._number % index}_data")
        if len(value) != 8:
            raise ValueError(f"LMDB {str(self.folder)!r}: label {index} must be 8 bytes (int64), got {len(value)}")
        return int.from_bytes(value, "little", signed=True)

    def read(self, index: int, resolution: int) -> Tensor:
        from PIL import Image

        pixels = np.frombuffer(self._record(self.names[index]), np.uint8).reshape(self._shape)
        pixels = pixels.repeat(3 // len(pixels), 0).transpose(1, 2, 0)
        return square(Image.fromarray(np.ascontiguousarray(pixels)), resolution)


class HuggingFaceImages(ImageSet):
    """A dataset with one image column: ``hf:NAME``, ``hf:NAME:SPLIT`` (``train`` by default), or saved to disk."""

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{name!r} is a Hugging Face dataset: pip install 'unidad_pl[hf]' to read it") from error
        self.name = name
        try:
            if name.startswith(HUGGING_FACE):
                repository, _, split = name.removeprefix(HUGGING_FACE).partition(":")
                rows: Any = datasets.load_dataset(repository, split=split or "train")
            else:
                rows = datasets.load_from_disk(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"dataset {name!r} cannot be loaded: {error}") from error
        if isinstance(rows, dict):
            if "train" not in rows:
                splits = ", ".join(rows)
                raise ValueError(f"dataset {name!r} has the splits {splits} and no 'train': name a split's folder")
            rows = rows["train"]
        images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if len(images) != 1:
            raise ValueError(f"dataset {name!r} must have one image column, its columns are {dict(rows.features)}")
        if not len(rows):
            raise FileNotFoundError(f"dataset {name!r} holds no image: it has no rows")
        classes = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(classes) == 1:
            self.labels = [int(label) for label in rows[classes[0]]]
        self.names = [f"{images[0]} {i}" for i in range(len(rows))]
        self._rows, self._column = rows, images[0]

    def read(self, index: int, resolution: int) -> Tensor:
        try:
            return square(as_shown(self._rows[index][self._column]), resolution)
        except (OSError, ValueError, SyntaxError, AttributeError) as error:
            raise ValueError(f"cannot read image {self.names[index]!r} of dataset {self.name!r}: {error}") from error


class CartoonImages(ImageSet):
    """Renders of a domain of the embedded cartoon world.

    Raises:
        ValueError: an unknown domain.
    """

    def __init__(self, domain: str, indices: Sequence[int]) -> None:
        check_domain(domain)
        self.domain, self.indices = domain, indices
        self.names = [f"{domain}[{i}]" for i in indices]

    def read(self, index: int, resolution: int) -> Tensor:
        return to_uint8(render(self.indices[index : index + 1], self.domain, resolution))[0]

    def load(self, resolution: int) -> Tensor:
        parts = [self.indices[i : i + 500] for i in range(0, len(self.indices), 500)]  # to bound memory
        return torch.cat([to_uint8(render(part, self.domain, resolution)) for part in parts])
