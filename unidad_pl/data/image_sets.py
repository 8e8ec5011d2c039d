"""Where a set of pictures may lie: a folder, a zip, an LMDB of the authors' layouts, a dataset, the cartoon world."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from unidad_pl.cartoons.shots import SHOTS_START
from unidad_pl.cartoons.world import check_domain, render
from unidad_pl.checks import check_path
from unidad_pl.data.images import FORMATS, MAX_BYTES, WAY_OUT, ImageSet, load_image, readable
from unidad_pl.data.packed import HUGGING_FACE, HuggingFaceImages, LMDBImages
from unidad_pl.denoiser import to_uint8
from unidad_pl.files import expanded, reading

BUILTIN = "builtin:"
HELD_OUT = 1000
"""Renders of a built-in domain that serve as its reference."""


def open_images(root: str | Path) -> ImageSet:
    """The pictures at ``root``; nothing is decoded yet.

    Args:
        root: a folder, looked through with all folders in it; a zip file; an LMDB folder of the released code
            (``images_<i>_data``, ``images_shape``); ``hf:NAME`` or ``hf:NAME:SPLIT``, a dataset of the Hugging Face
            hub; a folder that ``datasets`` saved to disk; or ``builtin:DOMAIN[:N]``, the first N renders (1000; up to a
            million) of a domain of the cartoon world, which are never shots.

    Raises:
        FileNotFoundError: there is no such place, or no picture in it.
        ValueError: it cannot be read, or is of another layout.
        ImportError: the package that reads it is not installed; names the extra.
    """
    check_path(root=root)
    text = str(root)
    if text.startswith(HUGGING_FACE):
        return HuggingFaceImages(text)
    if text.startswith(BUILTIN):
        domain, _, count = text.removeprefix(BUILTIN).partition(":")
        if count and not (count.isdecimal() and len(count) < 20 and 0 < int(count) <= SHOTS_START):
            raise ValueError(
                f"{text[:40]!r}: the number of renders must be a whole number from 1 to {SHOTS_START}, where the shots "
                f"begin, got {count[:20]!r}"
            )
        return CartoonImages(domain, range(int(count or HELD_OUT)))
    place = expanded(root)
    if place.is_file():
        return ZipImages(place)
    if (place / "data.mdb").is_file():
        return LMDBImages(place)
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return HuggingFaceImages(str(place))
    return FolderImages(place)


TEXTS = (
    "", ".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".caption", ".html", ".log", ".xml", ".py",
    ".pt", ".npy", ".npz", ".safetensors", ".ini", ".db",
)  # fmt: skip
"""Endings of what lies beside pictures and nobody takes for one; whatever else is left out is said."""


def _sort_out(kind: str, place: object, inside: list[str], lost: dict[str, str]) -> list[str]:
    """The pictures among files; one warning names what is left out and why.

    Raises:
        FileNotFoundError: there is none.
    """
    seen = [(path, _ending(path)) for path in inside if not any(map(_is_hidden, path.split("/")))]
    found = [path for path, ending in seen if ending in readable()]
    others = [(path, ending) for path, ending in seen if ending not in readable()]
    left = {path: _reason(ending) for path, ending in others if ending not in TEXTS} | lost
    some = [f"{name} ({reason})" for name, reason in list(left.items())[:5]] + ["..."] * (len(left) > 5)
    if not found:
        some = some or [path for path, _ in seen[:5]]
        holds = f"it holds {', '.join(some)}" if some else "it is empty"
        raise FileNotFoundError(
            f"{kind} {str(place)!r} holds no image: {holds}. Put pictures there, or name another place; readable are "
            f"{', '.join(readable())}"
        )
    if left:
        rank_zero_warn(f"{kind} {str(place)!r}: {len(left)} left out beside {len(found)} pictures: {', '.join(some)}")
    return found


def _ending(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    return "" if ending == "." else ending


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part != "..")


def _reason(ending: str) -> str:
    if ending in FORMATS["HEIF"]:
        return "pip install 'unidad_pl[heif]' to read it"
    known = any(ending in endings for endings in FORMATS.values())
    return "this Pillow cannot read it: update it" if known else f"{ending} is no kind of picture that is read"


class FolderImages(ImageSet):
    """Image files in a folder and the folders in it, sorted by path; hidden ones are left out, links are followed.

    >>> from PIL import Image
    >>> Image.new("RGB", (8, 8)).save("only.png")
    >>> FolderImages(Path(".")).names
    ['only.png']
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"image folder {str(folder)!r} does not exist or is not a folder: put the images there, or "
                f"name another place (on the command line with --data.root, or --data.reference.root)"
            )
        self.folder = folder
        self.names = _sort_out("image folder", folder, *_walk(folder))

    def read(self, index: int, resolution: int) -> Tensor:
        return load_image(self.folder / self.names[index], resolution)


