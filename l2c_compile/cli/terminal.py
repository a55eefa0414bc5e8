"""What commands print: results to stdout, progress to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def say(line: str = "", style: str = "") -> None:
    """Print a line as it is: neither wrapped nor read as markup."""
    Console().print(Text(line, style=style), soft_wrap=True)


def show(what: RenderableType) -> None:
    """Print a table or a report, as wide as the terminal."""
    Console().print(what)


@contextmanager
def bar(what: str, total: int | None = None, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the context lasts.

    Args:
        what: what is going on, in a few words.
        total: the number of steps to do; None if that is not known yet.
        shown: whether to show the bar at all.

    Yields:
        ``rich.progress.Progress.update`` for this bar: ``advance=1``, ``description="..."``, ``total=...``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield partial(progress.update, progress.add_task(what, total=total))
