"""What a loop should compute under a schedule: the expression of every site value and of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.checking.operators import on_values
from l2c_compile.checking.values import Leaves, Value, ValueTable, needed_for
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.marks import INPUT_PORT, SITE, SiteMark
from l2c_compile.graphs.nodes import draws_random_numbers, module_path, output_list, root_tensor
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

aten = torch.ops.aten


SiteValueKey = tuple[int, str, int]
"""The evaluation, site and port of a value."""


class ExpectedValues:
    """The expressions of a loop under a schedule, from the definition: evaluation by evaluation, site by site."""

    def __init__(self, skeleton: LoopSkeleton, schedule: CacheSchedule, table: ValueTable, leaves: Leaves) -> None:
        self.table = table
        self.leaves = leaves
        self.schedule = schedule
        self.sites: dict[str, Site] = {str(site): site for site in schedule.sites}
        self.held: dict[SiteValueKey, Value] = {}
        """The value that a site holds after an evaluation, computed or read."""
        self.computed: dict[SiteValueKey, Value] = {}
        self.reads: dict[SiteValueKey, Value] = {}
        self.names: dict[Value, str] = {}
        self.draws: list[Value] = []
        self.results: list[object] = self._run(skeleton)
        self.made = Counter(table.times_made)
        """How often the loop, in which nothing is shared, computes an expression."""
        self.met = dict.fromkeys((*self.made, *self.names, *needed_for(self.results)))
        """Every expression of the loop, those of skipped sites included."""

    def _run(self, skeleton: LoopSkeleton) -> list[object]:
        table = self.table
        values: dict[Node, Value] = {}
        for number, node in enumerate(skeleton.input_nodes()):
            values[node] = table.leaf("input", number, TensorForm.of(node.meta["val"]))
        for node, (name, tensor) in zip(skeleton.constant_nodes(), skeleton.constants.items(), strict=True):
            # A weight may have been assigned anew since the loop was traced.
            values[node] = self.leaves.of(self.leaves.weights.get(name.removeprefix("denoiser."), tensor))
        made_by = {node: e for e, nodes in enumerate(skeleton.output_nodes()) for node in nodes}
        arguments, outputs = skeleton.argument_nodes(), skeleton.output_nodes()
        num_done = 0
        for node in skeleton.graph.nodes:
            awaited = [made_by[argument] for argument in node.all_input_nodes if argument in made_by]
            if node.op == "output":
                awaited.append(len(outputs) - 1)
            while num_done <= max(awaited, default=-1):
                given = [values[argument] for argument in arguments[num_done]]
                values.update(zip(outputs[num_done], self._evaluate(skeleton, num_done, given), strict=True))
                num_done += 1
            table.place = (None, "")
            if node.op == "get_attr":
                values[node] = self.leaves.of(root_tensor(skeleton.root, node))
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return [values[result] if isinstance(result, Node) else result for result in skeleton.result_nodes()]

    def _evaluate(self, skeleton: LoopSkeleton, evaluation: int, given: Sequence[Value]) -> list[Value]:
        form = skeleton.calls[evaluation].graph
        values: dict[Node, Value] = {}
        inputs = iter(given)
        for node in form.graph.nodes:
            self.table.place = (evaluation, module_path(node))
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = self.leaves.of(root_tensor(form.root, node))
            elif node.target is SITE:
                mark = SiteMark.of(node)
                values[node] = self._site(evaluation, mark, values[mark.value])
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return [values[node] for node in output_list(form.graph) if isinstance(node, Node)]

    def _operation(self, node: Node, values: Mapping[Node, Value]) -> Value:
        args, kwargs = on_values(node, values)
        if draws_random_numbers(node):
            self.draws.append(self.table.draw(len(self.draws), cast(OpOverload, node.target), args, kwargs))
            return self.draws[-1]
        return self.table.call(node.target, args, kwargs)

    def _site(self, evaluation: int, mark: SiteMark, own: Value) -> Value:
        """Return what the denoiser goes on with at a site."""
        site, key = self.sites[mark.site], (evaluation, mark.site, mark.port)
        reuse = None if mark.port == INPUT_PORT else self.schedule.active(evaluation, site)
        if reuse is None:
            self.held[key] = own
            if mark.port != INPUT_PORT and self.schedule.computes(evaluation, site):
                self.computed[key] = own
                self.names.setdefault(own, f"site '{site}' of evaluation {evaluation}{port_suffix(mark.port)}")
            return own
        history = [self._cached(source, site, mark.port) for source in reuse.sources]
        inputs = [self.held[source, mark.site, INPUT_PORT] for source in reuse.sources if reuse.rule.needs_input]
        current = self.held.get((evaluation, mark.site, INPUT_PORT))
        value = self.table.apply_rule(reuse.rule, history, inputs, current if reuse.rule.needs_input else None)
        if site.kind == "delta":
            assert current is not None
            value = self.table.call(aten.add.Tensor, (current, value), {})
        self.held[key] = self.reads[key] = value
        sources = " and ".join(map(str, reuse.sources))
        self.names.setdefault(value, f"site '{site}' at {evaluation} as made from {sources}{port_suffix(mark.port)}")
        return value

    def _cached(self, source: int, site: Site, port: int) -> Value:
        held = self.held[source, str(site), port]
        if site.kind == "out":
            return held
        return self.table.call(aten.sub.Tensor, (held, self.held[source, str(site), INPUT_PORT]), {})


def port_suffix(port: int) -> str:
    """Return how a message names one of several results of a site; "" for the first."""
    return f" (result {port})" if port else ""
