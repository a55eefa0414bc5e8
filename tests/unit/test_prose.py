"""The rules for prose in CONTRIBUTING.md ("Names, comments, docstrings"), as far as a program can hold them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.root import ROOT

FOLDERS = ("l2c_compile", "passes", "kernels", "bench", "tests")

Finding = tuple[int, str]
"""A line, and what to write there."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef

NOUN_PHRASE = 'write a noun phrase or a sentence: "Multiply-adds of the loop.", not "Of the loop."'
WHAT_IS_DONE = 'write what the function does: "Return ...", "Yield ...", "Print ...", not "Tell ..." or "Say ..."'
BOOL_FUNCTION = 'write "Return whether ..."'
BOOL_VALUE = 'write "Whether ..."'
PROPERTY = 'write what it is: "The number of sites.", not "Return ..."'
BOOL_ARGUMENT = 'write "{name}: whether ..."'
SMALL_LETTER = 'begin with a small letter: "{name}: the denoiser."'
CONDITION = 'write when it is raised: "{name}: if ..." or "{name}: where ..."'
ENTRY = 'write "name: description", and indent what continues it'

ORDER = 'write the sections in the order "Args:", "Returns:" or "Yields:", "Raises:", "Warns:"'

PROPERTIES = {"property", "cached_property"}
SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises", "Warns")
SECTION = re.compile(f"( *)({'|'.join(SECTIONS)}):$")
LISTED = re.compile(r"(\*{0,2}[\w.]+)(?: \([^)]*\))?: *(.*)")
# "MLP" and "DiT-XL/2" keep their capitals.
CAPITALIZED_WORD = re.compile(r"(?:A|[A-Z][a-z]+)(?![A-Za-z0-9_])")


def source_files() -> Iterator[Path]:
    """Yield every file of ours once, also those that two links in the package show a second time."""
    for folder in FOLDERS:
        links = [ROOT / folder / name for name in ("passes", "kernels")]
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if not {*links} & {*path.parents})
    yield ROOT / "conftest.py"


FILES = {path.relative_to(ROOT).as_posix(): path for path in source_files()}


def findings(source: str) -> Iterator[Finding]:
    """Yield what the prose of a file breaks, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Documented) and (docstring := string_of(node.body[0] if node.body else None)):
            yield from docstring_findings(node, docstring)
        if isinstance(node, Documented):
            for statement, follower in pairwise(node.body):
                if isinstance(statement, ast.Assign | ast.AnnAssign) and (description := string_of(follower)):
                    yield from field_findings(statement, description)


def string_of(statement: ast.stmt | None) -> ast.Constant | None:
    """Return the string that a statement consists of, None if it is another statement."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value if isinstance(statement.value.value, str) else None
    return None


def is_bool(annotation: ast.expr | None) -> bool:
    """Return whether an annotation is ``bool``."""
    return isinstance(annotation, ast.Name) and annotation.id == "bool"


def field_findings(field: ast.Assign | ast.AnnAssign, description: ast.Constant) -> Iterator[Finding]:
    """Yield what is wrong with the string below a field or a constant."""
    text = str(description.value)
    if text.startswith("Of "):
        yield description.lineno, NOUN_PHRASE
    if isinstance(field, ast.AnnAssign) and is_bool(field.annotation) and not text.startswith("Whether "):
        yield description.lineno, BOOL_VALUE


def docstring_findings(node: Documented, docstring: ast.Constant) -> Iterator[Finding]:
    """Yield what is wrong with the docstring of a module, class or function."""
    text, line = str(docstring.value), docstring.lineno
    if text.startswith("Of "):
        yield line, NOUN_PHRASE
    if isinstance(node, Function):
        decorators = {getattr(each, "id", getattr(each, "attr", None)) for each in node.decorator_list}
        if decorators & PROPERTIES:
            if is_bool(node.returns) and not text.startswith("Whether "):
                yield line, BOOL_VALUE
            elif text.startswith("Return "):
                yield line, PROPERTY
        elif is_bool(node.returns) and not text.startswith("Return whether "):
            yield line, BOOL_FUNCTION
        elif re.match(r"(Tell|Say)\b", text):
            yield line, WHAT_IS_DONE
    found = list(entries(text))
    for offset, section, entry in found:
        yield from ((line + offset, finding) for finding in entry_findings(node, section, entry))
    for (_, before, _), (offset, after, _) in pairwise(found):
        if SECTIONS.index(before) > SECTIONS.index(after):
            yield line + offset, ORDER


