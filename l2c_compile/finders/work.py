"""What an evaluation costs, and what reusing a site saves: prices for finders.

Shapes: E evaluations, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from torch.fx.node import Node

from l2c_compile.errors import ScheduleError
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SITE, SiteMark, site_marks
from l2c_compile.graphs.nodes import output_list
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

_Price = TypeVar("_Price", bound=float)


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one loop, by evaluation and by what each site alone would save there.

    Two sites that are reused together may save more than each alone (what only the two of them feed on), so shares
    are upper bounds of what ``Summary.multiply_adds_kept`` counts in the graph.
    """

    evaluations: tuple[int, ...]
    """The price of each whole evaluation, in execution order."""
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
            ScheduleError: if the schedule has another number of evaluations, or a site that is not priced.
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


def work_of(evaluation: EvaluationGraph, price: Callable[[Node], _Price]) -> tuple[_Price, dict[Site, _Price]]:
    """Return the price of an evaluation graph, and for each site that of what only feeds the site.

    Args:
        evaluation: the graph, its sites marked.
        price: a function that returns the price of one node, such as its multiply-adds or its time.
    """
    prices = {node: price(node) for node in evaluation.graph.nodes if node.target is not SITE}
    marks = site_marks(evaluation.graph)
    total = _sum(prices, _needed(evaluation, []))
    saved = {}
    for site in evaluation.sites:
        mine = [mark for mark in marks if mark.site == str(site)]
        saved[site] = cast("_Price", total - _sum(prices, _needed(evaluation, mine)))
    return total, saved


def _sum(prices: Mapping[Node, _Price], nodes: set[Node]) -> _Price:
    # In the order of the graph, so that equal graphs have equal prices to the last bit.
    return cast("_Price", sum(price for node, price in prices.items() if node in nodes))


def _needed(evaluation: EvaluationGraph, reused: Sequence[SiteMark]) -> set[Node]:
    """Return the nodes that the outputs are made from when one site is read from a cache."""
    # A reused change is added to the input, so that is still computed.
    still_read = {mark.node for mark in reused if mark.port == INPUT_PORT}
    cut = {mark.node for mark in reused} - still_read
    pending = [node for node in output_list(evaluation.graph) if isinstance(node, Node)]
    pending.extend(still_read)
    needed: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed and node not in cut:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed
