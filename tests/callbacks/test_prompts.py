"""Callbacks about prompts, on a module that knows nothing of this package but the names of its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from tests.callbacks.toys import SHOTS, SIZE, Data, Prompted, Toy, trainer
from tests.metrics.toys import TinyFeatures, WordVectors, refused
from unidad_pl.callbacks import PromptDiversity, PromptGrid, SubjectSimilarity, read_records
from unidad_pl.callbacks.prompt_grid import file_name, with_caption
from unidad_pl.metrics import CLIPImages, CLIPTexts, DINOImages, LPIPSFeatures, PromptLPIPS, SubjectCosines


def similarity(**options: Any) -> SubjectSimilarity:
    toys = dict(image_encoder=TinyFeatures(), text_encoder=WordVectors(), dino=TinyFeatures(seed=4), token="prt")
    return SubjectSimilarity(**(toys | options))


def evaluate(folder: Path, *callbacks: Any, module: Toy | None = None, data: Data | None = None) -> dict[str, float]:
    run = trainer(folder, *callbacks)
    run.test(module or Prompted(), datamodule=data or Data(), verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in run.callback_metrics.items()}


def test_both_equal_their_metrics_and_are_recorded(tmp_path: Path) -> None:
    module, seeds = Prompted(), torch.arange(24)
    samples, prompts = module.sample(seeds), module.prompts(seeds)
    similar = SubjectCosines({"clip_i": TinyFeatures(), "dino": TinyFeatures(seed=4)}, WordVectors(), token="prt")
    similar.set_photos(SHOTS)
    varied = PromptLPIPS(TinyFeatures())
    for metric in (similar, varied):
        metric.update(samples, prompts, seeds)
    want, diversity = similar.result(), varied.result()
    found = evaluate(tmp_path, similarity(subject="fido"), PromptDiversity(TinyFeatures()), module=module)
    assert {name: found[name] for name in want.means} == pytest.approx(want.means, rel=1e-5)
    assert found["intra_prompt_lpips"] == pytest.approx(diversity.means["intra"], rel=1e-5)
    assert found["inter_prompt_lpips"] == pytest.approx(diversity.means["inter"], rel=1e-5)
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert first["subject"] == "fido"
    assert first["token"] == "prt"
    assert first["extractor"] == {"clip_i": "tiny", "clip_t": "words", "dino": "tiny"}
    assert first["prompts"].keys() == set(Prompted.PROMPTS)
    assert first["prompts"]["red prt dog"]["dino"] == pytest.approx(want.by_prompt["red prt dog"]["dino"], rel=1e-5)
    intra = diversity.by_prompt["red prt dog"]["intra"]
    assert second["intra_by_prompt"]["red prt dog"] == pytest.approx(intra, rel=1e-5)


def test_samples_that_are_the_photo_score_one(tmp_path: Path) -> None:
    module = Prompted(scale=0)
    module.mean.data.fill_(0.4)
    photo = module.sample(torch.arange(1))
    found = evaluate(tmp_path, similarity(photos=photo, scores=["clip_i", "dino"]), module=module)
    assert found == pytest.approx({"clip_i": 1, "dino": 1}, abs=1e-5)


def test_similarity_arguments(tmp_path: Path) -> None:
    base = evaluate(tmp_path, similarity())
    other = {"image_encoder": {"clip_i", "clip_t"}, "text_encoder": {"clip_t"}, "dino": {"dino"}}
    for name, changed in other.items():
        encoder = WordVectors(seed=3) if name == "text_encoder" else TinyFeatures(seed=9)
        found = evaluate(tmp_path, similarity(**{name: encoder}))
        assert {score for score in base if found[score] != base[score]} == changed
    found = evaluate(tmp_path, similarity(photos=SHOTS[:1]))
    assert found["clip_i"] != base["clip_i"]
    assert found["clip_t"] == base["clip_t"]
    assert evaluate(tmp_path, similarity(token="red"))["clip_t"] != base["clip_t"]
    assert set(evaluate(tmp_path, similarity(scores=["clip_t"]))) == {"clip_t"}
    features = TinyFeatures()
    assert evaluate(tmp_path, similarity(image_encoder=features, batch_size=3)) == pytest.approx(base, rel=1e-5)
    assert max(features.batches) == 3
    for scores in ([], ["clip"]):
        refused("scores must be some of clip_i, clip_t, dino, got", similarity, scores=scores)
    refused("batch_size must be a whole number of at least 1, got 0", similarity, batch_size=0)
    default = SubjectSimilarity()
    assert [type(e) for e in default.metric.networks().values()] == [CLIPImages, DINOImages, CLIPTexts]
    assert list(SubjectSimilarity(scores=["dino"]).metric.networks()) == ["dino"]


def test_subject_and_token_are_the_datamodules_unless_given(tmp_path: Path) -> None:
    data: Any = Data()
    data.subject, data.token = "cat2", "red"
    evaluate(tmp_path, similarity(token=None), data=data)
    evaluate(tmp_path, similarity(subject="fido"), data=data)
    given, own = read_records(tmp_path / "metrics.jsonl")
    assert (given["subject"], given["token"]) == ("cat2", "red")
    assert (own["subject"], own["token"]) == ("fido", "prt")
    callback = similarity(token=None)
    data.token = "no such word"
    first = evaluate(tmp_path, callback, data=data)["clip_t"]
    data.token = "red"  # the same callback and the same prompts, another subject's run
    again = evaluate(tmp_path, callback, data=data)["clip_t"]
    assert again == evaluate(tmp_path, similarity(token="red"))["clip_t"] != first


def test_diversity_arguments(tmp_path: Path) -> None:
    base = evaluate(tmp_path, PromptDiversity(TinyFeatures()))
    features = TinyFeatures()
    assert evaluate(tmp_path, PromptDiversity(features, batch_size=2)) == pytest.approx(base, rel=1e-5)
    assert max(features.batches) == 2
    assert evaluate(tmp_path, PromptDiversity(TinyFeatures(seed=1))) != base
    assert isinstance(PromptDiversity().features, LPIPSFeatures)
    refused("batch_size must be a whole number of at least 1", PromptDiversity, batch_size=0)


def test_a_grid_per_prompt_with_the_prompt_under_it(tmp_path: Path) -> None:
    module, seeds = Prompted(), torch.arange(24)
    run = trainer(tmp_path, PromptGrid(count=3, columns=2, scale=5), logger=TensorBoardLogger(tmp_path, version=0))
    run.test(module, datamodule=Data(), verbose=False)
    folder = Path(run.log_dir or "") / "samples" / "test_step00000000"
    assert sorted(path.name for path in folder.iterdir()) == ["00_a_prt_dog.png", "01_red_prt_dog.png"]
    samples = module.sample(seeds)
    chosen = [i for i, prompt in enumerate(module.prompts(seeds)) if prompt == "red prt dog"]
    found = np.array(Image.open(folder / "01_red_prt_dog.png"))
    corner = ((samples[chosen[1]] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert found.shape[1] == 2 * SIZE * 5
    assert np.array_equal(found[: SIZE * 5 : 5, SIZE * 5 :: 5], corner)
    caption = found[2 * SIZE * 5 :]
    assert caption.max() == 255
    assert caption.min() < 100
    assert (caption != 255).any(2).mean() < 0.5  # dark letters on white
    logged = run.logger.experiment.get_logdir() if run.logger is not None else ""
    assert b"test/prompts/01" in b"".join(path.read_bytes() for path in Path(logged).glob("events*"))


def test_captions_wrap_and_differ() -> None:
    picture = torch.zeros(3, 10, 80, dtype=torch.uint8)
    short, long = with_caption(picture, "a dog"), with_caption(picture, "a dog on top of a purple rug in a forest")
    assert short.shape[2] == long.shape[2] == 80
    assert long.shape[1] > short.shape[1] > 20
    assert bool((long[:, 10:, 78:] == 255).all())  # nothing is cut off at the right
    assert not torch.equal(short, with_caption(picture, "a cat"))
    one_word = with_caption(picture, "x" * 40)  # wider than the picture
    assert one_word.shape[1] > short.shape[1]
    assert bool((one_word[:, picture.shape[1] :, -4:] == 255).all())
    assert file_name("A <prt> dog: wet?") == "a_prt_dog_wet"
    assert file_name("犬") == "prompt"


def test_grid_arguments_and_default_scale(tmp_path: Path) -> None:
    evaluate(tmp_path, PromptGrid(count=1))
    assert Image.open(next((tmp_path / "samples").rglob("*.png"))).width == 64
    for name in ("count", "columns", "scale"):
        refused(f"{name} must be a whole number of at least 1, got 0", PromptGrid, **{name: 0})


@pytest.mark.parametrize("callback", [similarity(), PromptDiversity(TinyFeatures()), PromptGrid()])
def test_a_step_without_prompts_is_explained(tmp_path: Path, callback: Any) -> None:
    missing = "return a list of as many strings as samples under 'prompts'"
    refused(missing, evaluate, tmp_path, callback, module=Toy(), error=KeyError)


def test_missing_weights_end_the_run_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    message = "SubjectSimilarity cannot begin: DINOImages needs the weights 'facebook/d"
    refused(message, trainer(tmp_path, similarity(dino=None)).fit, Prompted(), datamodule=Data(), error=RuntimeError)
