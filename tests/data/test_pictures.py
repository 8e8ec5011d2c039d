"""Pictures as files: whole ones are told from all others."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unidad_pl.data.pictures import is_whole_png, write_png


def test_a_png_cut_anywhere_or_with_any_bit_changed_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "000000.png"
    write_png(torch.randint(0, 256, (3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8), path)
    data = path.read_bytes()
    assert is_whole_png(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert not is_whole_png(path), length
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        assert not is_whole_png(path), place


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    assert not any(is_whole_png(path) for path in (*tmp_path.iterdir(), tmp_path / "absent.png"))
