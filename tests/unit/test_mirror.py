"""Every module of the package has its tests at the mirrored place, and every test file here is about a module."""

from __future__ import annotations

from pathlib import PurePosixPath

from tests.root import ROOT

PACKAGE = ROOT / "l2c_compile"
UNIT = ROOT / "tests" / "unit"

WITHOUT_TESTS: dict[str, str] = {
    "__main__.py": "one call of main; cli/test_main.py runs it",
    "cli/options.py": "declarations only; the tests of each command give them",
    "kernels/_launch.py": "what the kernels share; theirs are its tests",
    "progress.py": "a type, and a function that does nothing",
}
"""Modules without a test file of their own, with the reason."""

ABOUT_MORE: dict[str, str] = {
    "test_imports.py": "who may import whom, over the whole package",
    "test_mirror.py": "where tests stand",
    "test_packaging.py": "what is installed",
    "test_prose.py": "docstrings and comments of all files",
}
"""Test files that are about no single module, with the reason."""


def modules() -> set[PurePosixPath]:
    """Return the modules as paths below the package; what an ``__init__`` hands on is tested where it is made."""
    # Paths are listed folder by folder because a search does not follow the links to passes and kernels.
    folders = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "data")]
    files = [file.relative_to(PACKAGE) for folder in folders for file in folder.glob("*.py")]
    return {PurePosixPath(file) for file in files if file.name != "__init__.py"}


def found_tests() -> set[PurePosixPath]:
    return {PurePosixPath(file.relative_to(UNIT)) for file in UNIT.rglob("test_*.py")}


def mirror_of(module: PurePosixPath) -> PurePosixPath:
    return module.with_name(f"test_{module.name}")


def test_every_module_has_its_tests_at_the_mirrored_place() -> None:
    missing = {str(module) for module in modules() if mirror_of(module) not in found_tests()}
    assert missing == WITHOUT_TESTS.keys()


def test_every_test_file_is_about_a_module() -> None:
    mirrored = set(map(mirror_of, modules()))
    assert {str(file) for file in found_tests() if file not in mirrored} == ABOUT_MORE.keys()


def test_every_exception_has_a_reason() -> None:
    assert all([*WITHOUT_TESTS.values(), *ABOUT_MORE.values()])
