"""Sphinx: the pages of this folder, and the API reference from the docstrings of every public name.

``pip install -e '.[docs]' && sphinx-build -W -n --keep-going docs docs/_build``
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx.ext.napoleon.docstring import GoogleDocstring

import unidad_pl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
API = HERE / "api"

project = "unidad_pl"
author = "the unidad_pl authors"
release = version = unidad_pl.__version__
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton",
]  # fmt: skip
exclude_patterns = ["_build", "study/runs"]
suppress_warnings = ["myst.header"]  # the study's tables have no title of their own
html_theme = "furo"
html_title = f"unidad_pl {release}"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_show_copyright = False
pygments_style = "friendly"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # Lightning's refer to pages of Lightning
python_use_unqualified_type_names = True

# Types are in the signatures: what stands before a colon is text here, and napoleon would take it for a type.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._consume_to_end())  # type: ignore[method-assign]
GoogleDocstring._consume_returns_section = lambda self, preprocess_types=False: [  # type: ignore[method-assign]
    ("", "", self._dedent(self._consume_to_next_section()))
]

# -- the API reference: a page for every room, written from the public names ------------------------------------------

WHOLE = ("denoiser", "sampling", "losses", "schedules", "discriminator", "metrics")
"""Rooms of which all names are shown that they hand out, and not only those of ``unidad_pl`` itself."""
source_links: set[tuple[str, str]] = set()
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def reference() -> dict[str, dict[str, str]]:
    """Room -> where a thing is defined -> the name it is shown with: the public names, what the pages link to, and the
    bases of all these."""
    shown: dict[str, dict[str, str]] = {}

    def show(module: str, name: str) -> None:
        thing = getattr(importlib.import_module(module), name)
        if not callable(thing) or not thing.__doc__ or not thing.__module__.startswith("unidad_pl."):
            return
        shown.setdefault(room_of(thing), {}).setdefault(f"{thing.__module__}.{name}", f"{module}.{name}")
        for base in getattr(thing, "__bases__", ()):
            if base.__name__[0] != "_" and f"{base.__module__}.{base.__name__}" not in shown.get(room_of(base), {}):
                show(base.__module__, base.__name__)

    for name in unidad_pl.__all__:
        if name != "__version__":
            show("unidad_pl", name)
    for room in WHOLE:
        module = importlib.import_module(f"unidad_pl.{room}")
        own = (n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_")
        for name in getattr(module, "__all__", sorted(own)):
            show(module.__name__, name)
    for page in HERE.glob("*.md"):
        for _, target in LINK.findall(page.read_text()):
            path, _, line = target.partition(".py#L")
            if line:
                show(*top_level(name_at(HERE / f"{path}.py", int(line))))
    return shown


def room_of(thing: Any) -> str:
    """The part of the package it belongs to."""
    return f"{thing.__module__}.".split(".")[1]


def top_level(name: str) -> tuple[str, str]:
    """Module and name in it of the class or function that ``name`` is, or is in."""
    module, _, rest = name.rpartition(".")
    while not is_module(module):
        module, _, rest = module.rpartition(".")
    return module, rest


@cache
def is_module(name: str) -> bool:
    """Whether ``name`` can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def write_reference() -> None:
    """One page for every room."""
    API.mkdir(exist_ok=True)
    for room, names in reference().items():
        module = importlib.import_module(f"unidad_pl.{room}")
        about = (module.__doc__ or "").strip()
        lines = [f"# {room}", "", "```{eval-rst}", f".. currentmodule:: unidad_pl.{room}", "", about, ""]
        for home, called in sorted(names.items(), key=lambda pair: pair[1].lower()):
            kind = "class" if isinstance(resolve(home), type) else "function"
            lines += [f".. auto{kind}:: {called}", *["   :members:"] * (kind == "class")]
            lines += [*["   :show-inheritance:"] * (getattr(resolve(home), "__bases__", (object,)) != (object,)), ""]
        write(API / f"{room}.md", "\n".join([*lines, "```", ""]))