def entries(docstring: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line within the docstring, title of the section, text) of each entry in its sections."""
    section, outer, inner = "", 0, -1
    for offset, line in enumerate(docstring.split("\n")):
        indent = len(line) - len(line.lstrip())
        header = SECTION.fullmatch(line.rstrip())
        if header:
            section, outer, inner = header[2], indent, -1
        elif line.strip() and indent <= outer:
            section = ""
        elif line.strip() and section:
            inner = indent if inner < 0 else inner
            # What is indented further continues an entry. Returns and Yields have only one.
            if indent == inner:
                yield offset, section, line.strip()
                section = "" if section in ("Returns", "Yields") else section


def entry_findings(node: Documented, section: str, entry: str) -> Iterator[str]:
    """Yield what is wrong with one entry of a section."""
    if section in ("Returns", "Yields"):
        if entry.startswith("Of "):
            yield NOUN_PHRASE
        return
    listed = LISTED.fullmatch(entry)
    if listed is None:
        yield ENTRY
        return
    name, text = listed[1], listed[2]
    if section in ("Raises", "Warns"):
        if not re.match(r"(if|where)\b", text):
            yield CONDITION.format(name=name)
        return
    if text.lower().startswith("of "):
        yield NOUN_PHRASE
    elif CAPITALIZED_WORD.match(text):
        yield SMALL_LETTER.format(name=name)
    elif name in bool_arguments(node) and not text.startswith("whether "):
        yield BOOL_ARGUMENT.format(name=name)


def bool_arguments(node: Documented) -> set[str]:
    """Return the names of a function's arguments, or of a class's and its ``__init__``'s, that are bool."""
    if isinstance(node, Function):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        return {each.arg for each in arguments if is_bool(each.annotation)}
    found: set[str] = set()
    for statement in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(statement, Function) and statement.name == "__init__":
            found |= bool_arguments(statement)
        elif isinstance(statement, ast.AnnAssign) and is_bool(statement.annotation):
            found.add(ast.unparse(statement.target))
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_prose_of_a_file_keeps_the_rules(name: str) -> None:
    found = sorted(findings(FILES[name].read_text(encoding="utf-8")))
    assert [f"{name}:{line}: {what}" for line, what in found] == []


FUNCTION = '''
def f(steps: int, strict: bool) -> {returns}:
    """{first}

    Args:
        steps: {steps}
        strict: {strict}

    Returns:
        {result}

    Raises:
        {raises}
    """
'''
GOOD = {
    "returns": "int",
    "first": "Return the number of evaluations.",
    "steps": "the number of sampler steps,\n            The first included.",
    "strict": "whether it has to be even.",
    "result": "The number.",
    "raises": "LoopError: if there is none.\n        ValueError: where it is odd,\n            But not for one.",
}


@pytest.mark.parametrize(
    ("change", "line", "what"),
    [
        ({}, 0, ""),
        ({"first": "Of the evaluations."}, 3, NOUN_PHRASE),
        ({"first": "Tell how many evaluations there are."}, 3, WHAT_IS_DONE),
        ({"first": "Say how many evaluations there are."}, 3, WHAT_IS_DONE),
        ({"returns": "bool"}, 3, BOOL_FUNCTION),
        ({"returns": "bool", "first": "Tell whether there are any."}, 3, BOOL_FUNCTION),
        ({"returns": "bool", "first": "Return whether there are any."}, 0, ""),
        ({"steps": "The number of steps."}, 6, SMALL_LETTER.format(name="steps")),
        ({"steps": "A number of steps."}, 6, SMALL_LETTER.format(name="steps")),
        ({"steps": "DPM-Solver's own."}, 0, ""),
        ({"steps": "MLP layers, E of them."}, 0, ""),
        ({"steps": "of the sampler."}, 6, NOUN_PHRASE),
        ({"strict": "if true, it has to be even."}, 8, BOOL_ARGUMENT.format(name="strict")),
        ({"result": "Of the loop."}, 11, NOUN_PHRASE),
        ({"result": "The number.\n\n    Args:\n        steps: the number."}, 14, ORDER),
        ({"raises": "LoopError: there is none."}, 14, CONDITION.format(name="LoopError")),
        ({"raises": "LoopError: If there is none."}, 14, CONDITION.format(name="LoopError")),
        ({"raises": "LoopError if there is none."}, 14, ENTRY),
        ({"raises": "LoopError: if not.\n        ValueError: odd."}, 15, CONDITION.format(name="ValueError")),
    ],
)
def test_the_rules_for_functions_say_what_they_mean(change: dict[str, str], line: int, what: str) -> None:
    assert list(findings(FUNCTION.format(**{**GOOD, **change}))) == ([(line, what)] if what else [])


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ('x = 1\n"""Of the loop."""', [(2, NOUN_PHRASE)]),
        ('class C:\n    x: int\n    """Of the loop."""', [(3, NOUN_PHRASE)]),
        ('class C:\n    x: int\n    """Number of loops."""', []),
        ('class C:\n    x: bool = True\n    """If true, loops."""', [(3, BOOL_VALUE)]),
        ('class C:\n    x: bool = True\n    """Whether it loops."""', []),
        ('class C:\n    """Loops.\n\n    Args:\n        x: Of y.\n    """', [(5, NOUN_PHRASE)]),
        (
            'class C:\n    """Loops.\n\n    Args:\n        x: y.\n    """\n    x: bool',
            [(5, BOOL_ARGUMENT.format(name="x"))],
        ),
        ('class C:\n    @property\n    def x(self) -> bool:\n        """Return whether."""', [(4, BOOL_VALUE)]),
        ('class C:\n    @property\n    def x(self) -> bool:\n        """Whether it loops."""', []),
        ('class C:\n    @property\n    def x(self) -> int:\n        """Return it."""', [(4, PROPERTY)]),
        ('class C:\n    @cached_property\n    def x(self) -> int:\n        """The number."""', []),
        ('"""Of the loop."""', [(1, NOUN_PHRASE)]),
    ],
)
def test_the_rules_for_values_say_what_they_mean(source: str, wanted: list[Finding]) -> None:
    assert list(findings(source)) == wanted
