"""What an evaluation costs, and what reusing a site saves: prices for finders that have no graph at hand.

Shapes: E evaluations, S sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx.node import Node

from l2c_compile.cost import MultiplyAdds
from l2c_compile.errors import ScheduleError
from l2c_compile.graph import INPUT_PORT, EvaluationGraph, output_list, site_marks
from l2c_compile.schedule import CacheSchedule
from l2c_compile.sites import Site

__all__ = ["Work", "work_of"]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one loop, by evaluation and by what each site alone would save there.

    Two sites that are reused together may save more than each alone (what only the two of them feed on), so shares
    are upper bounds of what ``Summary.multiply_adds_kept`` counts in the graph.
    """

    evaluations: tuple[int, ...]
    """Of each whole evaluation, in execution order."""
    sites: Mapping[Site, tuple[int, ...]]
    """For each site, what is not done in each evaluation if the site alone is reused there."""

    @property
    def total(self) -> int:
        """Multiply-adds of the loop without reuse."""
        return sum(self.evaluations)

    def saved(self, e: int, site: Site) -> int:
        """Return what reusing ``site`` at evaluation ``e`` saves."""
        return self.sites[site][e]

    def kept(self, schedule: CacheSchedule) -> float:
        """Return the share of the multiply-adds that is left under a schedule.

        Raises:
            ScheduleError: The schedule has another number of evaluations, or a site that is not priced.
        """
        if schedule.num_evaluations != len(self.evaluations):
            raise ScheduleError(
                f"the schedule is for {schedule.num_evaluations} evaluations, the prices are for "
                f"{len(self.evaluations)}; take them from the same loop"
            )
        if unknown := [site for site in schedule.sites if site not in self.sites]:
            raise ScheduleError(f"site {unknown[0]} has no price; probe it as well")
        saved = sum(self.sites[site][e] for e, site in schedule.reuses if schedule.active(e, site) is not None)
        return 1.0 - saved / self.total if self.total else 1.0


def work_of(evaluation: EvaluationGraph) -> tuple[int, dict[Site, int]]:
    """Return the multiply-adds of an evaluation graph, and for each site those that only feed the site.

    Args:
        evaluation: with its sites marked, without dead nodes.
    """
    count = MultiplyAdds()
    total = count.total(evaluation.graph.nodes)
    saved = {}
    for site in evaluation.sites:
        marks = [mark for mark in site_marks(evaluation.graph) if mark.site == str(site)]
        # A reused change is added to the input, so that is still computed.
        still_read = {mark.node for mark in marks if mark.port == INPUT_PORT}
        cut = {mark.node for mark in marks} - still_read
        saved[site] = total - count.total(_needed(evaluation, still_read, cut))
    return total, saved


def _needed(evaluation: EvaluationGraph, still_read: set[Node], cut: set[Node]) -> set[Node]:
    """Return the nodes that the outputs are made from when the nodes in ``cut`` are read from a cache."""
    pending = [node for node in output_list(evaluation.graph) if isinstance(node, Node)]
    pending.extend(still_read)
    needed: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed and node not in cut:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed
