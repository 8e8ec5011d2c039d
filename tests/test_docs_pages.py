"""Every code block of README.md and docs/: Python is run, commands and configs are parsed, messages are looked up."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.documents import LANGUAGES, PAGES, ROOT, Block, blocks_of, check_command, commands, is_a_message, over
from tests.worlds import fit, save_pictures, unidad
from unidad_pl import UniDAD, export_student

SHORT = 4
"""Iterations at most of a fit in an example."""


def pages_with(language: str, slow: Collection[str] = ()) -> list[Any]:
    """The pages with such blocks; those of the names ``slow`` take their time."""
    pages = [page for page in PAGES if any(block.language == language for block in blocks_of(page))]
    return [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in slow)) for p in pages]


def test_every_block_has_a_language_that_is_checked() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in LANGUAGES, f"{block.place}: a block of {block.language!r} is checked by nothing"
            assert block.language != "text" or page.name == "troubleshooting.md", f"{block.place}: what is this text?"


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations of a tiny student."""
    folder = tmp_path_factory.mktemp("docs") / "RUN"
    fit(unidad(), 2).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, no network, and fits that end after a few iterations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begin = pl.Trainer.__init__

    def short(trainer: pl.Trainer, **options: Any) -> None:
        loud = any(isinstance(one, pl.callbacks.ProgressBar) for one in options.get("callbacks", ()))
        quiet = dict(accelerator="cpu", enable_progress_bar=loud, enable_model_summary=loud)
        limits = dict(max_steps=min(options.get("max_steps", SHORT), SHORT), limit_val_batches=1, limit_test_batches=1)
        begin(trainer, **(options | quiet | limits))

    monkeypatch.setattr(pl.Trainer, "__init__", short)
    return tmp_path


def excerpt(code: str) -> bool:
    """Whether it shows lines of ``training_step``, which are compared with it and not run."""
    return code in textwrap.dedent(textwrap.dedent(inspect.getsource(UniDAD.training_step)).partition("\n")[2])


@pytest.mark.parametrize("page", pages_with("python", slow=("library", "own_loss", "own_discriminator")))
def test_python_runs(page: Path, here: Path, request: pytest.FixtureRequest) -> None:
    """The blocks of a page one after the other, as a reader would: PHOTOS is a folder of pictures, RUN a run's, and
    ``sunglasses`` its export."""
    blocks = [block for block in blocks_of(page) if block.language == "python" and not excerpt(block.code)]
    text = "".join(block.code for block in blocks)
    if "PHOTOS" in text:
        save_pictures(here / "PHOTOS", 12)
    if "RUN/" in text or '"sunglasses"' in text:
        (here / "RUN").symlink_to(request.getfixturevalue("run_folder"))
    if '"sunglasses"' in text:
        export_student("RUN/checkpoints/last.ckpt", "sunglasses")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for block in blocks:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


# -- the command line -------------------------------------------------------------------------------------------------


class Parsers:
    """What ``unidad`` reads its words with; nothing is built or run."""

    @staticmethod
    @cache
    def _lightning(subcommand: str) -> Any:
        from unidad_pl.cli.lightning import TRAINER_DEFAULTS, UnidadCLI
        from unidad_pl.cli.parsing import read_nested_nulls

        class Held(Exception):
            """Carries the parser out."""

        class Reader(UnidadCLI):
            def parse_arguments(self, parser: Any, args: Any) -> None:
                raise Held(parser)

        read_nested_nulls()
        try:
            Reader(
                pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
                seed_everything_default=0, trainer_defaults=TRAINER_DEFAULTS, args=[subcommand],
            )  # fmt: skip
        except Held as held:
            return held.args[0]
        raise AssertionError("the command line has no parser")

    def lightning(self, words: list[str]) -> Any:
        return self._parsed(*words)

    @cache  # noqa: B019 (there is one of these, and pages repeat commands)
    def _parsed(self, *words: str) -> Any:
        from unidad_pl.cli.parsing import later_values_replace

        with later_values_replace():
            try:
                return self._lightning(words[0]).parse_args(words)
            except SystemExit as ending:
                if ending.code:  # --print_config and --model.help end well
                    raise
        return None

    def tool(self, words: list[str]) -> None:
        from jsonargparse import ArgumentParser

        from unidad_pl.cli.main import TOOLS, _spelled_out

        name = next((name for name in (" ".join(words[:2]), words[0]) if name in TOOLS), None)
        assert name, f"unidad has no command {words[0]}"
        function = self.function(TOOLS[name])
        parser = ArgumentParser(exit_on_error=False)
        for one in inspect.signature(function).parameters.values():
            if one.kind == one.VAR_POSITIONAL:
                parser.add_argument(one.name, nargs="+", type=str)
        parser.add_function_arguments(function, as_group=False)
        parser.parse_args([_spelled_out(word, function) for word in words[len(name.split()) :]])

    @staticmethod
    def function(place: str) -> Any:
        module, _, name = place.partition(":")
        return getattr(importlib.import_module(module), name)


