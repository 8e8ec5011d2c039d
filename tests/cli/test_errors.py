"""What cannot be done ends with one sentence; configs are data, read whole, later ones over earlier ones."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.runs.test_resume import CONFIG
from unidad_pl import files
from unidad_pl.cli.errors import Refused, sentence_of
from unidad_pl.cli.launch import check_launcher
from unidad_pl.cli.main import main, processor_ticks, wait_passively_where_busy
from unidad_pl.files import BrokenFile
from unidad_pl.runs.config import build_module, merge_configs, read_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, int | str | None]:
    """The last line on stderr, and the exit code."""
    with pytest.raises(Refused) as ending:
        main(list(arguments))
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert "usage:" not in printed
    line = printed.splitlines()[-1]
    assert line == str(ending.value)
    assert len(line) < 500
    return line, ending.value.code


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--model.gan.los", "hinge"), 2, "'los' is not accepted (did you mean loss?) ("),
        (("--model.student.num_step", "2"), 2, "num_step=2 (did you mean student.num_steps?) ("),
        (("--model.student", "{num_step: 2}"), 2, "'num_step' (did you mean student.num_steps?) ("),
        (("--data.batch", "3"), 2, "'batch' is not accepted: the class has no such option"),
        (("--data.augmentation.fli", "false"), 2, "fli=false (did you mean augmentation.flip?) ("),
        (("--trainer.max_step", "3"), 2, "max_step 3 (did you mean trainer.max_steps?) ("),
        (("--checkpoint.every_n_train", "3"), 2, "--checkpoint.every_n_train"),
        (("--trainer.precision", "16"), 1, "16 needs a GPU, on a CPU it is bf16-mixed or 32-true"),
        (("--trainer.precision", "16-mixed"), 1, "bf16-mixed or 32-true"),
        (("--model.gan.loss", "hing"), 2, "hing"),
        (("--model.gan.r1", "-1"), 1, "r1 must be at least 0"),
        (("--model.training.ema_decay", "2"), 1, "ema_decay"),
        (("--trainer.callbacks", "[{class_path: unidad_pl.Nope}]"), 2, "Nope"),
        (("--threads", "100000"), 1, "threads must be in [1, "),
        (("--config", "nowhere.yaml"), 2, "unidad fit: there is no config 'nowhere.yaml'"),
        (("--config=./confg.yaml",), 2, "there is no config './confg.yaml' (did you mean './config.yaml'?)"),
        (("-c", "no/folder.yml"), 2, "there is no config 'no/folder.yml'"),
        (("--trainer.gradient_clip_val", "1"), 1, "optimizer.clip"),
        (("--trainer.precision", "fp8"), 2, "bf16-mixed, 32-true, 64-true, bf16 or null, got fp8"),
        (("--trainer.max_epochs", "x"), 2, "trainer.max_epochs: must be a whole number or null, got x"),
        (("--trainer.max_steps", "x"), 2, "trainer.max_steps: must be a whole number, got x"),
        (("--data.shots", "x"), 2, "data.shots: must be a whole number or null, got x"),
        (
            ("--model.target_teacher.adaptation.until", "x"),
            2,
            "until: must be a whole number or null, got x",
        ),
        (("--model.gan.loss", "hing"), 2, "model.gan.loss: must be bce, hinge, lsgan or wgan, got hing"),
        (("--model.gan.taps", "3"), 2, "model.gan.taps: "),
        (("--trainer.callbacks", "foo"), 2, "must be the path of a class, MODULE.NAME, got foo"),
        (("--model", "mine.Own"), 2, "No module named 'mine': it lies in this folder, which Python does not search: "),
        (("--model", "nobodys.Own"), 2, "No module named 'nobodys' ("),
        (("--model", "unidad_pl.nobodys.Own"), 2, "module 'unidad_pl' has no attribute 'nobodys' ("),
    ],
)
@pytest.mark.usefixtures("here")
def test_one_sentence(options: tuple[str, ...], code: int, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("unidad_pl").mkdir()  # as in a clone, where it is found
    Path("mine.py").write_text("raise SystemExit('not to be imported')")
    line, ended = refused("fit", "--config", "config.yaml", *options, capsys=capsys)
    assert ended == code
    assert named in line
    assert line.startswith("unidad fit: ")


def test_the_class_of_a_checkpoint_that_is_not_found(here: Path) -> None:
    (here / "mine.py").write_text("")
    with pytest.raises(ValueError, match="is refused") as refusal:
        build_module({"model": {"class_path": "mine.Own"}}, "config.yaml")
    assert sentence_of(refusal.value) == (
        "the model in 'config.yaml' is refused: model: No module named 'mine': it lies in this folder, which Python "
        "does not search: PYTHONPATH=. unidad ..."
    )


@pytest.mark.usefixtures("here")
def test_an_overlay_alone_is_told_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    Path("over.yaml").write_text("model: {init_args: {student: {num_steps: 2}}}")
    line, code = refused("fit", "--config", "over.yaml", capsys=capsys)
    assert code == 2
    assert "no config before this one gives its class_path" in line
    Path("over.yaml").write_text("trainer: {max_steps: 2}")
    line, code = refused("fit", "--config", "over.yaml", capsys=capsys)
    assert code == 2
    assert "a config that has both comes first: --config configs/quickstart.yaml" in line


def test_tools_take_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    assert "arguments are required: model (" in refused("demo", capsys=capsys)[0]
    assert refused("report", "subjects", "--run", "x", capsys=capsys)[1] == 2
    assert refused("report", "memory", "--config", "nowhere.yaml", capsys=capsys)[1] == 1
    assert refused("report", "memories", capsys=capsys)[1] == 2
    assert refused("report", "everything", capsys=capsys)[1] == 1  # not near a command: a folder that is not there


NOBODY = "~nosuchuser/x"


@pytest.mark.parametrize("words", [
    ("sample", "--model", NOBODY, "--num", "1", "--out", "o"),
    ("sample", "--model", "m", "--num", "1", "--out", NOBODY),
    ("demo", "--model", NOBODY), ("export", "--ckpt_path", NOBODY, "--out", "o"), ("report", NOBODY),
    ("import", "adm", "--checkpoint", NOBODY, "--preset", "ffhq256", "--out", "o"), ("study", "--config", NOBODY),
    ("report", "memory", "--config", NOBODY), ("report", "subjects", "--runs", NOBODY),
    ("fit", "--config", "config.yaml", "--data.root", NOBODY),
    ("fit", "--config", "config.yaml", "--ckpt_path", NOBODY),
])  # fmt: skip
@pytest.mark.usefixtures("here")
def test_the_home_of_nobody_is_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line, code = refused(*words, capsys=capsys)
    assert code == 1
    assert "there is no '~nosuchuser/x': '~nosuchuser' is the home folder of nobody here; write it out" in line


def test_one_place_knows_home_folders() -> None:
    package = Path(files.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "expanduser" in path.read_text()] == ["files.py"]


@pytest.mark.usefixtures("here")
def test_debug_shows_where() -> None:
    with pytest.raises(ValueError, match="r1 must be at least 0"):
        main(["fit", "--debug", "--config", "config.yaml", "--model.gan.r1", "-1"])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS: dict[str, bytes] = {
    "deep": b"a: " + b"[" * 1200 + b"]" * 1200,
    "bomb": BOMB.encode(),
    "endless": b"a: &a [*a]",
    "tag": b"model: !!python/object/apply:os.system ['touch it_ran']",
    "list": b"- a\n- b\n",
    "word": b"hello",
    "number": b"3",
    "numbered": b"3: x\n",
    "utf-16": "model: x".encode("utf-16"),
    "binary": bytes(range(256)),
    "cut": b"model: {class_path: 'a",
    "tabs": b"model:\n\t- x\n",
    "unknown alias": b"model: *nowhere",
    "two documents": b"a: 1\n---\nb: 2\n",
    "unhashable": b"? [a, b]\n: c\n",
    "huge": b"a: " + b"x" * 10_000_001,
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_broken_configs(content: bytes, here: Path) -> None:
    Path("broken.yaml").write_bytes(content)
    with pytest.raises(BrokenFile, match=r"^'broken\.yaml' is no .*: write it as a YAML mapping") as error:
        read_config("broken.yaml")
    assert len(str(error.value).splitlines()) == 1
    assert not (here / "it_ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep", "bomb", "tag", "list", "binary"])
@pytest.mark.usefixtures("here")
def test_broken_configs_end_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.yaml").write_bytes(CONFIGS[name])
    for command in (("fit",), ("report", "memory")):
        line, code = refused(*command, "--config", "broken.yaml", capsys=capsys)
        assert code == 1
        assert "'broken.yaml' is no " in line


def test_aliases_and_empty_files_are_read(here: Path) -> None:
    Path("fine.yaml").write_text("a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}}\n")
    assert read_config("fine.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"x": 1}}
    for text in ("a: {b: 1}\na: {c: 2}", "x: {b: 1, b: 2}"):
        Path("twice.yaml").write_text(text)
        with pytest.raises(BrokenFile, match="stands twice in one mapping, in lines 1 and"):
            read_config("twice.yaml")
    Path("empty.yaml").write_text("# nothing\n")
    assert read_config("empty.yaml") == {}


CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def printed_config(capsys: pytest.CaptureFixture[str], *configs: dict[str, Any], options: tuple[str, ...] = ()) -> Any:
    words = []
    for number, config in enumerate(configs):
        Path(f"{number}.yaml").write_text(yaml.safe_dump(config))
        words += ["--config", f"{number}.yaml"]
    with pytest.raises(SystemExit) as ending:
        main(["fit", *words, *options, "--print_config"])
    captured = capsys.readouterr()
    assert ending.value.code == 0, captured.err
    return yaml.safe_load(captured.out)


def trainer(**options: Any) -> dict[str, Any]:
    return {"trainer": options}


@pytest.mark.usefixtures("here")
def test_a_later_list_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    first = {"class_path": CHECKPOINT, "init_args": {"monitor": "val/fid", "save_top_k": 3, "every_n_epochs": 1}}
    second = {"class_path": CHECKPOINT, "init_args": {"every_n_train_steps": 5}}
    config = printed_config(capsys, CONFIG, trainer(callbacks=[first]), trainer(callbacks=[second]))
    (callback,) = config["trainer"]["callbacks"]
    arguments = callback["init_args"]
    assert (arguments["monitor"], arguments["save_top_k"], arguments["every_n_train_steps"]) == (None, 1, 5)
    merged = merge_configs([trainer(callbacks=[first]), trainer(callbacks=[second])])
    assert merged == trainer(callbacks=[second])


@pytest.mark.usefixtures("here")
def test_a_list_on_the_command_line_replaces_too(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--trainer.callbacks", f"[{{class_path: {CHECKPOINT}}}]")
    config = printed_config(capsys, CONFIG, options=given)
    assert config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] is None
    part = printed_config(capsys, CONFIG, options=("--trainer.callbacks.save_top_k", "7"))
    arguments = part["trainer"]["callbacks"][0]["init_args"]
    assert (arguments["save_top_k"], arguments["every_n_train_steps"]) == (7, 2)


@pytest.mark.usefixtures("here")
def test_another_class_inherits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    board = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "x", "name": "y"}}
    rows = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "z"}}
    for one, other in ((board, rows), ([board], [rows])):
        config = printed_config(capsys, CONFIG, trainer(logger=one), trainer(logger=other))
        logger = config["trainer"]["logger"]
        logger = logger[0] if isinstance(logger, list) else logger
        assert logger["class_path"].endswith("CSVLogger")
        assert (logger["init_args"]["save_dir"], logger["init_args"]["name"]) == ("z", "lightning_logs")
    merged = merge_configs([trainer(logger=board), trainer(logger=rows)])
    assert merged == trainer(logger=rows)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_options_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIDAD_FIT__TRAINER__LOG_EVERY_N_STEPS", "7")
    monkeypatch.setenv("UNIDAD_FIT__TRAINER__MAX_STEPS", "8")
    config = printed_config(capsys, CONFIG, options=("--trainer.max_steps", "9"))["trainer"]
    assert (config["log_every_n_steps"], config["max_steps"]) == (1, 9)  # the config's, and the command line's
    assert printed_config(capsys, {"model": CONFIG["model"], "data": CONFIG["data"]})["trainer"]["max_steps"] == 8
    monkeypatch.setenv("UNIDAD_FIT__TRAINER__MAX_STPES", "8")
    line, _ = refused("fit", "--config", "config.yaml", capsys=capsys)
    assert "UNIDAD_FIT__TRAINER__MAX_STPES is no option" in line
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "UNIDAD_FIT__TRAINER__MAX_STEPS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processes", "environ", "message"),
    [
        (1, {"RANK": "3"}, "RANK=3 .* one process"),
        (1, {"LOCAL_RANK": "1", "SLURM_PROCID": "5"}, "LOCAL_RANK=1, SLURM_PROCID=5"),
        (1, {"RANK": "0", "WORLD_SIZE": "4"}, "WORLD_SIZE=4 .*all write the same files"),
        (1, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        (2, {"LOCAL_RANK": "0"}, "LOCAL_RANK=0 .*wait for 1 processes"),
        (2, {"LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=8 .* is 2"),
        (1, {}, None),
        (1, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, None),
        (1, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (2, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, None),
    ],
)
def test_stray_variables_of_launchers(processes: int, environ: dict[str, str], message: str | None) -> None:
    if message is None:
        check_launcher(processes, environ)
    else:
        with pytest.raises(RuntimeError, match=message):
            check_launcher(processes, environ)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_checkpoint_is_no_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would import ``_class_path`` and let the hyperparameters win over the config."""
    Path("evil.py").write_text("from pathlib import Path\nPath('it_ran').touch()\n")
    monkeypatch.syspath_prepend(".")
    hyper = {"_class_path": "evil.Model", "student": {"num_steps": 1}}
    torch.save({"state_dict": {}, "hyper_parameters": hyper, "pytorch-lightning_version": "2.0.0"}, "theirs.ckpt")
    for command in ("fit", "predict"):
        line, code = refused(command, "--config", "config.yaml", "--trainer.max_steps", "1", "--ckpt_path",
                             "theirs.ckpt", capsys=capsys)  # fmt: skip
        assert code == 1, line
        assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("worked", "given", "policy"), [(6, None, "PASSIVE"), (5, None, None), (0, None, None), (10, "ACTIVE", "ACTIVE")]
)
def test_threads_sleep_beside_busy_processes(
    worked: int, given: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([(100, 200), (100 + worked, 210)])
    monkeypatch.setattr("unidad_pl.cli.main.processor_ticks", lambda: next(ticks))
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_WAIT_POLICY": given})
    wait_passively_where_busy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_a_process_at_work_is_among_the_ticks() -> None:
    worked, passed = processor_ticks()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    worked_now, passed_now = processor_ticks()
    assert 5 <= worked_now - worked <= passed_now - passed
