"""The pictures of a run, small enough to stand in a page: samples over training, shots and their clusters."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from unidad_pl.callbacks.cluster_pictures import DIFFERENT, NEAREST
from unidad_pl.files import BrokenFile, reading
from unidad_pl.report.folder import Run

SMALL = 2**16  # pixels up to which a picture is kept as it is
SIDES = (1024, 512, 256)
LARGEST_PIXELS = 2**26
MOST_FRAMES, MOST_IN_FRAME, MOST_CLUSTERS = 30, 8, 24
STEP = re.compile(r"(?P<stage>.+)_step(?P<step>\d{1,12})$")
ORDER = {"student": 0, "target_teacher": 1, "source_teacher": 2}


@dataclass
class Frame:
    """What is shown at one position of a slider.

    >>> Frame("val", 675, {"student": "data:..."}).title
    'iteration 675'
    """

    stage: str
    step: int
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the slider says there."""
        return f"iteration {self.step}" + ("" if self.stage == "val" else f", {self.stage}")


@dataclass
class Tile:
    """A sample beside a shot.

    Attributes:
        picture: as a data URI.
        seed: of the sample.
        distance: from the shot.
        memorised: whether that is below the threshold.
    """

    picture: str
    seed: int
    distance: float
    memorised: bool


@dataclass
class Cluster:
    """A shot, and samples of those it is the nearest shot of."""

    shot: str
    size: int
    spread: float | None
    nearest: list[Tile]
    different: list[Tile]


