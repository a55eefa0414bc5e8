"""The command line of the bench harness: ``python -m bench NAME [ARGS]... [--json FILE] [--check]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.cases import ALWAYS_CHECKED, CASES, load, summary
from bench.report import Surroundings, records, results_table, write_json
from bench.targets import check, read_targets
from l2c_compile.errors import L2CError


def _catalogue() -> str:
    width = max(map(len, CASES))
    # "\b" keeps click from joining the lines.
    return "\b\nBenches:\n" + "\n".join(f"  {name:<{width}}  {summary(name)}" for name in sorted(CASES))


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    epilog=_catalogue(),
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True, "max_content_width": 120},
)
def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The bench to run.")],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Handed to the bench: files, options of its own.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows here as well.")] = None,
    check_targets: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a row falls short of bench/targets.toml.")
    ] = False,
) -> None:
    """Run one bench and print a table of what it measured."""
    out, err = Console(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        targets = read_targets()
        run = load(name)
        surroundings = Surroundings.here_and_now()
        with Progress(*columns, console=err) as progress:
            measured = records(name, run(args or [], progress), surroundings)
        out.print(results_table(measured))
        if json is not None:
            write_json(json, measured)
    except L2CError as error:
        err.print(f"bench: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if not check_targets and name not in ALWAYS_CHECKED:
        return
    verdicts = check(name, targets, measured)
    for verdict in verdicts:
        out.print(str(verdict), markup=False, highlight=False, soft_wrap=True)
    if not all(verdict.met for verdict in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
