"""The command line, as a user runs it: every config, fit - test - predict on a folder of photographs, kill -9."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.processes import Apart, run_apart
from tests.tiny_sd import save_ddpm
from unidad_pl.cartoons.shots import choose_shots
from unidad_pl.cli.main import TOOLS, main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TRAINING = [p for p in sorted(CONFIGS.rglob("*.yaml")) if "model" in yaml.safe_load(p.read_text())]
# Those of one subject: tests/export/test_text_to_image.py, with a transformer: tests/backbones/test_pipelines.py; those
# of a study are parts: tests/cli/test_study.py.
SUBJECT = ("sdp", "sdxl", "sd35", "flux2", "z_image")
TRAINING = [p for p in TRAINING if not p.name.startswith(SUBJECT) and p.parent.name != "study"]
FSIG = [p for p in TRAINING if p.name.startswith("fsig_")]
DIFFERENT = [p for p in TRAINING if p not in FSIG[1:] and p.name != "quickstart.yaml"]
"""Those that are run. The FSIG ones are one method, and the quickstart runs in tests of its own."""
PLACES = {
    ("models/ffhq.pt", "--model.source.init_args.checkpoint"),
    ("google/ddpm-celebahq-256", "--model.source.init_args.path"),
}
REAL = [p for p in DIFFERENT if any(place in p.read_text() for place, _ in PLACES)]
"""Those that need files which do not ship with the package."""


@pytest.fixture
def unidad(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, fails: bool = False) -> str:
        failed, message = False, ""
        try:
            main(list(arguments))
        except SystemExit as exit_:
            failed = bool(exit_.code)
        except Exception as error:
            if not fails:
                raise
            failed, message = True, f"{type(error).__name__}: {error}"
        captured = capsys.readouterr()
        output = captured.out + captured.err + message
        assert failed == fails, output
        return output

    return run


SHORT = ("--threads", "1", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
SMALL = (*SHORT, "--data.evaluation.val_samples", "12", "--data.evaluation.test_samples", "12",
         "--data.evaluation.predict_samples", "3")  # fmt: skip
BOTH = ("--model.target_teacher.adaptation.pretrain", "1")  # then an iteration of each kind
BARE = [word for name in ("cpu", "no_metrics") for word in ("--config", str(CONFIGS / "trainer" / f"{name}.yaml"))]
ADM = ROOT / "tests" / "fixtures" / "adm_tiny"


def stand_in_for_the_real_files(folder: Path, config: Path, unidad: Any) -> list[str]:
    """The places a config names, filled with a tiny model and small pictures; the options that fit them."""
    (folder / "models").mkdir()
    shutil.copy(ADM / "adm_tiny.pt", folder / "models" / "ffhq.pt")
    if config.name == "celebahq.yaml":
        save_ddpm(folder / "google" / "ddpm-celebahq-256")
    for name in ("student", "adapted") if config.name == "adapt_distilled.yaml" else ():
        unidad("import", "adm", "--checkpoint", str(ADM / "adm_tiny.pt"), "--config", str(ADM / "config.json"), "--out",
               f"models/{name}")  # fmt: skip
    settings = yaml.safe_load(config.read_text())["data"]["init_args"]
    for place in {settings["root"], settings.get("reference", settings)["root"]}:
        (folder / place).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 256, (9, 9, 3), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / place / f"{i}.png")
    fitting = ["--model.source.init_args.config", str(ADM / "config.json"), "--data.resolution", "32"]
    fitting = ["--data.resolution", "16"] if config.name == "celebahq.yaml" else fitting
    fitting += ["--trainer.precision", "32-true"]  # half precision is slow on a CPU, and tried elsewhere
    return [*BARE, *fitting]


@pytest.mark.slow
@pytest.mark.parametrize("config", DIFFERENT, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_runs_two_iterations(config: Path, tmp_path: Path, unidad: Any) -> None:
    options = [*SMALL, "--data.batch_size", "2", "--summary", "false"]  # two more validations
    if config.name == "features.yaml":
        options = [*SHORT, "--data.batch_size", "2", "--data.pool_size", "60", "--data.val_size", "6"]
    if config.name in ("teacher.yaml", "teacher_flow.yaml"):
        options += ["--data.shots", "8"]
    for domain in ("cats", "sunglasses"):
        if f'root: "builtin:{domain}"' in config.read_text():
            options += ["--data.reference.root", f"builtin:{domain}:30"]  # in place of a thousand
    if "pretrain:" in config.read_text():
        options += BOTH
    if config in REAL:
        options += stand_in_for_the_real_files(tmp_path, config, unidad)
    over = ["--config", str(CONFIGS / "assets" / "teacher.yaml")] if config.name == "teacher_flow.yaml" else []
    unidad("fit", *over, "--config", str(config), *options)
    assert list(tmp_path.rglob("metrics.jsonl")) or list(tmp_path.rglob("*.ckpt")) or list(tmp_path.rglob("curve.csv"))


def test_the_cartoons_that_the_configs_name_can_be_chosen() -> None:
    """The test above asks for fewer of them."""
    seen = []
    for config in TRAINING:
        data = yaml.safe_load(config.read_text()).get("data", {}).get("init_args", {})
        root = str(data.get("root"))
        if root.startswith("builtin:"):
            seen.append(config.name)
            domain, count = root.split(":")[1], data["shots"]
            assert len(set(choose_shots(domain, count, 0))) == count
    assert {"quickstart.yaml", "cats.yaml", "teacher.yaml"} <= {*seen}


def test_the_fsig_configs_are_one_method_for_several_places() -> None:
    """So that running one of them tries all."""
    first, *others = (yaml.safe_load(path.read_text()) for path in FSIG)
    assert len(others) == 3
    for path, config in zip(FSIG[1:], others, strict=True):
        weight = config["model"]["init_args"]["target_teacher"]
        data = config["data"]["init_args"]
        assert 0 < weight["weight"] < 1
        places = {("models/ffhq.pt", "--model.source.init_args.checkpoint"), (data["root"], "--data.root"),
                  (data["reference"]["root"], "--data.reference.root")}  # fmt: skip
        assert {(line.split()[1], line.split()[-1]) for line in named_places(path)} == places
        weight["weight"] = first["model"]["init_args"]["target_teacher"]["weight"]
        data |= {name: first["data"]["init_args"][name] for name in ("root", "reference")}
        assert config == first


def named_places(config: Path) -> list[str]:
    return [line for line in config.read_text().splitlines() if line.startswith("#   ") and "--" in line[40:]]


@pytest.mark.parametrize("config", REAL, ids=lambda p: p.name)
def test_a_config_without_its_files_says_which_go_where(config: Path, unidad: Any) -> None:
    printed = unidad("fit", "--config", str(config), *BARE, fails=True)
    named = ((line.split()[1], line.split()[-1]) for line in named_places(config))
    place, option = next((place, option) for place, option in named if place in printed)
    assert option in printed
    assert (place, option) in PLACES | {(place, "--data.root")}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        pixels = torch.randint(0, 256, (4, 5, 3), generator=generator).to(torch.uint8).numpy()
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


@pytest.mark.slow
def test_a_class_conditional_model_from_fit_to_predict(photographs: Path, tmp_path: Path, unidad: Any) -> None:
    save_ddpm(tmp_path / "model", classes=3, prediction_type="v_prediction")
    unidad("fit", "--config", str(CONFIGS / "quickstart.yaml"), "--model.source.init_args.path", "model",
           "--data.root", str(photographs), "--data.resolution", "16", "--data.batch_size", "2", "--summary", "false",
           *SMALL, *BOTH)  # fmt: skip
    picture = Image.open("runs/quickstart/version_0/samples/val_step00000002.png")
    assert picture.size == (4 * 64, (3 + 3) * 64 + 2 * 4)  # three rows of shots, a line, a row for each class
    unidad("predict", "--config", "runs/quickstart/version_0/config.yaml", "--ckpt_path",
           "runs/quickstart/version_0/checkpoints/last.ckpt")  # fmt: skip
    assert len(list(tmp_path.rglob("predictions/*.png"))) == 3


@pytest.mark.slow
@pytest.mark.ci
def test_the_quickstart_on_the_users_own_photographs(photographs: Path, tmp_path: Path, unidad: Any) -> None:
    own = ("--data.root", str(photographs), "--data.batch_size", "2")
    printed = unidad("fit", "--config", str(CONFIGS / "quickstart.yaml"), *own, *SMALL, *BOTH)
    run = Path("runs/quickstart/version_0")
    assert "before" in printed
    assert str(run) in printed
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records} == {0, 2}
    assert all({"samples", "extractor", "weights", "first_seed"} <= set(r) for r in records)
    assert (run / "samples" / "val_step00000002.png").exists()
    (next_command,) = [line for line in printed.splitlines() if line.startswith("next")]
    arguments = next_command.split("unidad ")[1].split()
    unidad(*arguments)
    assert sorted(p.name for p in tmp_path.rglob("predictions/*.png")) == ["000000.png", "000001.png", "000002.png"]
    assert "test/fid" in unidad("test", *arguments[1:])
    (hand_on,) = [line for line in printed.splitlines() if line.startswith("hand on")]
    unidad(*hand_on.split("unidad ")[1].split())
    assert (run / "export" / "model_index.json").is_file()
    tests = [r for path in tmp_path.rglob("metrics.jsonl") for r in map(json.loads, path.read_text().splitlines())]
    assert {r["step"] for r in tests if r["stage"] == "test"} == {2}  # Lightning's own count is 0 here
    assert list(tmp_path.rglob("samples/test_step00000002.png"))


@pytest.mark.slow
def test_kill_9_and_resume_equals_an_undisturbed_run(tmp_path: Path) -> None:
    """Killed hard as soon as iteration 2 is on disk; the resumed run ends with the bits of the one never killed."""
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["model"]["init_args"]["target_teacher"]["adaptation"]["pretrain"] = 1
    config["trainer"] |= {"limit_val_batches": 0, "max_steps": 4}
    often = {"every_n_train_steps": 2, "save_top_k": -1}
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": often}
    config["trainer"]["callbacks"] = [keep]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["fit", "--config", str(tmp_path / "config.yaml"), "--summary", "false", "--threads", "1",
               "--data.batch_size", "2"]  # fmt: skip
    for name in ("killed", "resumed", "whole"):
        (tmp_path / name).mkdir()
    with Apart(tmp_path / "killed", main, command) as victim:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*step=2.ckpt")):
            assert victim.process.is_alive(), f"ended before its first checkpoint: {victim.printed()[-3000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert victim.process.exitcode == -signal.SIGKILL
    (saved,) = tmp_path.rglob("*step=2.ckpt")
    run_apart(tmp_path / "resumed", main, [*command, "--ckpt_path", str(saved)])
    run_apart(tmp_path / "whole", main, command)
    ends = (next((tmp_path / name).rglob("*step=4.ckpt")) for name in ("resumed", "whole"))
    resumed, whole = (torch.load(end, weights_only=True) for end in ends)
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    assert all(torch.equal(v, whole["state_dict"][k]) for k, v in resumed["state_dict"].items())
    for a, b in zip(resumed["optimizer_states"], whole["optimizer_states"], strict=True):
        assert all(torch.equal(x["exp_avg"], b["state"][k]["exp_avg"]) for k, x in a["state"].items())


def test_help_explains_every_option(unidad: Any) -> None:
    text = unidad("fit", "--model.help", "unidad_pl.UniDAD")
    for phrase in ("the student is updated on every r-th iteration", "lambda_G", "half cosine"):
        assert phrase in " ".join(text.split())


def test_help_offers_what_works_and_says_what_it_does_here(unidad: Any) -> None:
    text = " ".join(unidad("fit", "--help").split())
    assert "--optimizer" not in text  # each network has its own, in the model's options
    assert "--lr_scheduler" not in text
    for phrase in ("auto: the same, but begin where there is none", "null: checkpoints/ in the run folder",
                   "false, which would run code in them, is refused"):  # fmt: skip
        assert phrase in text


def test_help_is_written_for_a_terminal(unidad: Any) -> None:
    """No role or literal of Sphinx is in it: not of options, classes, groups or tools."""
    classes = (("--model.help", "unidad_pl.UniDAD"), ("--data.help", "unidad_pl.FewShotDataModule"), ("--help",))
    for words in (*(("fit", *of) for of in classes), *((*tool.split(), "--help") for tool in TOOLS)):
        text = unidad(*words)
        assert not re.search(r":[a-z]+:`|``", text), words
        assert "usage:" in text or "Help for" in text
    text = " ".join(unidad("fit", "--model.help", "unidad_pl.UniDAD").split())
    assert "edm, eps or flow, see denoising_weight. (type" in text


def test_help_of_words_that_are_half_a_command(unidad: Any) -> None:
    for words in ("import --help", "import -h"):
        assert "unidad import adm --checkpoint FILE --preset ffhq256 --out FOLDER     a guided-diff" in unidad(
            *words.split()
        )
    assert "what import adm wrote as a checkpoint of theirs" in unidad("restore", "--help")
    assert "other commands: unidad report memory, unidad report subjects" in unidad("report", "--help")
    assert "unidad import: use one of: unidad import adm" in unidad("import", fails=True)
    for words in ("drow --help", "drow"):
        said = unidad(*words.split(), fails=True)
        assert said == f"unidad: there is no command 'drow', only fit, validate, test, predict, {', '.join(TOOLS)}\n"


@pytest.mark.slow
def test_print_config_is_complete_and_a_config(unidad: Any) -> None:
    small = (*SMALL, *BOTH, "--data.batch_size", "2", "--data.reference.root", "builtin:sunglasses:30")
    printed = unidad("fit", "--config", str(CONFIGS / "quickstart.yaml"), *small, "--summary", "false",
                     "--print_config")  # fmt: skip
    config = yaml.safe_load(printed)
    assert config["model"]["init_args"]["gan"]["reduction"] == "mean_logit"
    assert config["data"]["init_args"]["shots"] == 10
    Path("printed.yaml").write_text(printed)
    unidad("fit", "--config", "printed.yaml")
    records = [json.loads(line) for line in next(Path().rglob("metrics.jsonl")).read_text().splitlines()]
    assert {record["step"] for record in records} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data.root", "builtin:dogs"), "dogs"),
        (("--data.root", "/nowhere"), "/nowhere"),
        (("--model.source.path", "/nowhere"), "/nowhere"),
        (("--trainer.strategy", "ddp"), "unidad_ddp"),
        (("--ckpt_path", "nowhere.ckpt"), "'nowhere.ckpt' is no file"),
        (("--ckpt_path", "last"), "no intact checkpoint in 'runs/quickstart'"),
        (("--data.resolution", "64"), "resolution"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str, unidad: Any) -> None:
    small = (*SMALL, "--summary", "false", "--trainer.limit_val_batches", "0", "--data.batch_size", "2",
             "--data.reference.root", "builtin:sunglasses:30")  # fmt: skip
    assert message in unidad("fit", "--config", str(CONFIGS / "quickstart.yaml"), *small, *arguments, fails=True)


NO_TORCH = """
import sys
from unidad_pl.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "lightning"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "printed"), [("--version", "unidad 0."), ("--help", "quickstart.yaml"), ("sample --help", "--num_steps")]
)
def test_what_needs_no_torch_does_not_wait_for_it(words: str, printed: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", NO_TORCH, *words.split()]
    assert printed in subprocess.check_output(command, cwd=tmp_path, env=env, text=True)


OTHER = """
import lightning.pytorch as pl, torch
class Line(pl.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__(); self.w = torch.nn.Linear(1, 1); self.lr = lr
    def training_step(self, batch, batch_idx): return self.w(batch).pow(2).mean()
    def predict_step(self, batch, batch_idx): return self.w(batch)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), self.lr)
class Numbers(pl.LightningDataModule):
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)
    predict_dataloader = train_dataloader
"""


def test_other_peoples_modules_run_too(unidad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_project.py").write_text(OTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = ("--model", "other_project.Line", "--data", "other_project.Numbers", "--trainer.accelerator", "cpu")
    silent = ("--trainer.logger", "false")
    assert "run folder" in unidad("fit", *theirs, *silent, "--trainer.max_epochs", "1")
    unidad("predict", *theirs, *silent)
    unidad("fit", *theirs, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "elsewhere")
    assert [p.name for p in Path("elsewhere/unidad/version_0").iterdir() if p.is_dir()] == ["checkpoints"]
    assert not Path("runs").exists()
