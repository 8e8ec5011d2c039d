"""Files as they are found: cut short, with flipped bits, other files in their place, and numbers no network has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

HTML = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 335304388\n"
OTHER_JSON = (b"[]", b"3", b"null", b'"text"', b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"{'a': 1}", b"\xff\xfe{}")
VALUES: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), -1, 0, 10**12, 1e30, "os.system", "", None, True, [], {}, [[[]]],
    [10**9], ["os", "system"], -(10**400),
)  # fmt: skip


def whole_files(data: bytes, seed: int, flips: int = 4) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged file)."""
    draw = random.Random(seed)
    yield from (("empty", b""), ("HTML", HTML), ("LFS pointer", POINTER), ("noise", draw.randbytes(300)))
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        yield f"cut at {share}", data[: max(1, int(len(data) * share))]
    for i in range(flips):
        flipped = bytearray(data)
        for place in draw.sample(range(len(data)), min(len(data), 1 + i)):
            flipped[place] ^= 1 << draw.randrange(8)
        yield f"flips {i}", bytes(flipped)


def json_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Other JSON, entries left out, and each entry with values of other kinds and sizes."""
    for other in OTHER_JSON:
        yield f"JSON {other[:6]!r}", other
    entries = json.loads(data)
    for name in entries:
        yield f"without {name}", json.dumps({key: value for key, value in entries.items() if key != name}).encode()
        for value in VALUES:
            yield f"{name}: {str(value)[:12]}", json.dumps(entries | {name: value}).encode()
        if isinstance(entries[name], list):
            for value in VALUES:
                changed = [value, *entries[name][1:]]
                yield f"{name}[0]: {str(value)[:12]}", json.dumps(entries | {name: changed}).encode()


def tensor_files(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Safetensors with other numbers, types, shapes and names."""
    state = load(data)
    name = random.Random(seed).choice(sorted(state))
    value = state[name]
    broken = value.clone().flatten()
    for number in (float("nan"), float("inf"), -float("inf")):
        broken[0] = number
        yield f"{name} with {number}", save(state | {name: broken.view_as(value).clone()})
    yield "integers", save(state | {name: value.int()})
    yield "another shape", save(state | {name: torch.zeros(*value.shape, 2)})
    yield "another name", save({f"x.{key}": tensor for key, tensor in state.items()})
    yield "one missing", save({key: tensor for key, tensor in state.items() if key != name})
    yield "one more", save(state | {"more": value.clone()})
    yield "none", save({})
    for size in (2**63, 2**31, len(data)):
        yield f"header of {size}", size.to_bytes(8, "little") + data[8:]
    head = int.from_bytes(data[:8], "little")
    yield "no JSON in it", data[:8] + b"{" * head + data[8 + head :]


def outcome(build: Callable[[], Any], file: Path) -> str:
    """``works``, ``refused`` (one sentence that names the file or its folder), or what is wrong with the answer."""
    try:
        build()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        named = any(part in text for part in (str(file), str(file.parent), f"{file.parent.name}/{file.name}"))
        bad = [word for word in ("weights_only", "Traceback", "WeightsUnpickler") if word in text]
        return "refused" if named and not bad and len(text.splitlines()) == 1 and len(text) < 900 else f"text: {text}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "works"
