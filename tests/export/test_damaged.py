"""Exports with a damaged file: one sentence that names it, or a student; quickly, and never another kind of error."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.made import export, pixel_student, text_student
from unidad_pl.export import load_export
from unidad_pl.files import BrokenFile

QUICK = 20.0  # seconds; what is not refused early takes hours, or all memory
VALUES = [None, -1, 0, 2.5, 10**7, 10**30, "x", [10**9], {}, float("nan"), float("inf")]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(pixel_student(), tmp_path_factory.mktemp("pixel") / "out")


@pytest.fixture(scope="module")
def good_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    return export(text_student(place), place / "out")


def attempt(folder: Path, name: str, data: bytes) -> str | None:
    """What the export says with ``data`` in the place of a file; None: it loads."""
    path, began = folder / name, time.monotonic()
    before = path.read_bytes()
    path.write_bytes(data)
    said = None
    try:
        load_export(folder)
    except (ValueError, OSError) as error:
        said = str(error)
    finally:
        path.write_bytes(before)
    assert time.monotonic() - began < QUICK, data[:100]
    assert said is None or "\n" not in said
    return said


def cut_or_changed(data: bytes) -> Iterator[bytes]:
    yield from (b"", PAGE, POINTER, bytes(len(data)), b"\xff\xfe" + data)
    yield from (data[: len(data) * i // 4] for i in range(1, 4))
    yield data[:-1]


FILES = ["model_index.json", "unet/config.json", "unet/denoiser.json", "scheduler/scheduler_config.json"]
OTHER_JSON = [b"null", b"[]", b"3", b"NaN", b"[" * 10_000, b'{"a":' * 10_000, b"9" * 5000, b"{} {}"]


@pytest.mark.parametrize("name", [*FILES, "unet/diffusion_pytorch_model.safetensors"])
def test_cut_replaced_and_other_content(name: str, good: Path) -> None:
    data = (good / name).read_bytes()
    for damaged in (*cut_or_changed(data), *(OTHER_JSON if name.endswith("json") else ())):
        said = attempt(good, name, damaged)
        if damaged != data[:-1] or not name.endswith("json"):  # the last byte of those is an end of line
            assert said is not None, damaged[:50]
            assert Path(name).name in said


@pytest.mark.parametrize("name", FILES[:3])
def test_any_other_value_of_any_entry(name: str, good: Path) -> None:
    content, refused = json.loads((good / name).read_text()), 0
    for number, entry in enumerate(content):
        said = attempt(good, name, json.dumps(content | {entry: VALUES[number * 3 % len(VALUES)]}).encode())
        refused += said is not None
        assert said is None or "out" in said
    assert refused > len(content) / 3


ABSURD: dict[str, list[Any]] = {
    "layers_per_block": [10**7, 900, -1, [10**9, 1], 1e9],
    "block_out_channels": [[10**7, 16], [8] * 10_000, [0, 0], [-8, 16]],
    "in_channels": [10**9], "out_channels": [10**12, 4 * 10**6], "num_class_embeds": [10**9, 10**18],
    "sample_size": [10**7, 0, -4, 2.5, [4, 10**7], "4"], "norm_num_groups": [0, 10**9], "downsample_padding": [10**9],
    "attention_head_dim": [-1], "down_block_types": [["DownBlock2D"] * 5000],
}  # fmt: skip


@pytest.mark.parametrize("entry", ABSURD)
def test_absurd_architectures_are_refused_before_they_are_built(entry: str, good: Path) -> None:
    content = json.loads((good / "unet" / "config.json").read_text())
    for value in ABSURD[entry]:
        began = time.process_time()
        said = attempt(good, "unet/config.json", json.dumps(content | {entry: value}).encode())
        assert said is not None, value
        assert "unet" in said
        assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("unet/denoiser.json", "train_timesteps", 10**12), ("unet/denoiser.json", "patch_size", 10**9),
        ("unet/denoiser.json", "patch_size", -1), ("unet/denoiser.json", "sigma_data", float("nan")),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12), ("model_index.json", "sigmas", [1, 2]),
        ("model_index.json", "sigmas", [1e400, 1]), ("model_index.json", "sigmas", [80.0] * 10**5),
        ("model_index.json", "sigmas", [80.0, None]), ("model_index.json", "sigmas", [True]),
        ("model_index.json", "sigma_min", 1e9), ("model_index.json", "iteration", -1),
        ("model_index.json", "classes", [1]), ("model_index.json", "spec", {"prediction": "epsilon"}),
        ("model_index.json", "weights", "best"),
    ],
)  # fmt: skip
def test_settings_no_student_has_are_refused(name: str, entry: str, value: Any, good: Path) -> None:
    content = json.loads((good / name).read_text()) | {entry: value}
    said = attempt(good, name, json.dumps(content).encode())
    assert said is not None
    assert "out/" in said


def test_weights_that_do_not_fit_or_are_not_finite(good: Path, tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    whole = load_file(good / name)
    for change, message in (
        ({"conv_in.bias": torch.tensor([float("nan")] * 8)}, r"conv_in\.bias"),
        ({"conv_in.bias": torch.full((8,), float("-inf"))}, r"conv_in\.bias"),
        ({"conv_in.bias": torch.zeros(9)}, "unet"), ({"more": torch.zeros(1)}, "more"),
    ):  # fmt: skip
        save_file(whole | change, tmp_path / "changed")
        said = attempt(good, name, (tmp_path / "changed").read_bytes())
        assert said is not None
        assert message.replace("\\", "") in said
    del whole["conv_in.bias"]
    save_file(whole, tmp_path / "less")
    assert "conv_in.bias" in str(attempt(good, name, (tmp_path / "less").read_bytes()))
    header = (2**60).to_bytes(8, "little") + (good / name).read_bytes()[8:]
    assert name in str(attempt(good, name, header))


TEXT_DAMAGES: list[tuple[str, str | None, Any]] = [
    ("unidad.json", None, b"[" * 10_000), ("unidad.json", "resolution", 10**9), ("unidad.json", "token", 3),
    ("model_index.json", "_class_name", ["os", "system"]), ("model_index.json", "vae", 3),
    ("unet/config.json", "layers_per_block", 10**9), ("unet/config.json", "transformer_layers_per_block", 10**9),
    ("vae/config.json", "layers_per_block", 10**7), ("vae/config.json", "scaling_factor", "x"),
    ("vae/diffusion_pytorch_model.safetensors", None, POINTER), ("text_encoder/model.safetensors", None, PAGE),
    ("text_encoder/config.json", "num_hidden_layers", 10**7), ("text_encoder/config.json", "vocab_size", 10**12),
    ("tokenizer/tokenizer_config.json", "model_max_length", 10**7),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
]  # fmt: skip


def test_every_part_of_a_text_export(good_text: Path) -> None:
    for name, entry, value in TEXT_DAMAGES:
        changed = {} if entry is None else json.loads((good_text / name).read_text()) | {entry: value}
        said = attempt(good_text, name, value if entry is None else json.dumps(changed).encode())
        assert said is not None, (name, entry)
        assert name.split("/")[0] in said or name.split("/")[-1] in said, (name, said)


def test_a_missing_file_and_a_folder_that_is_none(good: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "out"))
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"):
        (copy / name).unlink()
        with pytest.raises((OSError, ValueError), match=name.split("/")[-1]):
            load_export(copy)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_export(tmp_path / "nowhere")
    assert issubclass(BrokenFile, ValueError)
