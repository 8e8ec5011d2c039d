"""Checkpoint files: whole or not there, verified, read without running anything."""

from __future__ import annotations

import os
import pickle
import resource
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.worlds import fit
from unidad_pl.runs.checkpoints import (
    ABANDONED,
    DamagedCheckpoint,
    DurableCheckpointIO,
    newest_intact,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)

CONTENT = {"weights": torch.arange(3000.0), "step": 7, "name": "x"}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A stand-in: no file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_checkpoint(CONTENT, tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def test_other_tools_read_it(saved: Path) -> None:
    for mmap in (False, True):
        content = torch.load(saved, weights_only=True, mmap=mmap)
        assert torch.equal(content["weights"], CONTENT["weights"])
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
    assert os.listdir(saved.parent) == ["one.ckpt"]
    assert read_checkpoint(saved)["step"] == 7


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    places = [*range(0, len(whole), 97), *range(len(whole) - 120, len(whole))]
    for place in places:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r"one\.ckpt"):
            verify_checkpoint(saved)


def test_every_truncation_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in [0, 1, 30, *range(100, len(whole), 501), *range(len(whole) - 110, len(whole))]:
        saved.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint):
            verify_checkpoint(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(DamagedCheckpoint):
        verify_checkpoint(saved)


def test_files_of_plain_torch_are_verified_by_their_zip(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save(CONTENT, path)
    assert read_checkpoint(path)["step"] == 7
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(path)


def test_the_error_names_the_newest_intact_one(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "run" / f"step={number}.ckpt"
        write_checkpoint(CONTENT, path)
        if number >= 2:
            os.truncate(path, 1000 * number)
        os.utime(path, (number, number))
    with pytest.raises(DamagedCheckpoint, match=r"step=3\.ckpt' is damaged.*newest intact.*step=1\.ckpt"):
        DurableCheckpointIO().load_checkpoint(tmp_path / "run" / "step=3.ckpt")
    newest, passed_over = newest_intact(tmp_path)
    assert newest is not None
    assert newest.name == "step=1.ckpt"
    assert [path.name for path in passed_over] == ["step=3.ckpt", "step=2.ckpt"]
    assert newest_intact(tmp_path / "nowhere") == (None, {})


@pytest.mark.parametrize("room", [0, 1000, 12000], ids=["nothing", "header", "nearly all"])
def test_a_full_disk_leaves_the_file_before(saved: Path, room: int) -> None:
    before = saved.read_bytes()
    with full_disk(room), pytest.raises(OSError, match=r"cannot write.*MiB are free.*untouched.*one\.ckpt"):
        write_checkpoint({**CONTENT, "step": 8}, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["one.ckpt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write.*file/below/x\.ckpt"):
        write_checkpoint(CONTENT, tmp_path / "file" / "below" / "x.ckpt")


def test_what_cannot_be_pickled_leaves_nothing(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        write_checkpoint({"code": lambda: 1}, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["one.ckpt"]


def test_leftovers_of_killed_runs_go(saved: Path) -> None:
    old, young = (saved.with_name(f".one.ckpt.{name}.part") for name in ("0000dead", "0000beef"))
    old.touch()
    young.touch()
    long_ago = time.time() - ABANDONED - 10
    os.utime(old, (long_ago, long_ago))
    write_checkpoint(CONTENT, saved)
    assert not old.exists()
    assert young.exists()  # another process may be writing it


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Code()}, "zip.ckpt")
    write_checkpoint({"state_dict": {}, "x": Code()}, Path("signed.ckpt"))
    Path("raw.ckpt").write_bytes(pickle.dumps(Code()))
    for name in ("zip.ckpt", "signed.ckpt", "raw.ckpt"):
        with pytest.raises(ValueError, match=name):
            read_checkpoint(name)
        with pytest.raises(ValueError, match="weights_only=False would run code"):
            DurableCheckpointIO().load_checkpoint(name, weights_only=False)
    assert not Path("it_ran").exists()


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.w(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_in_a_plain_trainer(tmp_path: Path) -> None:
    path, numbers = tmp_path / "two.ckpt", torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)
    fit(Line(), 2, numbers, plugins=[DurableCheckpointIO()]).save_checkpoint(path)
    assert zipfile.ZipFile(path).comment.startswith(b"sha256:")
    assert fit(Line(), 4, numbers, path, plugins=[DurableCheckpointIO()]).global_step == 4
    os.truncate(path, 900)
    with pytest.raises(DamagedCheckpoint, match="none beside it is intact"):
        fit(Line(), 4, numbers, path, plugins=[DurableCheckpointIO()])
