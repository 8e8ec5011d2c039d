"""Wheel and sdist hold all that belongs to them, and the wheel works outside the source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.export.made import export, pixel_student
from unidad_pl.data.pictures import is_whole_png

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("unidad_pl", "configs", "docs", "docker", "tests", ".readme", ".ci")
(VERSION,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
pytestmark = [pytest.mark.slow, pytest.mark.ci]


def sources(*places: str) -> set[str]:
    """Files that belong to the project, relative to its root; what Python and tools leave behind is not among them."""
    found = {path for place in places for path in (ROOT / place).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, made from the sdist, and the sdist."""
    place = tmp_path_factory.mktemp("package")
    tree = place / "tree"
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for file in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy(file, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"unidad_pl-{VERSION}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == sources("unidad_pl")
    assert "unidad_pl/py.typed" in names
    assert "unidad_pl/assets/cartoon_teacher/diffusion_pytorch_model.safetensors" in names


def test_the_sdist_holds_what_tests_and_documents_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert sources("unidad_pl", "configs", "tests") <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml"} <= names


def test_all_files_name_one_version() -> None:
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_wheel_draws_outside_the_source_tree(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees the packages of this one."""
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python, folder = (
        tmp_path / "venv" / "bin" / "python",
        ("lib", f"python{sys.version_info.major}.{sys.version_info.minor}"),
    )
    site = tmp_path.joinpath("venv", *folder, "site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    unidad = python.with_name("unidad")
    assert Path(run(python, "-c", "import unidad_pl; print(unidad_pl.__file__)").strip()).is_relative_to(site)
    assert run(unidad, "--version") == f"unidad {VERSION}\n"
    assert "unidad fit --config" in run(unidad, "--help")
    model = export(pixel_student(), tmp_path / "model")
    run(unidad, "sample", "--model", model, "--num", 1, "--out", "images", "--device", "cpu")
    assert is_whole_png(tmp_path / "images" / "000000.png")
