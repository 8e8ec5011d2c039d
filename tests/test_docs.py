"""The documents say what the code does: links, excerpts, and every example in a docstring."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Literal

import pytest
import torch

import unidad_pl
from unidad_pl.modules import UniDAD

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [p for p in sorted((ROOT / "unidad_pl").rglob("*.py")) if ">>> " in p.read_text()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_what_they_name(document: Path) -> None:
    """A link to a line, ``[`name`](file.py#L7)``, leads to the line that defines the name, and one to a part of a page,
    ``[text](page.md#part)``, to a heading."""
    for name, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}, which is not there"
        if part and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            known = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert part in known, f"{document.name}: {file.name} has no part {part!r}, only {', '.join(known)}"
            continue
        line = part.removeprefix("L")
        if line:
            wanted = re.compile(rf"\s*(def|class) {re.escape(name.strip('`'))}\b")
            lines = file.read_text().splitlines()
            right = [number for number, text in enumerate(lines, 1) if wanted.match(text)]
            assert int(line) in right, f"{document.name}: {name} is at line {right} of {path}, not {line}"


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "docs" / "method.md"], ids=lambda p: p.name)
def test_the_excerpt_of_training_step_is_the_code(document: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    (excerpt,) = [block for block in blocks if "self.micro_batches" in block]
    assert excerpt in textwrap.dedent(textwrap.dedent(inspect.getsource(UniDAD.training_step)).partition("\n")[2])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "unidad_pl")))
def test_examples_in_docstrings_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path.name == "demo_page.py":
        pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = {"torch": torch, "Path": Path, "Literal": Literal}
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, extraglobs=found, optionflags=options, raise_on_error=False)
    assert not failed


def test_the_table_of_faults_names_tests_that_are_there() -> None:
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if "_" in line and "|" in line]
    named = 0
    for part in (part for row in rows for part in row.split("|")[-2].split(";")):
        file, _, tests = part.strip().partition(": ")
        there = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
        for test in tests.split(", "):
            assert test in there, f"docs/reliability.md names {file}: {test}, which is not there"
            named += 1
    assert named > 50


def test_every_public_class_has_an_example() -> None:
    public = [getattr(unidad_pl, name) for name in unidad_pl.__all__ if name != "__version__"]
    bare = [one.__name__ for one in public if inspect.isclass(one) and ">>> " not in (one.__doc__ or "")]
    assert not bare


def test_public_names_are_lazy_and_complete() -> None:
    code = (ROOT / "unidad_pl" / "__init__.py").read_text()
    imported = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"importlib", "importlib.metadata", "typing"}
    assert unidad_pl.__version__.count(".") == 2
    assert set(unidad_pl.__all__) <= set(dir(unidad_pl))
    with pytest.raises(AttributeError, match="no attribute 'UniDad'"):
        unidad_pl.UniDad  # noqa: B018


def test_the_readme_begins_with_a_command_and_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```sh") < 25, "the first command is on the first screen"
    assert len(lines) <= 155, "what is longer belongs into a page of docs/"
