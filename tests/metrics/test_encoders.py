"""CLIP and DINO encoders: tiny random models saved to disk, against transformers used directly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from tests.metrics.toys import images, refused
from tests.tiny_sd import tokenizer
from unidad_pl import CMMD
from unidad_pl.metrics import CLIPImages, CLIPTexts, DINOImages, DINOv2Images
from unidad_pl.metrics.cache import identity
from unidad_pl.metrics.encoders import CLIP, CLIP_336, DINO, DINOV2, to_square

SIDE = 32
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = SIZES | {"image_size": SIDE, "patch_size": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    words = tokenizer(folder)
    torch.manual_seed(0)
    texts = SIZES | {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    CLIPModel(CLIPConfig(text_config=texts, vision_config=PICTURES, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    ViTModel(ViTConfig(**PICTURES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at another size than it is asked at, as DINOv2's ViT-L/14 at 518 pixels is."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(2)
    sizes = {k: v for k, v in PICTURES.items() if k != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes | {"patch_size": 7, "image_size": 49})).save_pretrained(folder)
    return folder


def test_pictures_are_embedded_as_clips_own_processor_and_model_do(clip: Path) -> None:
    pixels = (torch.rand(3, 48, 40, 3, generator=torch.Generator().manual_seed(2)) * 255).to(torch.uint8)
    smooth = [Image.fromarray(np.asarray(p)).resize((80, 60), Image.Resampling.BICUBIC) for p in pixels]
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip).eval()
        found = model.get_image_features(processor(smooth, return_tensors="pt")["pixel_values"])
    want = found if isinstance(found, Tensor) else found.pooler_output
    given = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in smooth]) / 127.5 - 1
    got = CLIPImages(str(clip))(given)
    assert got.shape == (3, 12)
    torch.testing.assert_close(got, want, atol=0.01, rtol=0.01)  # the processor rounds to 8 bits
    assert not torch.allclose(got[0], got[1], atol=0.01)


def test_texts_are_embedded_as_clip_does(clip: Path) -> None:
    texts, encode = ["a dog", "a cat in the snow"], CLIPTexts(str(clip))
    got = encode(texts)
    with torch.no_grad():
        given = encode.tokenizer(texts, padding=True, return_tensors="pt")
        found = CLIPModel.from_pretrained(clip).eval().get_text_features(**given)
    torch.testing.assert_close(got, found if isinstance(found, Tensor) else found.pooler_output)
    torch.testing.assert_close(encode(texts[:1])[0], got[0])  # padding counts for nothing
    refused(r"has \d+ tokens, CLIP reads 77", encode, ["dog " * 90])


def test_dino_is_the_class_token(dino: Path) -> None:
    given = images(3, SIDE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (DINOImages.mean, DINOImages.std))
    with torch.no_grad():
        model = ViTModel.from_pretrained(dino).eval()
        want = model(((given + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(DINOImages(str(dino))(given), want)


@pytest.mark.parametrize("side", [224, 28])
def test_dinov2_is_the_class_token_of_pictures_of_224_pixels(dinov2: Path, side: int) -> None:
    given = images(2, 40)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    large = torch.nn.functional.interpolate(given, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(dinov2).eval()
        want = model(((large + 1) / 2 - mean) / std).pooler_output
    extractor = DINOv2Images(str(dinov2)) if side == 224 else DINOv2Images(str(dinov2), side=side)
    torch.testing.assert_close(extractor(given), want)


def test_an_encoder_says_what_its_values_follow_from(clip: Path, dino: Path, dinov2: Path) -> None:
    kinds = [
        CLIPImages(str(clip)),
        DINOImages(str(dino)),
        DINOv2Images(str(dinov2)),
        DINOv2Images(str(dinov2), side=28),
    ]
    names = [identity(one) for one in kinds]
    assert None not in names
    assert len(set(names)) == len(kinds)
    assert identity(DINOv2Images(str(dinov2))) == names[2]
    with torch.no_grad():
        next(kinds[2].network.parameters()).view(-1)[0] += 1e-3
    assert identity(kinds[2]) != names[2]


def test_the_way_into_an_encoder() -> None:
    given = images(2, 40)
    assert torch.equal(to_square(given, 40), given)
    assert to_square(given[:, :, :20], 10).shape == (2, 3, 10, 10)
    assert torch.equal(to_square(given[:, :, 10:30], 20), given[:, :, 10:30, 10:30])  # the middle
    assert to_square(given, 64).abs().max() <= 1


def test_weights_that_are_not_there_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for encoder, name in (
        (CLIPImages(), CLIP), (CLIPTexts(), CLIP), (DINOImages(), DINO), (DINOv2Images(), DINOV2),
        (CMMD().features, CLIP_336),
    ):  # fmt: skip
        refused(rf"needs the weights '{name}'.*pass the folder as path=FOLDER", encoder.load, error=RuntimeError)
    refused(f"needs the weights '{tmp_path}'", DINOImages(str(tmp_path)).load, error=RuntimeError)


def test_a_folder_without_vocabulary_is_no_tokenizer(clip: Path, tmp_path: Path) -> None:
    """transformers makes a tokenizer of it that knows no word: every prompt would score alike."""
    for absent in ("vocab.json merges.txt", "vocab.json merges.txt tokenizer_config.json", "merges.txt"):
        place = tmp_path / absent.replace(" ", "-")
        shutil.copytree(clip, place)
        for name in absent.split():
            (place / name).unlink()
        message = rf"CLIPTexts \(its tokenizer\) needs the weights '{place}'"
        refused(message, CLIPTexts(str(place)).load, error=RuntimeError)


def test_a_home_folder_is_found(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clip.parent))
    CLIPTexts(f"~/{clip.name}").load()


def test_another_model_is_never_taken_instead(clip: Path, dino: Path, tmp_path: Path) -> None:
    refused(r"DINOImages needs a 'vit' model, but .* holds a 'clip' model", DINOImages(str(clip)).load)
    refused(r"CLIPImages needs a 'clip' model, but .* holds a 'vit' model", CLIPImages(str(dino)).load)
    config = json.loads((dino / "config.json").read_text())
    ViTModel(ViTConfig(**config | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # asks for a layer the weights have not
    refused(r"weights in .* are not complete", DINOImages(str(tmp_path)).load)


def test_loading_leaves_the_random_state_alone(clip: Path) -> None:
    before = torch.get_rng_state()
    CLIPImages(str(clip)).load()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("config.json", b"[" * 10_000, "cannot be read"), ("config.json", b"3", "cannot be read"),
    ("config.json", b'{"model_type": "vit", "num_hidden_layers": 10000000}', "num_hidden_layers 10000000"),
    ("config.json", b'{"model_type": "vit", "hidden_size": NaN}', "hidden_size"),
    ("config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "cannot be read"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "'git lfs pull'"),
    ("model.safetensors", b"<!doctype html>", "HTML"), ("model.safetensors", b"", "is empty"),
    ("model.safetensors", b"\xff" * 100, "cannot be read"),
])  # fmt: skip
def test_what_is_wrong_with_a_folder_is_one_sentence(
    dino: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    place = tmp_path / "dino"
    shutil.copytree(dino, place)
    (place / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=message) as raised:
        DINOImages(str(place)).load()
    assert f"DINOImages needs the weights '{place}'" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_weights_that_are_not_finite_name_their_tensor(dino: Path, tmp_path: Path) -> None:
    model = ViTModel.from_pretrained(dino)
    with torch.no_grad():
        model.layernorm.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    refused(r"DINOImages: .*layernorm\.bias holds NaN", DINOImages(str(tmp_path)).load)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "merges.txt", "vocab.json"])
def test_a_tokenizer_that_was_not_fetched(clip: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "clip"
    shutil.copytree(clip, place)
    (place / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(rf"{name}' is a Git LFS pointer", CLIPTexts(str(place)).load, error=RuntimeError)
