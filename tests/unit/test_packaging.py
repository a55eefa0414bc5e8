"""The wheel holds all of the package and nothing else, and ``passes`` and ``kernels`` are nobody's top-level names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.root import ROOT

PACKAGE = "l2c_compile"
# Folder at the root of the checkout -> folder in the wheel.
FOLDERS = {PACKAGE: PACKAGE, "passes": f"{PACKAGE}/passes", "kernels": f"{PACKAGE}/kernels"}


def source_files() -> dict[str, Path]:
    """Return the files of the checkout that make up the package, by their path in the wheel."""
    files = {}
    for folder, target in FOLDERS.items():
        links = [ROOT / folder / name for name in ("passes", "kernels")]
        for path in sorted((ROOT / folder).rglob("*")):
            skipped = "__pycache__" in path.parts or any(link == path or link in path.parents for link in links)
            if path.is_file() and not skipped:
                files[f"{target}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def modules() -> list[str]:
    """Return the dotted name of every module."""
    return [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in source_files()
        if name.endswith(".py")
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout, without a network and without leftovers of an earlier build."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    build = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def run_python(code: str, *, cwd: Path, path: list[Path]) -> str:
    """Run code in a fresh interpreter that finds modules in the given folders first."""
    setup = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    command = [sys.executable, "-c", setup + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_holds_every_module_and_data_file_and_no_other_package(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    wanted = {name for name in source_files() if not name.endswith("README.md")}
    assert wanted - names == set(), "a folder is missing from tool.setuptools packages, or a file from package-data"
    assert f"{PACKAGE}/py.typed" in names

    info = next(name for name in names if name.endswith(".dist-info/top_level.txt"))
    assert zipfile.ZipFile(wheel).read(info).decode().split() == [PACKAGE]
    assert {name.split("/")[0] for name in names} == {PACKAGE, info.split("/")[0]}

    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import importlib.util
for name in {modules()!r}:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None and spec.origin.startswith({str(tmp_path)!r}), (name, spec)
"""
    run_python(code, cwd=tmp_path, path=[tmp_path])


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_a_folder_that_must_lose_to_a_real_package_has_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_the_links_are_relative(folder: str) -> None:
    assert (ROOT / PACKAGE / folder).readlink() == Path("..", folder)


def test_a_bare_checkout_finds_every_module(tmp_path: Path) -> None:
    code = f"""
import importlib.util
for name in {modules()!r}:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None and spec.origin.startswith({str(ROOT)!r}), (name, spec)
"""
    run_python(code, cwd=tmp_path, path=[ROOT])


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_a_real_package_wins_over_the_folder_of_the_checkout(name: str, tmp_path: Path) -> None:
    real = tmp_path / name / "__init__.py"
    real.parent.mkdir()
    real.touch()
    code = f"import {name}, l2c_compile.{name}; print({name}.__file__)"
    assert run_python(code, cwd=tmp_path, path=[ROOT, tmp_path]) == str(real)