PARSERS = Parsers()


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parsed(page: Path, programs: bool) -> None:
    """Check the commands of a page: those that only ``unidad``'s large parser can read, or all others."""
    for block in blocks_of(page):
        if block.language == "sh":
            for words in commands(block.code):
                large = bool({"fit", "validate", "test", "predict"} & set(words)) and "pytest" not in words
                if large != programs:
                    try:
                        check_command(words, PARSERS)
                    except BaseException as error:
                        raise AssertionError(f"{block.place}: {' '.join(words)}\n{error}") from error


@pytest.mark.parametrize("page", pages_with("sh"))
@pytest.mark.usefixtures("repository")
def test_commands_name_what_is_there(page: Path) -> None:
    parsed(page, programs=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh"))
@pytest.mark.usefixtures("repository")
def test_commands_of_lightning_are_parsed(page: Path) -> None:
    parsed(page, programs=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("yaml"))
@pytest.mark.usefixtures("repository")
def test_configs_are_parsed(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language == "yaml":
            (tmp_path / "overlay.yaml").write_text(block.code)
            PARSERS.lightning(["fit", "--config", over(block), "--config", str(tmp_path / "overlay.yaml")])


@pytest.mark.parametrize(
    "line",
    [
        "unidad fit --config configs/nowhere.yaml",
        "unidad export --ckpt_path a.ckpt --out b --adapter",
        "unidad sample --model a",
        "unidad dance",
        "python -m tests.nowhere",
        "python -m tests.replay DIR --chekpoint FILE",
        "python -c 'from unidad_pl import Nothing'",
        "pip install -e '.[nothing]'",
        "sbatch configs/nowhere.sbatch",
        "dance now",
        "RUN=runs/nowhere/version_0; unidad test --config $RUN/config.yaml",
    ],
)
@pytest.mark.usefixtures("repository")
def test_a_wrong_command_is_noticed(line: str) -> None:
    for words in commands(line):
        with pytest.raises((Exception, SystemExit)):
            check_command(words, PARSERS)


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_a_wrong_option_is_noticed() -> None:
    for wrong in (["--model.gan.los", "hinge"], ["--trainer.max_steps", "many"], ["--data.shot", "3"]):
        with pytest.raises((AssertionError, SystemExit)) as ending:
            PARSERS.lightning(["fit", "--config", "configs/quickstart.yaml", *wrong])
        assert getattr(ending.value, "code", 2) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_options_in_the_text_are_there() -> None:
    """Options within sentences and tables: parts of a config, arguments of a tool, or the command line's own."""
    from unidad_pl.cli.main import TOOLS

    known = {f"--{name}" for place in TOOLS.values() for name in inspect.signature(PARSERS.function(place)).parameters}
    known |= {"--debug", "--help", "--model.help", "--model.source.help", "--print_config", "--node_rank"}
    known |= {"--requeue", "--signal=USR1@180"}  # sbatch's
    for config in ("quickstart", "sdp_lora", "finetune"):
        options = PARSERS.lightning(["fit", "--config", f"configs/{config}.yaml"]).as_dict()["fit"]
        known |= {f"--{path.replace('.init_args', '')}" for path in flat(options)}
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for option in re.findall(r"`(--[^\s`]+)[^`]*`", text):
            assert option.replace(".init_args", "") in known, f"{page.name}: there is no option {option}"


def flat(options: Any, before: str = "") -> Iterator[str]:
    """Dotted names of all entries."""
    for name, value in options.items() if isinstance(options, dict) else ():
        yield f"{before}{name}"
        yield from flat(value, f"{before}{name}.")


# -- messages ---------------------------------------------------------------------------------------------------------


QUOTED = [b for b in blocks_of(ROOT / "docs" / "troubleshooting.md") if b.language == "text"]


@pytest.mark.parametrize("block", QUOTED, ids=lambda b: str(b.line))
def test_the_package_says_what_is_quoted(block: Block) -> None:
    message = block.code.strip()
    assert "\n" not in message, f"{block.place}: one message in a block, on one line, so that it is found"
    assert len(message.replace("...", "").strip()) > 5
    assert is_a_message(message), f"{block.place}: the package does not say {message!r}"


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not is_a_message("the source teacher has gone home")
    assert not is_a_message("taps ... do not exist: this network has ...")


def test_every_callback_and_metric_has_an_example() -> None:
    import unidad_pl.callbacks
    import unidad_pl.metrics

    page = blocks_of(ROOT / "docs" / "metrics.md")
    code = "\n".join(block.code for block in page if block.language == "python")
    code = re.sub(r"^from .*$", "", code, flags=re.MULTILINE)
    for name in {*unidad_pl.callbacks.__all__, *unidad_pl.metrics.__all__} - {"IntraClusterResult"}:  # what one returns
        assert re.search(rf"\b{name}\b", code), f"docs/metrics.md has no example of {name}"
