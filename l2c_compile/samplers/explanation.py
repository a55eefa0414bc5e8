"""``Explanation``: what each pass did to a static graph, and why it left the rest alone."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from l2c_compile.passes.base import LeftAlone, PassRun


@dataclass(frozen=True)
class Explanation:
    """What each pass did, and why it left other candidates alone. ``print`` shows it."""

    passes: tuple[PassRun, ...]
    """The runs of the passes, in their order."""

    def to_dict(self) -> dict[str, object]:
        """Return all of it as what JSON holds."""
        return {
            "passes": [
                {
                    "name": run.name,
                    "rewrites": run.report.rewrites,
                    "nodes_before": run.nodes_before,
                    "nodes_after": run.nodes_after,
                    "seconds": run.seconds,
                    "left_alone": [
                        {
                            "count": each.count,
                            "reason": str(each.reason),
                            "node": each.name,
                            "module": each.module,
                            "evaluation": each.evaluation,
                        }
                        for each in run.report.left_alone.values()
                    ],
                }
                for run in self.passes
            ]
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max((len(run.name) for run in self.passes), default=4)
        yield Text(f"{'pass':<{width}}  rewrites        ms", style="bold")
        for run in self.passes:
            yield Text(f"{run.name:<{width}}  {run.report.rewrites:>8}  {1e3 * run.seconds:>8.1f}")
            for left in run.report.left_alone.values():
                # A reason may have sizes in brackets, which markup would swallow.
                why = f"{left.count} left alone: {left.reason}; the first is {_place_of(left)}"
                yield Padding(Text(why), (0, 0, 0, 4))
        rewrites = sum(run.report.rewrites for run in self.passes)
        left_alone = sum(left.count for run in self.passes for left in run.report.left_alone.values())
        seconds = sum(run.seconds for run in self.passes)
        yield f"{len(self.passes)} passes: {rewrites} rewrites, {left_alone} candidates left alone, {seconds:.2f} s"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue()


def _place_of(left: LeftAlone) -> str:
    place = left.module or f"'{left.name}'"
    return place if left.evaluation is None else f"{place}, evaluation {left.evaluation}"