def _walk(root: Path) -> tuple[list[str], dict[str, str]]:
    """Files in ``root`` and the folders in it and linked from it, each folder once; and what is left out, and why.

    Paths are text: to sort fifty thousand of ``pathlib``'s takes seconds.
    """
    inside: list[str] = []
    lost: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()

    def told(error: OSError) -> None:
        lost[os.path.relpath(error.filename, root)] = str(error.strerror)

    links = [root]
    while links:  # links last, so that a picture goes by the name it has without them
        for place, folders, files in os.walk(links.pop(0), onerror=told):
            here, identity = PurePath(place).relative_to(root), os.stat(place)
            folders[:] = [] if (identity.st_dev, identity.st_ino) in seen else sorted(folders)
            if (identity.st_dev, identity.st_ino) in seen:
                continue
            seen.add((identity.st_dev, identity.st_ino))
            above = "" if here == PurePath() else f"{here.as_posix()}/"
            inside += [f"{above}{file}" for file in files]
            for name in folders:
                path = Path(place, name)
                if path.is_symlink() and root.resolve().is_relative_to(path.resolve()):
                    lost[str(here / name)] = "a link to a folder that this one lies in"
                elif path.is_symlink() and not name.startswith("."):
                    links.append(path)
    return sorted(inside, key=lambda path: path.split("/")), lost


class ZipImages(ImageSet):
    """Image files in a zip, at any depth, sorted by path; read without unpacking.

    >>> from PIL import Image
    >>> Image.new("RGB", (8, 8)).save("one.png")
    >>> with zipfile.ZipFile("shots.zip", "w") as made:
    ...     made.write("one.png")
    >>> ZipImages(Path("shots.zip")).names
    ['one.png']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        with reading(path, "zip of pictures"):
            opened = self._open()
            entries: dict[str, zipfile.ZipInfo] = {}
            for entry in sorted(opened.infolist(), key=lambda entry: entry.filename):
                name = PurePath(entry.filename).as_posix()
                if name in entries and not entry.is_dir():
                    raise ValueError(
                        f"two of its entries are {name!r}: pack it anew, each picture under a name of its own"
                    )
                if not entry.is_dir():
                    entries[name] = entry
        self._entries = [entries[name] for name in _sort_out("zip", path, list(entries), {})]
        self.names = [entry.filename for entry in self._entries]

    def _open(self) -> zipfile.ZipFile:
        """The zip, opened once in every process: threads may share it, but not what a fork copied."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def read(self, index: int, resolution: int) -> Tensor:
        shown, entry = f"{self.path}/{self.names[index]}", self._entries[index]
        with reading(shown, "picture", WAY_OUT):
            if entry.file_size > MAX_BYTES:
                raise ValueError(f"{entry.file_size} bytes when unpacked, at most {MAX_BYTES} are taken")
            content = self._open().read(entry)  # whole, so that its checksum is compared
        return load_image(content, resolution, shown)


class CartoonImages(ImageSet):
    """Renders of a domain of the embedded cartoon world.

        >>> CartoonImages("cats", range(2)).names
        ['cats[0]', 'cats[1]']

    Raises:
        ValueError: an unknown domain.
    """

    def __init__(self, domain: str, indices: Sequence[int]) -> None:
        check_domain(domain)
        self.domain, self.indices = domain, indices
        self.names = [f"{domain}[{i}]" for i in indices]

    def read(self, index: int, resolution: int) -> Tensor:
        return to_uint8(render(self.indices[index : index + 1], self.domain, resolution))[0]

    def load(self, resolution: int, indices: Iterable[int] | None = None) -> Tensor:
        wanted = self.indices if indices is None else [self.indices[i] for i in indices]
        parts = [wanted[i : i + 500] for i in range(0, len(wanted), 500)]  # to bound memory
        return torch.cat([to_uint8(render(part, self.domain, resolution)) for part in parts])
