"""Sites, which are the named cuts in one evaluation whose value a schedule may reuse.

A site is the output of a module (``blocks.3.attn``), the output of a run of sibling modules (``blocks.0..blocks.27``),
or the change that either makes, out - in (``delta(blocks.0..blocks.27)``). Sites say nothing about when a value is
reused (``schedule.py``) nor how it is made from earlier ones (``rules.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from l2c_compile.errors import ScheduleError, UnknownSiteError, nearest


def expand_patterns(sites: Sequence[Site], paths: Sequence[str]) -> dict[Site, Site]:
    """Return for each concrete site the key of the table that it gets its entries from."""
    concrete = [site for site in sites if not site.is_pattern]
    origin = {site: site for site in concrete}
    specificity: dict[Site, tuple[int, int]] = {}
    for pattern in (site for site in sites if site.is_pattern):
        stars = pattern.path.count("*")
        rank = (-stars, len(pattern.path) - stars)
        matching = [path for path in paths if path and pattern.matches(path)]
        if not matching:
            raise UnknownSiteError(
                f"site {pattern}: the denoiser has no module of that form. {nearest_module(pattern.path, paths)}"
            )
        for path in matching:
            if not is_module_path(path):
                raise ScheduleError(
                    f"site {pattern} stands for {_why_no_path(path)}; or name the other modules one by one"
                )
            site = Site(path, None, pattern.kind, pattern.call)
            if origin.get(site) == site:
                continue
            if site in origin and specificity[site] == rank:
                raise ScheduleError(
                    f"sites {origin[site]} and {pattern} both stand for {site} and neither is more specific; "
                    f"give {site} a row of its own"
                )
            if site not in origin or specificity[site] < rank:
                origin[site], specificity[site] = pattern, rank
    return origin


def nearest_module(path: str, paths: Iterable[str]) -> str:
    """Return a hint at the module that may have been meant, "" if there is none."""
    if path in paths:
        return f"There is {_why_no_path(path)}."
    return nearest(path, filter(is_module_path, paths))


def _why_no_path(path: str) -> str:
    return (
        f"module {path!r}, whose name a site cannot spell ('@', '*', 'delta(' and open brackets mean more); rename it"
    )


MAX_RUN_MODULES = 4096
"""The most modules that a run may name; no network has as many siblings, and a hostile file may not ask for more."""

_MAX_TEXT_CHARS = 1024
_WORD = r"(?:[^\s.@()]|\([^.@()]*\))+"
_NAME = rf"{_WORD}(?: +{_WORD})*"
_PATH = rf"{_NAME}(?:\.{_NAME})*"
_TEXT = re.compile(
    rf"(?P<delta>delta\()?(?P<path>{_PATH})(?:\.\.(?P<last>{_PATH}))?(?:@(?P<call>[0-9]{{1,6}}))?(?(delta)\))"
)
_INTEGER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Site:
    """A named cut in one evaluation.

    ``str(site)`` and ``Site.parse(text)`` are inverse to each other. Sites sort in natural order: ``blocks.2`` comes
    before ``blocks.10``.

    Raises:
        ScheduleError: if the fields do not name a cut. The message says which field is wrong, and why.
    """

    path: str
    """The path of the module, or of the first module of the run, as in ``nn.Module.named_modules``; each component may
    hold one ``*``."""
    last: str | None = None
    """The path of the last module of the run, which belongs to it; None for a single module."""
    kind: Literal["out", "delta"] = "out"
    """``out`` for the output, ``delta`` for out - in, where in is the first positional tensor argument of ``path``."""
    call: int = 0
    """The number of the module's call within one evaluation, from 0: a shared module may be called more than once."""

    def __post_init__(self) -> None:
        for field in (self.path, self.last):
            if field is not None and not _is_path(field):
                raise ScheduleError(f"a site wants module paths such as 'blocks.3.attn', got {field!r}")
        if self.kind not in ("out", "delta"):
            raise ScheduleError(f"site {self.path}: kind wants 'out' or 'delta', got {self.kind!r}")
        if isinstance(self.call, bool) or not isinstance(self.call, int) or not 0 <= self.call < 1_000_000:
            raise ScheduleError(f"site {self.path}: call wants a count from 0, got {self.call!r}")
        if self.last is None:
            return
        if self.last == self.path and not self.is_pattern:
            # A cut has only one spelling: blocks.3..blocks.3 is blocks.3.
            object.__setattr__(self, "last", None)
            return
        _, first_index, last_index = self._run()
        if not 0 <= last_index - first_index < MAX_RUN_MODULES:
            raise ScheduleError(
                f"run {self.path}..{self.last} wants 1 to {MAX_RUN_MODULES} modules in rising order, "
                f"got {last_index - first_index + 1}"
            )

    @classmethod
    def parse(cls, text: str) -> Site:
        """Return the site of a text such as ``delta(blocks.0..blocks.27@1)``.

        Raises:
            ScheduleError: if ``text`` is not a site.
        """
        match = _TEXT.fullmatch(text) if len(text) <= _MAX_TEXT_CHARS else None
        if match is None:
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise ScheduleError(
                "a site wants the form 'blocks.3.attn', 'blocks.0..blocks.27', 'blocks.3@1' or 'delta(...)' around one "
                f"of these, got {shown!r}"
            )
        kind: Literal["out", "delta"] = "delta" if match["delta"] else "out"
        return cls(match["path"], match["last"], kind, int(match["call"] or 0))

    def __str__(self) -> str:
        text = self.path if self.last is None else f"{self.path}..{self.last}"
        if self.call:
            text += f"@{self.call}"
        return f"delta({text})" if self.kind == "delta" else text

    @property
    def is_pattern(self) -> bool:
        """Whether the path holds a ``*``, which stands for one path component or for a part of one."""
        return "*" in self.path

    def modules(self) -> tuple[str, ...]:
        """Return the module paths of the run in order; one path for a single module."""
        return self._modules

    @property
    def num_modules(self) -> int:
        """The number of modules in the run, which is counted without naming them."""
        if self.last is None:
            return 1
        _, first_index, last_index = self._run()
        return last_index - first_index + 1

    def matches(self, path: str) -> bool:
        """Return whether ``path`` is the module that this site names, or one that its pattern stands for."""
        if not self.is_pattern:
            return path == self.path
        wanted, got = self.path.split("."), path.split(".")
        return len(wanted) == len(got) and all(map(_component_matches, wanted, got))

    def covers(self, other: Site) -> bool:
        """Return whether the work of ``other`` is a proper part of the work of this site.

        It is if every module of ``other`` is at or below a module of this site, and they are not the same modules.
        Calls must agree only where the two name the same module: how often a module calls another is not known here.
        """
        if other.modules()[0] in self._module_set:
            return self.call == other.call and self._module_set > other._module_set
        # The modules of a run share their parent, so one ancestor decides for all of them.
        return any(ancestor in self._module_set for ancestor in _ancestors(other.path))

    def __lt__(self, other: Site) -> bool:
        return self._sort_key < other._sort_key

    def __le__(self, other: Site) -> bool:
        return self._sort_key <= other._sort_key

    def __gt__(self, other: Site) -> bool:
        return self._sort_key > other._sort_key

    def __ge__(self, other: Site) -> bool:
        return self._sort_key >= other._sort_key

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        if self.last is None:
            return (self.path,)
        parent, first_index, last_index = self._run()
        return tuple(f"{parent}{index}" for index in range(first_index, last_index + 1))

    @cached_property
    def _module_set(self) -> frozenset[str]:
        return frozenset(self._modules)

    @cached_property
    def _sort_key(self) -> tuple[object, ...]:
        # A whole comes before its parts, so the length of the run is negated.
        return (_natural(self.path), -len(self._modules), self.kind, self.call)

    def _run(self) -> tuple[str, int, int]:
        """Return the common parent (with its dot) and the first and last index of a run."""
        assert self.last is not None
        first_parent, first_dot, first = self.path.rpartition(".")
        last_parent, _, last = self.last.rpartition(".")
        is_run = first_parent == last_parent and _INTEGER.fullmatch(first) and _INTEGER.fullmatch(last)
        if not is_run or self.is_pattern or "*" in self.last:
            raise ScheduleError(
                f"run {self.path}..{self.last} wants two modules of one parent with whole numbers as names and no '*', "
                "such as blocks.0..blocks.27"
            )
        return first_parent + first_dot, int(first), int(last)


def as_site(site: Site | str) -> Site:
    """Return ``site`` itself, or the site that the text names."""
    return Site.parse(site) if isinstance(site, str) else site


def is_module_path(path: str) -> bool:
    """Return whether a site can name the module of this path."""
    return _is_path(path) and "*" not in path


def _is_path(text: object) -> bool:
    if not isinstance(text, str) or len(text) > _MAX_TEXT_CHARS or not text.isprintable():
        return False
    if text.startswith("delta(") and text.endswith(")"):
        # As a site it would be read as the change that a module makes.
        return False
    return re.fullmatch(_PATH, text) is not None and all(name.count("*") <= 1 for name in text.split("."))


def _component_matches(pattern: str, name: str) -> bool:
    before, star, after = pattern.partition("*")
    if not star:
        return pattern == name
    return len(name) >= len(before) + len(after) and name.startswith(before) and name.endswith(after)


def _ancestors(path: str) -> Iterable[str]:
    """Yield the proper ancestors of a module path, nearest first."""
    while path := path.rpartition(".")[0]:
        yield path


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(name), "") if _INTEGER.fullmatch(name) else (1, 0, name) for name in path.split("."))
