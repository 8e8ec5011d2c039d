"""Which pictures of a place are the shots, and which are not."""

from __future__ import annotations

from itertools import islice

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from unidad_pl.data.images import Decoded, ImageSet, image_hash
from unidad_pl.seeds import mix_seed

SMALL = 100
"""Up to so many pictures of a place are all decoded and compared: copies are found and a broken one is an error, before
shots are chosen. Of a larger place only the shots are decoded, and the reference when it is asked for."""

CHUNK = 256
"""Pictures of a large place that are decoded at a time."""


def choose(
    place: ImageSet, shots: int | None, seed: int, resolution: int, root: str
) -> tuple[list[int], Tensor, list[int]]:
    """A random choice of pictures that differ from each other.

    Args:
        place: where they are; :class:`~unidad_pl.data.images.Decoded` if it is small.
        shots: how many; None: all that differ.
        seed: of the choice.
        resolution: at which they are compared.
        root: what errors call the place.

    Returns:
        Numbers of the shots, the shots [k, 3, resolution, resolution] uint8, numbers of the rest of their place.

    Raises:
        ValueError: fewer different pictures than shots, or one that cannot be decoded.
    """
    candidates = _different(place) if isinstance(place, Decoded) else list(range(len(place)))
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(mix_seed(seed, 1)))
    drawn = iter([candidates[i] for i in order.tolist()])
    found: dict[str, tuple[int, Tensor]] = {}
    while batch := list(islice(drawn, min(CHUNK, len(candidates) if shots is None else shots - len(found)))):
        for number, image in zip(batch, place.load(resolution, batch), strict=True):
            same, _ = found.setdefault(image_hash(image), (number, image))
            if same != number:
                _warn_of_copy(place, number, same)
    if len(found) < (shots or 1):
        copies = f" ({len(place)} with copies)" if len(place) > len(found) else ""
        images = f"{len(found)} image{'' if len(found) == 1 else 's'}{copies}"
        fewer = f"{len(found)} or less" if len(found) > 1 else str(len(found))
        raise ValueError(
            f"{root!r} holds {images}, but shots={shots} were asked for: add images or set shots (--data.shots) to "
            f"{fewer}"
        )
    chosen = dict(sorted(found.values(), key=lambda one: one[0]))
    return list(chosen), torch.stack(list(chosen.values())), sorted(set(candidates) - set(chosen))


def _different(place: Decoded) -> list[int]:
    """Numbers of the pictures without copies of an earlier one."""
    first: dict[str, int] = {}
    for number, image in enumerate(place.images):
        same = first.setdefault(image_hash(image), number)
        if same != number:
            _warn_of_copy(place, number, same)
    return sorted(first.values())


def _warn_of_copy(place: ImageSet, number: int, same: int) -> None:
    rank_zero_warn(f"{place.names[number]} is the same picture as {place.names[same]}: used once")


def are_among(shots: Tensor, images: Tensor) -> Tensor:
    """[N] bool: which of ``images`` [N, C, H, W] are one of ``shots`` [k, C, H, W], pixel for pixel."""
    known = {image_hash(shot) for shot in shots}
    return torch.tensor([image_hash(image) in known for image in images])
