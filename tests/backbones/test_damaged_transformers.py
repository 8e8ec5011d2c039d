"""Configs of transformers that none has: refused with one sentence that names the file, or they work."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones.conformance import Conformance
from tests.backbones.damage import outcome
from tests.backbones.test_dit import TestDiT as DiT
from tests.backbones.test_flux import TestFlux as Flux
from tests.backbones.test_flux2 import TestFlux2 as Flux2
from tests.backbones.test_sd3 import TestSD3 as SD3
from tests.backbones.test_z_image import TestZImage as ZImage
from tests.metrics.toys import refused
from unidad_pl.files import BrokenFile

VALUES: tuple[Any, ...] = (0, -1, 10**9, "x", None, [], 1.5, True, {}, [[[]]], 3, float("nan"))
CASES = 45
"""Changes of each config that are tried here, of some three hundred."""


def changed(entries: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was done, the config): entries left out or with other values, lists with one or of other lengths."""
    for name, value in entries.items():
        if name == "_diffusers_version":
            continue
        yield f"without {name}", {key: one for key, one in entries.items() if key != name}
        lists = [[one, *value[1:]] for one in VALUES] + [[*value, 2], value[:-1]] if isinstance(value, list) else []
        for other in (*VALUES, *lists):
            yield f"{name}: {other!r}", entries | {name: other}


def use(kind: Conformance, folder: Path) -> None:
    """What memory is asked of, and then what a run does."""
    pixels = kind.side * 2 * kind.network.vae_fold
    assert kind.source(str(folder), resolution=pixels).architecture().image_shape
    network = kind.load(folder)
    x, sigma, cond = kind.given(network, 1)
    taps = network.taps(x, sigma, cond)
    assert {name: tap.shape[1] for name, tap in taps.items()} == network.tap_channels
    assert network(x, sigma, cond).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("of", [DiT, SD3, Flux, Flux2, ZImage])
def test_odd_configs_of_transformers(of: type[Conformance], tmp_path: Path) -> None:
    kind, file = of(), of().save(tmp_path) / "transformer" / "config.json"
    cases = list(changed(json.loads(file.read_text())))
    seen = []
    for done, content in random.Random(0).sample(cases, CASES):
        file.write_text(json.dumps(content))
        began = time.process_time()
        seen.append(outcome(lambda: use(kind, tmp_path), file))
        assert seen[-1] in ("works", "refused"), f"{done}: {seen[-1]}"
        assert time.process_time() - began < 20, done
    assert seen.count("refused") > CASES / 2


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        (DiT, {"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        (DiT, {"patch_size": 0}, "patch_size must be a whole number"),
        (DiT, {"num_layers": 0}, "blocks must be a whole number of at least 1"),
        (DiT, {"num_layers": None}, "num_layers must be a whole number"), (DiT, {"norm_type": "x"}, "norm_type"),
        (DiT, {"num_attention_heads": 10**5, "attention_head_dim": 100}, "numbers, more than 1e[+]11"),
        (SD3, {"dual_attention_layers": 0}, r"dual_attention_layers must be list, got '0' \(int\)"),
        (SD3, {"pos_embed_max_size": 10**6}, "numbers, more than 1e[+]11"),
        (SD3, {"in_channels": 10**9}, "in_channels must be"),
        (Flux, {"axes_dims_rope": [2, 2]}, r"axes_dims_rope must be 3 even numbers, 8 in all, got \[2, 2\]"),
        (Flux, {"axes_dims_rope": [4, 4, 4]}, r"axes_dims_rope must be 3 even numbers, 8 in all, got \[4, 4, 4\]"),
        (Flux2, {"axes_dims_rope": [1, 3, 2, 2]}, "axes_dims_rope must be 4 even numbers"),
        (Flux2, {"out_channels": 8}, "config of a Flux2Transformer2DModel"),
        (ZImage, {"dim": "16"}, "dim must be a whole number"), (ZImage, {"t_scale": None}, "t_scale must be float"),
        (ZImage, {"n_kv_heads": [2]}, "n_kv_heads must be int"), (ZImage, {"axes_dims": [2, 6]}, "AssertionError"),
        (ZImage, {"axes_lens": [10, 64, 64]}, r"axes_lens\[0\] must be a whole number in \[514, 8192\], got 10"),
        (ZImage, {"axes_lens": [640, 2, 64]}, r"axes_lens\[1\] must be a whole number in \[4, 8192\], got 2"),
    ],
)  # fmt: skip
def test_configs_that_no_transformer_has_are_refused_before_anything_is_built(
    of: type[Conformance], change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, file = of(), of().save(tmp_path) / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr("unidad_pl.backbones.sources.read_folder", lambda *_: pytest.fail("weights were read"))
    source = kind.source(str(tmp_path), resolution=kind.side * 2 * kind.network.vae_fold)
    for build in (source.architecture, source.build):
        refused(rf"transformer/config\.json' is no readable .*{message}", build, error=BrokenFile)