def write(path: Path, text: str) -> None:
    """Leave a page alone that is the same, so that the next build need not read it again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


@cache
def resolve(name: str) -> Any:
    """The object with this dotted name; None if there is none."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if is_module(".".join(parts[:cut])):
            thing: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                thing = getattr(thing, part, getattr(thing, "__annotations__", {}).get(part))
            return thing
    return None


@cache
def named(target: str, module: str, owner: str) -> Any:
    """What a docstring in a class ``owner`` of ``module`` means by ``target``; None if nothing has that name."""
    kind = resolve(f"{module}.{owner}") if owner else None
    if kind is not None and hasattr(kind, target.partition(".")[0]):
        return resolve(f"{kind.__module__}.{kind.__qualname__}.{target}")
    ours = sorted(name for name in sys.modules if name.startswith("unidad_pl"))
    for place in (target, *(f"{name}.{target}" for name in (module, *ours, "builtins"))):
        if (found := resolve(place)) is not None:
            return found
    of_instance = kind is not None and re.search(rf"\bself\.{re.escape(target)}\b", inspect.getsource(kind))
    return kind if of_instance else None


def refer(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name that is there, but not in this reference (torch's, or one of our inner rooms), is shown as it is, a method
    without a text of its own leads to its class; one that is not there stays an error."""
    target = node.get("reftarget", "").partition("[")[0]
    if node.get("refdomain") != "py" or not target:
        return None
    thing = named(target, node.get("py:module") or "unidad_pl", node.get("py:class") or "")
    if thing is None:
        return None
    name = getattr(thing, "__qualname__", "")
    home = getattr(thing, "__module__", "")
    for known in (f"{home}.{name}", f"unidad_pl.{name}", f"{home}.{name.rpartition('.')[0]}"):
        if known != target and known in env.domains["py"].objects:
            return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", known, node, content)
    return content


# -- links of the pages to files of the repository --------------------------------------------------------------------


def name_at(file: Path, line: int) -> str:
    """Dotted name of what is defined at a line of a module; ValueError where nothing is."""
    file = Path(os.path.normpath(file))
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    found: list[str] = []

    def look(node: ast.AST, before: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                name = f"{before}.{child.name}"
                if child.lineno == line:
                    found.append(name)
                look(child, name)

    look(ast.parse(file.read_text()), module)
    if not found:
        raise ValueError(f"a page links to line {line} of {file}, where nothing is defined: give the line of the name")
    return found[0]


def link_files(app: Any, docname: str, content: list[str]) -> None:
    """On GitHub a link leads to a file, or to a line of it; here to a download, or to that line in the source pages."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, line = target.partition("#L")
        file = Path(os.path.normpath((HERE / docname).parent / path))
        if "://" in target or not file.exists() or file.is_relative_to(HERE):
            return match[0]
        if file.is_dir():
            return text
        bare = text.strip("`")
        if not line:
            return f"{{download}}`{bare} <{path}>`"
        whole = name_at(file, int(line))
        module, name = top_level(whole)
        if resolve(whole).__doc__:  # else it has no place of its own there, but its class has
            name = whole.removeprefix(f"{module}.")
        page = f"_modules/{module.replace('.', '/')}.html"
        source_links.add((page, name))
        return f'<a class="reference internal" href="{page}#{name}"><code class="xref literal">{bare}</code></a>'

    content[0] = LINK.sub(link, content[0])
    titles = {"study/README": "Tables and pictures of the study", "study/heads/README": "Tables of where heads sit",
              "study/gradient/README": "Tables of which steps carry gradient"}  # fmt: skip
    if docname in titles and not content[0].startswith("# "):
        content[0] = f"# {titles[docname]}\n\n{content[0]}"


def check_source_links(app: Any, error: Exception | None) -> None:
    """What the pages link to is in the source pages.

    Raises:
        ExtensionError: names the first that is not.
    """
    for page, name in sorted(source_links) if error is None and app.builder.name == "html" else ():
        file = Path(app.outdir) / page
        if not file.is_file() or f'id="{name}"' not in file.read_text(encoding="utf-8"):
            raise ExtensionError(f"the pages link to {page}#{name}, which is not there")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    write_reference()
    app.connect("source-read", link_files)
    app.connect("missing-reference", refer)
    app.connect("build-finished", check_source_links)
