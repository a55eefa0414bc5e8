"""Who may import whom: each module only from the layers below its own. The lists are the specification; edit them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import networkx as nx
import pytest

from tests.root import ROOT

PACKAGE = "l2c_compile"

# Lowest first. A name is that of a folder or of a file at the top of the package; "" is the package's own __init__.py.
# A folder imports only from the lines above its own, and freely inside itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress"),
    ("files", "kernels", "loops", "state"),
    ("schedules",),
    ("models", "graphs"),
    ("analyses", "frontend"),
    ("passes",),
    ("backends", "checking", "sampler_file", "compile", "finders"),
    ("samplers", "methods", "torch_backend"),
    ("api",),
    ("",),
    ("quality",),
    ("cli", "__main__"),
)

# Stricter than its line: who may import what of ours, file by file. The first pattern that fits an importer counts.
ONLY: tuple[tuple[str, tuple[str, ...]], ...] = (
    # What Python holds is asked of Python alone.
    ("state.*", ("state.*",)),
    # The oracle shares nothing with the compiler it judges, and the proof nothing with the passes it judges.
    ("checking.reference", ("errors", "schedules.*")),
    ("checking.first_call", ("errors", "schedules.*", "graphs.*", "checking.*", "state.*")),
    ("checking.*", ("errors", "schedules.*", "graphs.*", "analyses.*", "checking.*")),
    # A kernel knows of no graph and no other kernel.
    ("kernels._launch", ("errors",)),
    ("kernels.*", ("errors", "kernels._launch")),
    # Only the pipeline puts passes together. A pass knows of no other, of no sampler, no model and no file.
    ("passes.pipeline", ("errors", "graphs.*", "passes.*")),
    ("passes.base", ("errors", "schedules.*", "graphs.*", "analyses.*")),
    ("passes.*", ("errors", "kernels.*", "schedules.*", "graphs.*", "analyses.*", "passes.base")),
)


@dataclass(frozen=True)
class Import:
    """One import, with the names below ``l2c_compile``."""

    importer: str
    imported: str
    line: int


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_of(name: str) -> int | None:
    """Return the index of the line that holds a module's folder, or None if no line knows it."""
    return next((index for index, layer in enumerate(LAYERS) if name.partition(".")[0] in layer), None)


def complaint(edge: Import) -> str | None:
    """Return why an import is not allowed, or None if it is."""
    importer, imported = edge.importer, edge.imported
    low, high = layer_of(imported), layer_of(importer)
    where = f"{PACKAGE}.{importer} line {edge.line}" if importer else f"{PACKAGE} line {edge.line}"
    what = f"{where} imports {PACKAGE}.{imported}".rstrip(".")
    if low is None or high is None:
        return f"{what}: a module that no layer knows; add it to LAYERS"
    inside = importer.partition(".")[0] == imported.partition(".")[0]
    if low > high:
        return f"{what}, which stands above it"
    # The command line is one line of two: __main__ only starts it.
    if low == high and not inside and importer != "__main__":
        return f"{what}, which stands beside it; move what both need one layer down"
    allowed = next((allowed for pattern, allowed in ONLY if fnmatchcase(importer, pattern)), None)
    if allowed is not None and not matches(imported, allowed):
        return f"{what}; it may import only {', '.join(allowed)}"
    return None


def imports_of(name: str, source: str, modules: Iterable[str], *, is_package: bool = False) -> Iterator[Import]:
    """Yield the imports of our own modules, those in functions and under ``if TYPE_CHECKING`` included."""
    known = set(modules)
    here = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = here[: len(here) - node.level + is_package] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            # What follows `from l2c_compile.passes import` may be a module or something in it.
            for alias in node.names:
                child = f"{parent}.{alias.name}"
                targets.append(child if child.removeprefix(f"{PACKAGE}.") in known else parent)
        for target in dict.fromkeys(targets):
            if target == PACKAGE or target.startswith(f"{PACKAGE}."):
                yield Import(name, target[len(PACKAGE) + 1 :], node.lineno)


def module_files() -> dict[str, Path]:
    """Return every module of the package by its name below ``l2c_compile``."""
    files = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "passes", "passes."), (ROOT / "kernels", "kernels.")):
        links = [folder / "passes", folder / "kernels"]
        for path in sorted(folder.rglob("*.py")):
            if any(link in path.parents for link in links):
                continue
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            files[prefix + dotted.removesuffix("__init__").removesuffix(".")] = path
    return files


