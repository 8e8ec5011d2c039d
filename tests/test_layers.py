"""A file imports only from lower layers, or from its own package (DESIGN, Layers)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "unidad_pl"
LAYERS = [
    {"schedules", "losses", "discriminator", "metrics", "seeds"},
    {"denoiser", "data.batch"},
    {"backbones", "sampling"},
    {"modules", "distributed", "sharding", "checkpoints", "data", "pipeline"},
    {"callbacks", "summary"},
    {"memory", "runs", "subjects", "export", "export_text", "sample", "cli", "lightning_cli", "going_on"},
]
LIGHT = {"lightning", "diffusers", "torchvision", "lpips", "torch_fidelity", "rich", "PIL"}


def unit(path: Path) -> str:
    """The layer entry a file belongs to: its package, or itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts)
    return dotted if any(dotted in layer for layer in LAYERS) else parts[0]


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside_functions else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "__init__.py"]


def test_files_import_from_lower_layers_only() -> None:
    wrong = []
    for path in FILES:
        own = unit(path)
        for name in imports(path):
            if not name.startswith("unidad_pl."):
                continue
            target = ROOT / Path(*name.split(".")[1:])
            file = target.with_suffix(".py") if target.with_suffix(".py").exists() else target / "__init__.py"
            if not file.exists():
                continue  # a class or function inside a module that is listed too
            other = unit(target.with_suffix(".py"))
            if level(other) > level(own) or (level(other) == level(own) and other != own and level(own) in (0, 2)):
                allowed = {("discriminator", "losses"), ("losses", "schedules")}
                if (own, other) not in allowed:
                    wrong.append(f"{path.relative_to(ROOT)} (layer {level(own)}) imports {name} (layer {level(other)})")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """Importing a metric must not cost Lightning; importing a backbone must not cost diffusers."""
    for path in FILES:
        heavy = {name.split(".")[0] for name in imports(path, inside_functions=False)} & LIGHT
        if level(unit(path)) <= 2:
            assert not heavy, f"{path} imports {heavy} at its top"


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 350, f"{path} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
