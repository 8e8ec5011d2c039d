"""Feature modules: missing weights, weight files, no side effects."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.metrics.toys import TinyFeatures, cut_off, images, refused
from unidad_pl.metrics import FeatureModule, InceptionFeatures, LPIPSFeatures
from unidad_pl.metrics.features import BACKBONES, INCEPTION_FILE, INCEPTION_URL, extract


@pytest.mark.parametrize(
    ("features", "file", "url"),
    [
        (InceptionFeatures(), INCEPTION_FILE, INCEPTION_URL),
        (LPIPSFeatures("vgg"), BACKBONES["vgg"].file, BACKBONES["vgg"].url),
        (LPIPSFeatures("alex"), BACKBONES["alex"].file, BACKBONES["alex"].url),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_missing_weights_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: FeatureModule, file: str, url: str
) -> None:
    cut_off(monkeypatch, tmp_path)
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError) as raised:
        features.load()
    message = str(raised.value)
    for part in (file, "MB", url, f"{tmp_path}/hub/checkpoints/", "weights_path", "no network"):
        assert part in message
    assert torch.equal(torch.get_rng_state(), random)
    refused(file, features, images(1, 32), error=RuntimeError)  # also at the first use


@pytest.mark.parametrize("kind", [InceptionFeatures, LPIPSFeatures])
def test_a_wrong_path_is_named(kind: type, tmp_path: Path) -> None:
    features = kind(weights_path=str(tmp_path / "nowhere.pth"))
    refused(r"weights_path='.*nowhere\.pth' could not be loaded", features.load, error=RuntimeError)
    (tmp_path / "nowhere.pth").write_bytes(b"half a file")
    refused("could not be loaded", features.load, error=RuntimeError)


def test_lpips_reads_torchvisions_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from torchvision import models

    torch.manual_seed(3)
    network = models.squeezenet1_1(weights=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = LPIPSFeatures("squeeze", weights_path=str(tmp_path / "weights.pth"))
    random = torch.get_rng_state()
    features.load()
    features.load()  # once is enough
    assert torch.equal(torch.get_rng_state(), random)
    x = images(2, 64)
    assert features(x).shape[0] == 2
    assert torch.equal(features.backbone[0].weight, network.features[0].weight)
    assert not any(p.requires_grad for p in features.parameters())
    assert not torch.equal(features(x), LPIPSFeatures("squeeze", pnet_rand=True)(x))
    assert capfd.readouterr().out == ""
    state = network.state_dict()
    del state["features.0.weight"]
    torch.save(state, tmp_path / "weights.pth")
    again = LPIPSFeatures("squeeze", weights_path=str(tmp_path / "weights.pth"))
    refused(r"features\.0\.weight", again.load, error=RuntimeError)


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("kind", [InceptionFeatures, LPIPSFeatures])
@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "'git lfs pull'"), (b"<html></html>", "HTML"),
    (pickle.dumps(Code()), "code, which is never run"), (pickle.dumps([1], protocol=2), r"Error"),
])  # fmt: skip
def test_weight_files_are_data_only(
    kind: type, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-fidelity itself would run what such a file asks for."""
    monkeypatch.chdir(tmp_path)
    for number, data in enumerate((content, *([] if b"exploded" not in content else [None]))):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(data) if data is not None else torch.save({"a": Code()}, path)
        with pytest.raises(RuntimeError, match=message) as raised:
            kind(weights_path=str(path)).load()
        assert f"{path}" in str(raised.value)
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "exploded").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from torchvision import models

    state = models.squeezenet1_1(weights=None).state_dict()
    state["features.0.bias"][0] = float("nan")
    torch.save(state, tmp_path / "weights.pth")
    features = LPIPSFeatures("squeeze", weights_path=str(tmp_path / "weights.pth"))
    refused("0.bias holds NaN", features.load, error=RuntimeError)


def test_lpips_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    LPIPSFeatures("squeeze", pnet_rand=True).load()
    assert not [w for w in recwarn if "pretrained" in str(w.message) or "torchvision" in str(w.message)]


def test_lpips_arguments() -> None:
    refused("net must be one of vgg, alex, squeeze, got 'vgg19'", LPIPSFeatures, "vgg19")
    refused("pnet_rand=True uses no weights", LPIPSFeatures, weights_path="x.pth", pnet_rand=True)
    assert LPIPSFeatures().name == "lpips-vgg-v0.1"
    assert LPIPSFeatures("alex", pnet_rand=True).name == "lpips-alex-v0.1-random"


def test_autocast_is_off_inside() -> None:
    features, x = LPIPSFeatures("squeeze", pnet_rand=True), images(2, 64)
    expected = features(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(x), expected)


@pytest.mark.slow
def test_inception_equals_torch_fidelity(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Stay as initialised."""

    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    network = Random("random", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    features = InceptionFeatures(weights_path=str(tmp_path / "inception.pth"))
    random = torch.get_rng_state()
    rounded = ((images(2, 32) + 1) * 127.5).round()
    x = rounded / 127.5 - 1
    found = features(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert found.shape == (2, 2048)
    assert torch.equal(found, network(rounded.to(torch.uint8))[0])
    assert torch.equal(features(x + 1e-3), found)  # rounded to the same uint8, clamped at the ends
    assert features.train().training is False


def test_extract_restores_every_mode_and_splits() -> None:
    features = TinyFeatures()
    features.dropout.eval()
    features.training = True
    found = extract(features, images(5), batch_size=2)
    assert features.batches == [2, 2, 2]  # the last one filled up
    assert (features.training, features.dropout.training) == (True, False)
    assert not found.requires_grad
    features.train()
    assert torch.equal(extract(features, images(5), batch_size=5), extract(features, images(5), batch_size=5))
