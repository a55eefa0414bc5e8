"""What commands print: results to stdout as they are, progress to stderr."""

from __future__ import annotations

import pytest

from l2c_compile.cli.terminal import bar, say, show


def test_a_line_is_neither_wrapped_nor_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    line = "blocks[0] [bold]x[/bold] " + "word " * 60
    say(line)
    show("[1, 2]")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == line
    assert captured.err == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_prints_nothing_among_the_results(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with bar("sampling", 2, shown=shown) as update:
        update(advance=1)
        update(description="sampling again", total=3)
    assert capsys.readouterr().out == ""
