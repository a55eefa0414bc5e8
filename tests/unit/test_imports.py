"""Who may import whom: each module only from the layers below its own. The lists are the specification; edit them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "l2c_compile"

# Lowest first. Names are below l2c_compile; "" is its __init__.py. A name beats a pattern, and may be of a module that
# does not exist.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("aliases", "compile_cache", "files", "weights_lock"),
    ("archive",),
    ("kernels", "kernels._launch"),
    ("kernels.*",),
    ("rules", "sites", "schedule"),
    ("forms",),
    ("graph",),
    ("values",),
    ("loops", "loops.*", "models", "models.*"),
    ("verify",),
    ("columns", "cost", "liveness", "strides"),
    ("router", "importers", "capture", "trace", "unroll", "dynamo_graph"),
    ("exported",),
    ("graph_lines",),
    ("passes", "passes.base"),
    ("passes.*",),
    ("passes.pipeline",),
    ("cuda_graphs",),
    ("backend",),
    ("reference", "proof"),
    ("comparison", "summary"),
    ("saved", "prediction"),
    ("api", "dynamo_backend"),
    ("",),
    ("finders", "finders.*", "quality", "testing"),
    ("report", "plots", "named_models"),
    ("evaluation",),
    (
        *("cli", "cli_schedule", "demo", "inspection", "learning", "preview", "profiling", "scheduling"),
        *("verification", "__main__"),
    ),
)

# Within one layer nobody may import anybody, except (importer, imported). No pass may ever import another pass.
SIDEWAYS: tuple[tuple[str, str], ...] = (
    ("sites", "rules"),
    ("schedule", "rules"),
    ("schedule", "sites"),
    ("loops", "loops.*"),
    ("loops.*", "loops.*"),
    ("models", "models.*"),
    ("models.*", "models.*"),
    ("liveness", "cost"),
    ("importers", "router"),
    ("trace", "capture"),
    ("unroll", "capture"),
    ("dynamo_graph", "capture"),
    ("unroll", "trace"),
    ("finders", "finders.*"),
    ("finders.*", "finders.*"),
    ("report", "plots"),
    ("cli", "cli_schedule"),
    ("cli_schedule", "scheduling"),
    ("cli", "demo"),
    ("cli", "profiling"),
    ("cli", "inspection"),
    ("cli", "learning"),
    ("cli", "preview"),
    ("cli", "verification"),
    ("__main__", "cli"),
)

# Stricter than its layer: these import nothing of ours but what is listed.
ONLY: dict[str, tuple[str, ...]] = {
    # The oracle shares nothing with the compiler it judges.
    "reference": ("errors", "rules", "sites", "schedule"),
    # The proof shares nothing with the passes it judges, nor with what unrolls.
    "proof": ("errors", "exported", "forms", "graph", "liveness", "schedule", "sites", "trace", "values", "verify"),
    "values": ("errors", "forms", "graph", "rules"),
    # A kernel knows of no graph and no schedule.
    "kernels.*": ("errors", "kernels._launch"),
    # A pass knows of no sampler, no model and no file.
    "passes.*": (
        *(
            "errors",
            "kernels",
            "kernels.*",
            "rules",
            "sites",
            "schedule",
            "graph",
            "verify",
            "cost",
            "liveness",
            "columns",
            "strides",
        ),
        *("unroll", "passes.*"),
    ),
}

# Stricter than its layer: these are imported by nobody but those listed.
IMPORTED_BY: dict[str, tuple[str, ...]] = {
    "kernels.*": ("kernels.*", "passes.*"),
    # Only the pipeline puts passes together; base is below them all.
    "passes.*": (
        "passes.*",
        "backend",
        "api",
        "dynamo_backend",
        "",
        "finders.*",
        "testing",
        "report",
        "plots",
        "cli",
        "demo",
    ),
}


@dataclass(frozen=True)
class Import:
    """One import, with the names below ``l2c_compile``."""

    importer: str
    imported: str
    line: int


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_of(name: str) -> int | None:
    """Return the index of the layer of a module, or None if no layer knows it."""
    exact = [index for index, layer in enumerate(LAYERS) if name in layer]
    fitting = exact or [index for index, layer in enumerate(LAYERS) if matches(name, layer)]
    return fitting[0] if fitting else None


def complaint(edge: Import) -> str | None:
    """Return why an import is not allowed, or None if it is."""
    importer, imported = edge.importer, edge.imported
    low, high = layer_of(imported), layer_of(importer)
    where = f"{PACKAGE}.{importer} line {edge.line}" if importer else f"{PACKAGE} line {edge.line}"
    what = f"{where} imports {PACKAGE}.{imported}".rstrip(".")
    if low is None or high is None:
        return f"{what}: a module that no layer knows; add it to LAYERS"
    if low > high:
        return f"{what}, which stands above it"
    if low == high and not any(fnmatchcase(importer, a) and fnmatchcase(imported, b) for a, b in SIDEWAYS):
        return f"{what}, which stands beside it; move what both need one layer down, or list the pair in SIDEWAYS"
    for pattern, allowed in ONLY.items():
        if fnmatchcase(importer, pattern) and not matches(imported, allowed):
            return f"{what}; it may import only {', '.join(allowed)}"
    for pattern, allowed in IMPORTED_BY.items():
        if fnmatchcase(imported, pattern) and not matches(importer, allowed):
            return f"{what}; only {', '.join(filter(None, allowed))} may"
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


def test_no_module_stands_in_two_layers() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("importer", "imported", "message"),
    [
        ("graph", "schedule", None),
        ("schedule", "graph", "stands above it"),
        ("capture", "trace", "stands beside it"),
        ("unroll", "trace", None),
        ("passes.drop_dead", "passes.base", None),
        ("passes.drop_dead", "passes.fold_constants", "stands beside it"),
        ("passes.drop_dead", "passes.pipeline", "stands above it"),
        ("passes.pipeline", "passes.drop_dead", None),
        ("passes.drop_dead", "loops.ddim", "may import only"),
        ("passes.lower_gated_add", "kernels.gated_add", None),
        ("backend", "kernels.gated_add", "only kernels"),
        ("kernels.gated_add", "kernels._launch", None),
        ("kernels.gated_add", "kernels.hold", "stands beside it"),
        ("reference", "rules", None),
        ("reference", "graph", "may import only"),
        ("api", "", "stands above it"),
        ("cli", "", None),
        ("graph", "surprise", "no layer knows"),
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