@dataclass
class Pictures:
    """All pictures of a run.

    Attributes:
        networks: the same seeds drawn by several networks.
        samples: grids of samples, shots above the line.
        clusters: of the latest evaluation.
        evaluation: its record.
        missing: what is not there; a sentence each.
    """

    networks: list[Frame] = field(default_factory=list)
    samples: list[Frame] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_pictures(run: Run, budget: int) -> Pictures:
    """The pictures of a run in about ``budget`` characters; of many evaluations some are left out."""
    found = Pictures()
    found.networks = _frames(run.folder / "samples" / "networks", budget // 2, found)
    if not found.networks:
        found.missing.append(
            "there are no samples of the teachers: the callback TeacherGrid draws them beside the student's"
        )
    found.samples = _frames(run.folder / "samples", budget // 4 if found.networks else budget * 3 // 4, found)
    if not found.samples:
        found.missing.append("there are no pictures samples/*.png: the callback SampleGrid draws them")
    shown = [
        one for one in run.records if isinstance(one.get("picture"), str) and isinstance(one.get("clusters"), list)
    ]
    if not shown:
        found.missing.append(
            "neither shots nor their clusters are shown: the callback IntraLPIPS draws them with its option pictures: 3"
        )
        return found
    found.evaluation = shown[-1]
    if len(shown[-1]["clusters"]) > MOST_CLUSTERS:
        found.missing.append(f"only the first {MOST_CLUSTERS} of {len(shown[-1]['clusters'])} shots and their clusters "
                             f"are shown, to keep the page small")  # fmt: skip
    try:
        found.clusters = _clusters(run.folder, shown[-1])
    except (BrokenFile, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else "its record is not as IntraLPIPS writes it, "
        found.missing.append(f"the pictures of the clusters cannot be shown: {kind}{error}")
    return found


def open_png(path: Path) -> Any:
    """A PNG, as RGB.

    Raises:
        OSError, BrokenFile: it is none, or is damaged.
        ValueError: it is larger than a page can show.
    """
    from PIL import Image

    with reading(path, "PNG", "delete it, or copy it again"):
        picture = Image.open(path, formats=["PNG"])
        if picture.width * picture.height > LARGEST_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height} pixels are too many")
        return picture.convert("RGB")


def data_uri(picture: Any, side: int = SIDES[0]) -> str:
    """A PIL image as the value of ``src``: WebP, exact if it is small, else no larger than ``side``."""
    file = BytesIO()
    small = picture.width * picture.height <= SMALL
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    picture.save(file, "WEBP", lossless=small, quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _frames(folder: Path, budget: int, found: Pictures) -> list[Frame]:
    """One frame for each evaluation in ``folder``: a PNG, or a folder of them."""
    places: dict[tuple[int, str], list[Path]] = {}
    for path in sorted(folder.glob("*_step*")):
        if named := STEP.match(path.stem if path.is_file() else path.name):
            inner = sorted(path.glob("*.png"), key=lambda one: (ORDER.get(one.stem, len(ORDER)), one.name))
            places[int(named["step"]), named["stage"]] = inner[:MOST_IN_FRAME] if path.is_dir() else [path]
            if path.is_dir() and not 0 < len(inner) <= MOST_IN_FRAME:
                found.missing.append(f"{folder.name}/{path.name} has {len(inner)} pictures, of which "
                                     f"{min(len(inner), MOST_IN_FRAME)} are shown")  # fmt: skip
    evaluations = _evenly(sorted(places), MOST_FRAMES)
    for side in SIDES:
        frames = list(_encoded(evaluations, places, side, found))
        size = sum(len(one) for frame in frames for one in frame.pictures.values())
        if size * 2 <= budget * len(frames) or side == SIDES[-1]:  # at least two fit
            break
    fitting = len(frames) if size <= budget else max(1, budget * len(frames) // size)
    if fitting < len(frames) or len(evaluations) < len(places):  # pictures that are damaged are told one by one
        found.missing.append(f"only {fitting} of the {len(places)} evaluations in {folder.name}/ are shown, to keep "
                             f"the page small")  # fmt: skip
    return _evenly(frames, fitting)


def _encoded(
    evaluations: list[tuple[int, str]], places: dict[tuple[int, str], list[Path]], side: int, found: Pictures
) -> Iterable[Frame]:
    for step, stage in evaluations:
        frame = Frame(stage, step)
        for path in places[step, stage]:
            label = path.stem if len(places[step, stage]) > 1 or path.parent.name != "samples" else "samples"
            try:
                frame.pictures[label] = data_uri(open_png(path), side)
            except (BrokenFile, OSError, ValueError) as error:
                if (message := f"a picture cannot be shown: {error}") not in found.missing:
                    found.missing.append(message)
        if frame.pictures:
            yield frame


def _evenly(items: list[Any], most: int) -> list[Any]:
    """Some of them, the first and the last always.

    >>> _evenly([0, 1, 2, 3, 4], 3)
    [0, 2, 4]
    """
    if len(items) <= most:
        return items
    return [items[-1]] if most == 1 else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _clusters(folder: Path, record: dict[str, Any]) -> list[Cluster]:
    """Cut the picture that a record names into its tiles.

    Raises:
        ValueError: it does not lie in the run folder, or record and picture do not fit.
        KeyError, IndexError, TypeError: the record lacks something.
    """
    path = (folder / record["picture"]).resolve()
    if folder.resolve() not in path.parents:
        raise ValueError(f"{record['picture']!r} does not lie in the run folder")
    height, width = (int(size) for size in record["resolution"])
    picture = open_png(path)
    listed, columns = record["clusters"], picture.width // max(1, width)
    if (picture.width, picture.height) != (columns * width, len(listed) * height) or not columns % 2:
        raise ValueError(f"{record['picture']!r} is {picture.width}x{picture.height}, which its record does not fit")

    def tile(row: int, column: int) -> str:
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        return data_uri(picture.crop(box), 96)

    def tiles(row: int, kind: str, start: int) -> list[Tile]:
        threshold = float(record.get("threshold", 0))
        pairs = [(int(seed), float(distance)) for seed, distance in listed[row][kind]][: columns // 2]
        return [Tile(tile(row, start + i), *pair, pair[1] < threshold) for i, pair in enumerate(pairs)]

    sizes, means = record["cluster_sizes"], record["cluster_means"]
    return [
        Cluster(tile(row, 0), int(sizes[row]), means[row] and float(means[row]), tiles(row, NEAREST, 1),
                tiles(row, DIFFERENT, 1 + columns // 2))
        for row in range(len(listed[:MOST_CLUSTERS]))
    ]  # fmt: skip