FILES = module_files()


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    assert layer_of(name) is not None, f"{PACKAGE}.{name} is in no layer; add it to LAYERS in {Path(__file__).name}"
    path = FILES[name]
    found = imports_of(name, path.read_text(encoding="utf-8"), FILES, is_package=path.name == "__init__.py")
    assert [text for edge in found if (text := complaint(edge))] == []


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_neither_tests_nor_bench(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots = {node.module.split(".")[0]}
        else:
            continue
        assert not roots & {"tests", "bench", "conftest"}


def test_the_top_of_the_package_holds_only_where_to_start() -> None:
    wanted = {"__init__", "__main__", "api", "compile", "errors", "progress", "torch_backend"}
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} == wanted


def test_no_imports_go_round_in_a_circle() -> None:
    graph = nx.DiGraph()
    for name, path in FILES.items():
        found = imports_of(name, path.read_text(encoding="utf-8"), FILES, is_package=path.name == "__init__.py")
        # A folder's __init__.py hands on what its files hold.
        graph.add_edges_from((edge.importer, edge.imported) for edge in found if edge.importer != edge.imported)
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_no_two_names_differ_only_in_their_ending() -> None:
    by_root: dict[str, set[str]] = {}
    for path in FILES.values():
        root = re.sub(r"(ations?|ings?|ers?|ed|es|s|e|d)$", "", path.stem)
        by_root.setdefault(root, set()).add(path.stem)
    assert [names for names in by_root.values() if len(names) > 1] == []


def test_no_module_stands_in_two_layers() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("importer", "imported", "message"),
    [
        ("graphs.nodes", "schedules.sites", None),
        ("schedules.sites", "graphs.nodes", "stands above it"),
        ("analyses.cost", "frontend.trace", "stands beside it"),
        ("frontend.unroll", "frontend.trace", None),
        ("passes.drop_dead", "passes.base", None),
        ("passes.drop_dead", "passes.fold_constants", "may import only"),
        ("passes.drop_dead", "passes.pipeline", "may import only"),
        ("passes.pipeline", "passes.drop_dead", None),
        ("passes.drop_dead", "loops.ddim", "may import only"),
        ("passes.drop_dead", "backends.lower", "stands above it"),
        ("passes.lower_gated_add", "kernels.gated_add", None),
        ("kernels.gated_add", "kernels._launch", None),
        ("kernels.gated_add", "kernels.hold", "may import only"),
        ("checking.reference", "schedules.rules", None),
        ("checking.reference", "graphs.nodes", "may import only"),
        ("checking.proof", "frontend.capture", "may import only"),
        ("methods.fora", "finders.formulas", None),
        ("finders.formulas", "methods.fora", "stands above it"),
        ("methods.fora", "samplers.compiled", "stands beside it"),
        ("api", "", "stands above it"),
        ("cli.main", "", None),
        ("__main__", "cli.main", None),
        ("graphs.nodes", "surprise", "no layer knows"),
        ("surprise", "errors", "no layer knows"),
    ],
)
def test_the_rules_say_what_they_mean(importer: str, imported: str, message: str | None) -> None:
    got = complaint(Import(importer, imported, 1))
    assert (message is None and got is None) or (message is not None and message in (got or ""))


def test_every_way_to_write_an_import_is_seen() -> None:
    source = """
import os, l2c_compile.graph
from l2c_compile.errors import L2CError
from l2c_compile import schedule, l2c_compile
from . import base
from .base import Pass
from ..rules import Hold
def late():
    from l2c_compile.passes import base
"""
    known = ["", "graph", "errors", "schedule", "rules", "passes", "passes.base"]
    found = {(edge.imported, edge.line) for edge in imports_of("passes.drop_dead", source, known)}
    assert found == {
        ("graph", 2),
        ("errors", 3),
        ("schedule", 4),
        ("", 4),
        ("passes.base", 5),
        ("passes.base", 6),
        ("rules", 7),
        ("passes.base", 9),
    }


def test_a_relative_import_in_a_package_starts_at_the_package() -> None:
    (edge,) = imports_of("loops", "from .ddim import ddim", ["loops", "loops.ddim"], is_package=True)
    assert edge.imported == "loops.ddim"
