"""The order of the rooms: a file imports from rooms below its own only, in no circle, and nothing grows large."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "unidad_pl"
ROOMS = (
    "checks", "arguments", "files", "flops", "seeds", "store", "schedules", "condition", "denoiser", "losses",
    "discriminator", "sampling", "cartoons", "data", "metrics", "callbacks", "backbones", "strategies", "training",
    "modules", "runs", "export", "report", "cli",
)  # fmt: skip
"""From the ground up; a folder is one room."""
LIGHT = {"lightning", "diffusers", "torchvision", "lpips", "torch_fidelity", "rich", "PIL", "transformers", "peft"}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in FILES}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports, ``from package import file`` included."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def files_imported(path: Path) -> set[str]:
    own = {name.removeprefix("unidad_pl.") for name in imports(path) if name.startswith("unidad_pl.")}
    found = own & set(NAMES)
    # of "from unidad_pl.data import batch" the package itself is not meant
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_every_file_has_a_room() -> None:
    assert {name.partition(".")[0] for name in NAMES} == set(ROOMS)


@pytest.mark.parametrize("name", NAMES)
def test_files_import_from_rooms_below_only(name: str) -> None:
    room = name.partition(".")[0]
    for other in files_imported(NAMES[name]):
        below = other.partition(".")[0]
        assert below == room or ROOMS.index(below) < ROOMS.index(room), f"{name} imports {other}, a room above"
        own = below in ("metrics", "checks", "files")
        assert room != "metrics" or own, f"{name} imports {other}: metrics need nothing of the method"


def test_no_file_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({name: files_imported(path) for name, path in NAMES.items()}).prepare()


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Importing a metric must not cost Lightning; importing a backbone must not cost diffusers."""
    light_rooms = {*ROOMS[:10], "metrics", "backbones"}
    for name, path in NAMES.items():
        heavy = {imported.split(".")[0] for imported in imports(path, everywhere=False)} & LIGHT
        assert name.partition(".")[0] not in light_rooms or not heavy, f"{name} imports {heavy} at its top"


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_stay_small(name: str) -> None:
    text = NAMES[name].read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"
            parameters = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert len(parameters) <= 12, f"{node.name} has {len(parameters)} parameters"
