"""The command ``l2c``: which commands there are, as data, and what becomes of errors.

To add a command, write ``cli/NAME.py`` and one line in ``COMMANDS``. The file holds ``command``: a function whose
parameters are the arguments and options, as typer reads them, and whose docstring is the help; or a ``typer.Typer``
with commands of its own. It is imported only when its command is used, so it may import anything, and ``l2c --help``
does not wait for torch.

- Options that several commands have are in ``options.py``; what is printed goes through ``terminal.py``.
- ``files.py`` reads schedules and says where a command may write.
- A mistake of the user is an ``L2CError``. A command that finds something wrong raises ``typer.Exit(1)``.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from l2c_compile.errors import L2CError

COMMANDS = {
    "inspect": "Show what a schedule or router file computes and reuses.",
    "demo": "Draw digits with and without caching; compare time and pictures.",
    "predict": "Predict what a schedule will save, before anything is compiled.",
    "verify": "Prove that the static graph made of a schedule is right.",
    "profile": "Measure how the sites of a model change between evaluations.",
    "eval": "Measure what a schedule costs in quality.",
    "learn": "Learn a router; give a budget or a penalty.",
    "schedule": "Make a schedule file, from a profile or by a formula.",
}
"""The commands, each with its line in ``l2c --help``; ``l2c COMMAND --help`` says more."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _ImportedWhenUsed(TyperCommand):
    """Stands for a command, which is imported only when it is used."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of click
        """Return the context of the command itself, which is imported here."""
        command = import_module(f"l2c_compile.cli.{self.name}").command
        if not isinstance(command, typer.Typer):
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(self.name)(command)
            command = alone
        return typer.main.get_command(command).make_context(*args, **kwargs)


def _print_version(wanted: bool) -> None:
    if wanted:
        versions = []
        for name in ("l2c-compile", "torch"):
            try:
                versions.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                versions.append(f"{name} (not installed)")
        print(", ".join(versions))
        raise typer.Exit


@app.callback()
def _l2c(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Compile the sampling loop of a diffusion model, caches included, into one static graph."""


for _name, _summary in COMMANDS.items():
    app.command(_name, cls=_ImportedWhenUsed, help=_summary)(lambda: None)


def main() -> None:
    """Run ``l2c``. An error of ours is one line on stderr and exit code 2, as bad usage is, without a traceback."""
    try:
        app()
    except (L2CError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"l2c: error: {message}", file=sys.stderr)
        sys.exit(2)
