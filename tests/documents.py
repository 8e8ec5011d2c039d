"""The code blocks of README.md and of the pages in docs/: what they say, and what can be checked of it without running.

Python is run by tests/test_docs_pages.py. A line of a shell block is read by the parser of the program it calls; a YAML
block is read as a config that is laid over the one its first line names.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "sh", "yaml", "text", "{toctree}", "{eval-rst}"}
BASE = "configs/quickstart.yaml"
PLACEHOLDERS = {"FILE": BASE, "CONFIG": BASE, "RUN": "runs/quickstart/version_0"}
"""Words in capitals stand for a reader's own; those that a parser would open are something of ours in the tests."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the file.
        line: where its first line of code is, from 1.
        language: of the fence.
        code: without the fence, and without its indentation.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        """``docs/page.md:12``."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in re.finditer(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", text, re.DOTALL | re.MULTILINE):
        code = re.sub(rf"^{fence[1]}", "", fence[4], flags=re.MULTILINE)
        found.append(Block(page, text.count("\n", 0, fence.start(4)) + 1, fence[3].strip(), code))
    return tuple(found)


# -- shell ------------------------------------------------------------------------------------------------------------


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block: comments dropped, lines that go on joined, variables filled in."""
    known: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) - set(";&|"):
                words.append(re.sub(r"\$\{?(\w+)\}?", lambda one: known.get(one[1], one[0]), word))
                continue
            while words and (given := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
                known[given[1]] = given[2]
                words = words[1:]
            if words:
                yield words
            words = []


def check_command(words: list[str], parsers: Any) -> None:
    """Refuse a command that its program would not take.

    Args:
        words: of the command.
        parsers: has ``lightning(words)`` and ``tool(words)``, which raise if ``unidad`` refuses them.

    Raises:
        AssertionError: it names a file, module, extra or option that is not there, or a program nothing is known of.
    """
    program = Path(words[0]).name or words[0]
    if program == "unidad":
        check_unidad(words[1:], parsers)
    elif program == "torchrun":
        module = words.index("-m")
        assert words[module + 1] == "unidad_pl.cli", words
        check_unidad(words[module + 2 :], parsers)
    elif program.startswith("python"):
        check_python(words[1:])
    elif program == "pip":
        check_pip(words[1:])
    elif program in ("sbatch", "docker"):
        files = [word for word in words[1:] if word.startswith(("configs/", "docker/"))]
        assert files, words
        for file in files:
            there(file)
    elif program == "sphinx-build":
        there("docs/conf.py")
    else:
        assert program in (".", "hf", "git"), f"nothing is known of the program {program!r}"


def there(path: str) -> None:
    """A file of the repository."""
    assert (ROOT / path).exists(), f"{path} is not there"


def check_unidad(words: list[str], parsers: Any) -> None:
    """``words`` after ``unidad``."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    for before, word in pairwise(words):
        if before == "--config" and word.startswith("configs/"):
            there(word)
    if words[0] in ("fit", "validate", "test", "predict"):
        runs = r"^(?:RUN|runs/(\w+)/version_\d+)/config\.yaml$"
        parsers.lightning([re.sub(runs, lambda run: _config_of(run[1]), word) for word in words])
    else:
        parsers.tool(words)


def _config_of(run: str | None) -> str:
    """The config that a run folder's name is that of."""
    config = f"configs/{run or 'quickstart'}.yaml"
    there(config)
    return config


def check_python(words: list[str]) -> None:
    """``words`` after ``python``: a module that is there and knows the options, or code that compiles and imports."""
    if words[0] == "-c":
        check_imports(ast.parse(words[1]))
        return
    assert words[0] == "-m", words
    spec = importlib.util.find_spec(words[1])
    assert spec is not None, f"there is no module {words[1]}"
    if words[1] in ("venv", "pytest"):  # their own options
        return
    main = importlib.util.find_spec(f"{words[1]}.__main__") if spec.submodule_search_locations else spec
    source = Path(str(main and main.origin)).read_text()
    for word in words[2:]:
        if word.startswith("tests/"):
            there(word)
        assert not word.startswith("--") or f'"{word}"' in source, f"{words[1]} has no option {word}"


def check_imports(tree: ast.AST) -> None:
    """Names that are imported from modules are in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def check_pip(words: list[str]) -> None:
    """Extras in brackets are those of pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    for word in words:
        if found := re.fullmatch(r"(?:\.|unidad_pl)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= extras, f"{word}: there are {sorted(extras)}"


# -- YAML -------------------------------------------------------------------------------------------------------------


def over(block: Block) -> str:
    """The config that a YAML block is laid over: what its first line names (``# over configs/quickstart.yaml``)."""
    named = re.match(r"# over (configs/[\w/]+\.yaml)", block.code)
    assert named, f"{block.place}: begin it with '# over configs/FILE.yaml', the config it is given after"
    there(named[1])
    assert isinstance(yaml.safe_load(block.code), dict), block.place
    return named[1]


# -- messages ---------------------------------------------------------------------------------------------------------

HOLE = "\0"


@cache
def messages() -> tuple[str, ...]:
    """Every text in the package's sources but docstrings, implicit concatenations joined, with a hole where a value is
    filled in."""
    found: list[str] = []
    for path in sorted((ROOT / "unidad_pl").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_a_message(quoted: str) -> bool:
    """Whether the package says ``quoted``, in which ``...`` stands for what is filled in."""
    pattern = re.compile(".*".join(re.escape(part) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in messages())
