"""Corrupt static graphs in many ways, and tell which of them the structural proof and a numeric comparison catch.

A mutation edits a finished graph, or its memory plan, as a bug in a pass might. ``structure`` is ``proof.prove``;
``numeric`` runs the corrupted graph once on random input and compares with the right one by ``torch.testing``'s
tolerance for the dtype, which is how such a bug would be looked for without a proof. No ``ARGS``.

``caught_state`` is about Python state instead, which a capture freezes or which changes between two calls
(``state_mutations.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.fx.node import Node

from bench.options import Options
from bench.report import Condition, Row
from bench.trust.state_mutations import state_rows
from l2c_compile.analyses.memory_plan import MemoryPlan, plan_memory
from l2c_compile.checking.proof import Proof, prove
from l2c_compile.compile import graph_of, trace_and_capture
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models import DiT
from l2c_compile.passes.pipeline import BITWISE, LOOP
from l2c_compile.schedules.schedule import CacheSchedule

aten = torch.ops.aten

PIPELINES = {"bitwise": BITWISE, "rounding": LOOP}


class NotApplicable(Exception):
    """The graph has nothing that this mutation could corrupt."""


@dataclass(frozen=True)
class Subject:
    """A right graph, and what is needed to judge corrupted copies of it."""

    name: str
    pipeline: str
    denoiser: nn.Module
    graph: LoopGraph
    skeleton: LoopSkeleton
    inputs: tuple[Tensor, ...]

    def prove(self, graph: LoopGraph, plan: MemoryPlan | None = None) -> Proof:
        """Prove this graph or a corrupted copy of it."""
        passes = PIPELINES[self.pipeline]
        return prove(graph, self.skeleton, self.denoiser, exact=passes.is_bitwise, facts=passes.facts, plan=plan)

    def results(self, graph: LoopGraph) -> list[Tensor]:
        """Run a graph on the subject's inputs, from one random state."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(5)
            return list(fx.Interpreter(graph.root, graph=graph.graph).run(*self.inputs))


@dataclass(frozen=True)
class Outcome:
    """Which checks noticed one mutation."""

    structure: str
    """The first check of the proof that failed; empty if none did."""
    message: str
    numeric: bool
    """Whether the comparison of results noticed."""
    max_error: float
    """The largest error of a result; infinite where the corrupted graph does not run."""


def outcome(subject: Subject, mutate: Callable[[LoopGraph], MemoryPlan | None]) -> Outcome:
    """Corrupt a copy of the subject's graph and judge it.

    Raises:
        NotApplicable: if there is nothing to corrupt.
    """
    graph = subject.graph.copy()
    plan = mutate(graph)
    proof = subject.prove(graph, plan)
    wanted = subject.results(subject.graph)
    try:
        got = subject.results(graph)
        max_error = max(float((a.double() - b.double()).abs().max()) for a, b in zip(got, wanted, strict=True))
        torch.testing.assert_close(got, wanted)
        numeric = False
    except AssertionError:
        numeric = True
    # A broken graph may raise torch's errors, or the interpreter's for what is not there.
    except (RuntimeError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        numeric, max_error = True, float("inf")
    first = proof.findings[0] if proof.findings else None
    return Outcome(first.check if first else "", first.message if first else "", numeric, max_error)


# The subjects.


def dit(pipeline: str) -> Subject:
    """Return a DiT of two blocks under six DDIM steps that draw, with guidance, its four sublayers reused."""
    model = DiT(input_size=4, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    loop = DDIM(steps=6, eta=1.0, guidance=Guidance(scale=2.0, null={"y": 5}))
    row = [1, 1, 0, 1, 0, 0]
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return _subject(
        "dit", pipeline, model, {"blocks.*.attn": row, "blocks.*.mlp": row}, loop, noise, y=torch.tensor([1, 2])
    )


class _SharedAndPair(nn.Module):
    """A module that is called twice, and one that returns two tensors of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.pair = _Pair()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.shared(torch.tanh(x)) * t[:, None]
        x = x + self.shared(torch.sin(x))
        scale, shift = self.pair(x)
        return x * scale + shift  # type: ignore[no-any-return]


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale(x), self.shift(x)


def shared_and_pair(pipeline: str) -> Subject:
    """Return a small network with a module called twice and one with two outputs, under four Euler steps."""

    def loop(denoiser: Callable[..., Tensor], noise: Tensor) -> Tensor:
        x = noise
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * denoiser(x, torch.full((x.shape[0],), t))
        return x

    table = {"shared": [1, 0, 1, 0], "shared@1": [1, 0, 1, 0], "pair": [1, 1, 0, 0]}
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    return _subject("shared-and-pair", pipeline, _SharedAndPair(), table, loop, noise)


def _subject(
    name: str,
    pipeline: str,
    model: nn.Module,
    table: Mapping[str, Sequence[int]],
    loop: Callable[..., object],
    noise: Tensor,
    **conditions: Tensor,
) -> Subject:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=generator)
    model.eval()
    schedule = CacheSchedule.from_table(table).resolve([path for path, _ in model.named_modules()])
    skeleton = trace_and_capture(model, loop, schedule, noise, conditions)
    graph, _ = graph_of(skeleton, model, schedule, PIPELINES[pipeline])
    return Subject(name, pipeline, model, graph, skeleton, (noise, *conditions.values()))


# What the mutations look up.


def _calls(graph: LoopGraph, *targets: object) -> list[Node]:
    found = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in targets]
    if not found:
        raise NotApplicable
    return found


def _first(nodes: Iterable[Node]) -> Node:
    node: Node | None = next(iter(nodes), None)
    if node is None:
        raise NotApplicable
    return node


def _value(graph: LoopGraph, evaluation: int, site: str, port: int = 0) -> Node:
    """Return the node that makes a site's value."""
    return _first(node for node in graph.graph.nodes if (evaluation, site, port) in node.meta.get("sites", ()))


def _reader(graph: LoopGraph, evaluation: int, site: str, in_evaluation: int, port: int = 0) -> tuple[Node, Node]:
    """Return what an evaluation reads of an earlier one, and who reads it."""
    value = _value(graph, evaluation, site, port)
    return value, _first(user for user in value.users if evaluation_of(user) == in_evaluation)


def _insert(graph: LoopGraph, before: Node, target: Any, *args: Any) -> Node:  # noqa: ANN401 - an operator and its arguments
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, args)
    like = next(argument for argument in args if isinstance(argument, Node))
    node.meta = {"val": like.meta["val"], "evaluation": evaluation_of(before)}
    return node


def _instead(graph: LoopGraph, old: tuple[int, str], new: tuple[int, str], reader: int) -> None:
    """Let an evaluation read one site's value instead of another's."""
    value, user = _reader(graph, *old, reader)
    user.replace_input_with(value, _value(graph, *new))


def _exchange(graph: LoopGraph, first: tuple[int, str], second: tuple[int, str], reader: int) -> None:
    a, user_of_a = _reader(graph, *first, reader)
    b, user_of_b = _reader(graph, *second, reader)
    user_of_a.replace_input_with(a, b)
    user_of_b.replace_input_with(b, a)


ATTN, MLP = "blocks.0.attn", "blocks.0.mlp"


# Mutations of what is read.


def _site_recomputed(graph: LoopGraph, *, read: bool) -> None:
    """Compute a skipped site after all, from its own evaluation's latent; use it or not."""
    value, user = _reader(graph, 1, ATTN, 2)
    # The site's own work: what evaluation 1 did from its latent on, done again on that of evaluation 2.
    latents = {e: _first(n for n in _calls(graph, aten.conv2d.default) if evaluation_of(n) == e) for e in (1, 2)}
    copies: dict[Node, Node] = {latents[1]: latents[2]}
    before_user = [node for node in graph.graph.nodes if latents[1] < node <= value]
    with graph.graph.inserting_before(user):
        for node in before_user:
            if evaluation_of(node) == 1 and any(argument in copies for argument in node.all_input_nodes):
                copies[node] = graph.graph.node_copy(node, lambda old: copies.get(old, old))
                copies[node].meta.pop("sites", None)
                copies[node].meta["evaluation"] = 2
    if value not in copies:
        raise NotApplicable
    if read:
        user.replace_input_with(value, copies[value])


def _delta_read(graph: LoopGraph) -> None:
    value, user = _reader(graph, 1, MLP, 2)
    stream = _first(a for a in _first(value.users).users)
    base = _first(a for a in stream.all_input_nodes if a.meta["val"].shape == value.meta["val"].shape)
    user.replace_input_with(value, _insert(graph, user, aten.sub.Tensor, value, base))


def _scaled_read(graph: LoopGraph, factor: float) -> None:
    value, user = _reader(graph, 1, ATTN, 2)
    user.replace_input_with(value, _insert(graph, user, aten.mul.Tensor, value, factor))


def _rounded_read(graph: LoopGraph) -> None:
    value, user = _reader(graph, 1, ATTN, 2)
    low = _insert(graph, user, aten.to.dtype, value, torch.bfloat16)
    low.meta["val"] = low.meta["val"].to(torch.bfloat16)
    back = _insert(graph, user, aten.to.dtype, low, torch.float32)
    back.meta["val"] = value.meta["val"]
    user.replace_input_with(value, back)


def _removed_store(graph: LoopGraph) -> None:
    value, _ = _reader(graph, 1, ATTN, 2)
    value._remove_from_list()
    graph.graph._find_nodes_lookup_table.remove(value)


def _computed_again(graph: LoopGraph) -> None:
    """Compute the kept value a second time for one of its two readers."""
    value, user = _reader(graph, 3, ATTN, 4)
    with graph.graph.inserting_before(user):
        user.replace_input_with(value, graph.graph.node_copy(value))


def _written_in_place(graph: LoopGraph) -> None:
    value, user = _reader(graph, 1, ATTN, 2)
    user.replace_input_with(value, _insert(graph, user, aten.mul_.Tensor, value, 1.0))


# Mutations of gates.


def _gates(graph: LoopGraph, evaluation: int, site: str, reader: int) -> tuple[Node, Node]:
    """Return the product with the gate of a site that an evaluation reads, and the gate."""
    value, product = _reader(graph, evaluation, site, reader)
    if product.target is not aten.mul.Tensor:
        raise NotApplicable
    return product, _first(a for a in product.all_input_nodes if a is not value)


def _dropped_gate(graph: LoopGraph) -> None:
    product, _ = _gates(graph, 1, ATTN, 2)
    product.replace_all_uses_with(_value(graph, 1, ATTN))
    graph.graph.erase_node(product)
    graph.graph.eliminate_dead_code()


def _stale_gate(graph: LoopGraph) -> None:
    product, gate = _gates(graph, 1, ATTN, 2)
    _, stale = _gates(graph, 1, ATTN, 1)
    product.replace_input_with(gate, stale)
    graph.graph.eliminate_dead_code()


def _gate_of_the_neighbour(graph: LoopGraph) -> None:
    product, gate = _gates(graph, 1, ATTN, 2)
    product.replace_input_with(gate, _gates(graph, 1, MLP, 2)[1])
    graph.graph.eliminate_dead_code()


def _gate_off_by_little(graph: LoopGraph) -> None:
    product, gate = _gates(graph, 1, ATTN, 2)
    product.replace_input_with(gate, _insert(graph, product, aten.mul.Tensor, gate, 1.0 + 2.0**-23))


# Mutations of whatever is kept: after passes that round, sums and products of sites' values.


def _kept(graph: LoopGraph, reader: int) -> tuple[Node, Node]:
    """Return a value of an earlier evaluation that an evaluation reads, and who reads it."""
    early = graph.known_before_the_loop()
    for user in graph.graph.nodes:
        if evaluation_of(user) == reader and user.op == "call_function":
            for value in user.all_input_nodes:
                if value not in early and evaluation_of(value) is not None and evaluation_of(value) != reader:
                    return value, user
    raise NotApplicable


def _kept_for_another_reader(graph: LoopGraph, reader: int, other: int) -> None:
    value, user = _kept(graph, reader)
    replacement, _ = _kept(graph, other)
    if replacement is value or not replacement < user:
        raise NotApplicable
    user.replace_input_with(value, replacement)


def _kept_scaled(graph: LoopGraph) -> None:
    value, user = _kept(graph, 2)
    user.replace_input_with(value, _insert(graph, user, aten.mul.Tensor, value, 1.0 + 2.0**-23))


def _kept_negated(graph: LoopGraph) -> None:
    value, user = _kept(graph, 5)
    user.replace_input_with(value, _insert(graph, user, aten.neg.default, value))


def _kept_gates_swapped(graph: LoopGraph) -> None:
    """Exchange the gates that one value is kept with for two readers."""
    early = graph.known_before_the_loop()
    value = _value(graph, 3, ATTN)
    products = [user for user in value.users if user.target is aten.mul.Tensor]
    gates = [_first(a for a in product.all_input_nodes if a is not value) for product in products]
    if len(products) < 2 or not early.issuperset(gates):
        raise NotApplicable
    products[-1].replace_input_with(gates[-1], gates[-2])
    graph.graph.eliminate_dead_code()


# Mutations of the loop.


def _folded_swapped(graph: LoopGraph) -> None:
    by_form: dict[object, list[Node]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        if str(node.target).startswith("_folded"):
            by_form.setdefault(tuple(node.meta["val"].shape), []).append(node)
    pair = next((nodes for nodes in by_form.values() if len(nodes) > 1), None)
    if pair is None:
        raise NotApplicable
    pair[0].target, pair[1].target = pair[1].target, pair[0].target


def _folded_changed(graph: LoopGraph) -> None:
    node = _first(n for n in graph.graph.find_nodes(op="get_attr") if str(n.target).startswith("_folded"))
    name = str(node.target)
    graph.root._buffers[name] = torch.nextafter(graph.root.get_buffer(name), torch.tensor(torch.inf))


def _coefficients_of_the_loop(graph: LoopGraph) -> list[Node]:
    return [
        node
        for node in _calls(graph, aten.mul.Tensor)
        if evaluation_of(node) is None and isinstance(node.args[1], float)
    ]


def _coefficient_changed(graph: LoopGraph, factor: float) -> None:
    node = _first(_coefficients_of_the_loop(graph))
    assert isinstance(node.args[1], float)
    node.update_arg(1, node.args[1] * factor)


def _coefficients_swapped(graph: LoopGraph) -> None:
    nodes = _coefficients_of_the_loop(graph)
    one = _first(nodes)
    other = _first(node for node in nodes if node.args[1] != one.args[1])
    a, b = one.args[1], other.args[1]
    one.update_arg(1, b)
    other.update_arg(1, a)


def _halves_swapped(graph: LoopGraph) -> None:
    split = _first(node for node in _calls(graph, aten.split.Tensor) if evaluation_of(node) is None)
    for part in list(split.users):
        part.update_arg(1, 1 - part.args[1])  # type: ignore[operator]


def _evaluation_repeated(graph: LoopGraph, *, read: bool) -> None:
    """Run the last evaluation twice; both give the same."""
    own = [node for node in graph.graph.nodes if evaluation_of(node) == graph.num_evaluations - 1]
    used_outside = [node for node in own if any(user not in own for user in node.users)]
    last = _first(reversed(used_outside))
    copies: dict[Node, Node] = {}
    with graph.graph.inserting_after(last):
        anchor = graph.graph.call_function(aten.clone.default, (last,))
    with graph.graph.inserting_before(anchor):
        for node in own:
            copies[node] = graph.graph.node_copy(node, lambda old: copies.get(old, old))
    graph.graph.erase_node(anchor)
    if read:
        for user in list(last.users):
            if user not in own:
                user.replace_input_with(last, copies[last])


def _draw_shared(graph: LoopGraph) -> None:
    draws = _calls(graph, aten.randn_like.default)
    draws[1].replace_all_uses_with(draws[0])
    graph.graph.erase_node(draws[1])


def _draw_added(graph: LoopGraph) -> None:
    draw = _calls(graph, aten.randn_like.default)[0]
    draw.append(graph.graph.node_copy(draw))


# Mutations of operations.


def _operands_swapped(graph: LoopGraph) -> None:
    node = _calls(graph, aten.sub.Tensor)[0]
    node.args = (node.args[1], node.args[0])


def _addition_repeated(graph: LoopGraph) -> None:
    value, product = _reader(graph, 1, ATTN, 2)
    total = _first(product.users) if product.target is aten.mul.Tensor else product
    added = product if product.target is aten.mul.Tensor else value
    after = total.next
    again = _insert(graph, after, aten.add.Tensor, total, added)
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _residual_dropped(graph: LoopGraph) -> None:
    _, product = _reader(graph, 1, ATTN, 2)
    total = _first(product.users)
    total.replace_all_uses_with(product)
    graph.graph.eliminate_dead_code()


def _square_projection(graph: LoopGraph) -> Node:
    return _first(
        node
        for node in _calls(graph, aten.linear.default)
        if len(set(node.args[1].meta["val"].shape)) == 1 and "sites" in node.meta  # type: ignore[union-attr]
    )


def _weight_transposed(graph: LoopGraph) -> None:
    node = _square_projection(graph)
    weight = node.args[1]
    assert isinstance(weight, Node)
    transposed = _insert(graph, node, aten.t.default, weight)
    transposed.meta["val"] = weight.meta["val"].t()
    node.update_arg(1, transposed)


def _weight_of_another_module(graph: LoopGraph) -> None:
    node = _square_projection(graph)
    other = _first(
        n
        for n in _calls(graph, aten.linear.default)
        if n.args[1] is not node.args[1] and n.args[1].meta["val"].shape == node.args[1].meta["val"].shape  # type: ignore[union-attr]
    )
    node.args = (node.args[0], *other.args[1:])


def _bias_dropped(graph: LoopGraph) -> None:
    node = _first(n for n in _calls(graph, aten.linear.default) if len(n.args) == 3)
    node.args = node.args[:2]


def _epsilon_changed(graph: LoopGraph) -> None:
    node = _calls(graph, aten.layer_norm.default)[0]
    node.update_arg(4, 1.1e-6)


def _batched_rows_shifted(graph: LoopGraph) -> None:
    """Give the rows of a batched projection to the wrong evaluations."""
    parts = _calls(graph, aten.split_with_sizes.default)[0]
    for part in list(parts.users):
        part.update_arg(1, (part.args[1] + 1) % len(parts.users))  # type: ignore[operator]


def _batched_inputs_shifted(graph: LoopGraph) -> None:
    stacked = _first(n for n in _calls(graph, aten.cat.default) if len(n.args[0]) > 2)  # type: ignore[arg-type]
    parts = stacked.args[0]
    assert isinstance(parts, (list, tuple))
    stacked.update_arg(0, [*parts[1:], parts[0]])


def _pruned_rows_shifted(graph: LoopGraph) -> None:
    rows = _first(
        n
        for n in _calls(graph, aten.slice.Tensor)
        if n.args[0].op == "get_attr" and n.args[0].meta["val"].ndim == 2 and n.args[2] > 0  # type: ignore[union-attr, operator]
    )
    rows.args = (*rows.args[:2], rows.args[2] - 1, rows.args[3] - 1)  # type: ignore[operator]


def _pruned_row_too_many(graph: LoopGraph) -> None:
    """Prune the last of the rows that are needed."""
    rows = _first(n for n in _calls(graph, aten.slice.Tensor) if n.args[0].op == "get_attr")  # type: ignore[union-attr]
    rows.update_arg(3, rows.args[3] - 1)  # type: ignore[operator]


def _term_left_out_of_a_sum(graph: LoopGraph) -> None:
    total = _first(
        n
        for n in _calls(graph, aten.add.Tensor)
        if (made := evaluation_of(n)) is not None and all((evaluation_of(u) or 0) > made for u in n.users)
    )
    total.replace_all_uses_with(_first(total.all_input_nodes))
    graph.graph.eliminate_dead_code()


# Mutations of the form of the graph, its notes and its plan.


def _cycle(graph: LoopGraph) -> None:
    node = _first(n for n in _calls(graph, aten.add.Tensor) if evaluation_of(n) == 1)
    node.replace_input_with(node.all_input_nodes[0], _first(node.users))


def _wrong_order(graph: LoopGraph) -> None:
    node = _first(n for n in _calls(graph, aten.linear.default) if evaluation_of(n) == 1)
    node.prepend(_first(node.users))


def _wrong_note(graph: LoopGraph, **notes: object) -> None:
    node, _ = _reader(graph, 1, ATTN, 2)
    node.meta.update(notes)


def _note_of_another_form(graph: LoopGraph) -> None:
    node, _ = _reader(graph, 1, ATTN, 2)
    node.meta["val"] = node.meta["val"].to(torch.float64)


def _missing_weight(graph: LoopGraph) -> None:
    node = _first(n for n in graph.graph.find_nodes(op="get_attr") if str(n.target).endswith("qkv.weight"))
    node.target = str(node.target).replace("qkv", "gone")


def _plan(graph: LoopGraph, **changes: Callable[[Any], object]) -> MemoryPlan:
    """Return the plan with fields of one value changed."""
    plan = plan_memory(graph)
    index = len(plan.kept) // 2
    changed = dataclasses.replace(plan.kept[index], **{k: f(plan.kept[index]) for k, f in changes.items()})  # type: ignore[arg-type]
    return dataclasses.replace(plan, kept=(*plan.kept[:index], changed, *plan.kept[index + 1 :]))


def _plan_without_one(graph: LoopGraph) -> MemoryPlan:
    plan = plan_memory(graph)
    gone = next(value for value in plan.kept if value.last_read_in > value.made_in)
    return dataclasses.replace(plan, kept=tuple(value for value in plan.kept if value is not gone))


def _plan_with_one_too_many(graph: LoopGraph) -> MemoryPlan:
    plan = plan_memory(graph)
    node = _first(
        n for n in _calls(graph, aten.layer_norm.default) if n.name not in {value.name for value in plan.kept}
    )
    position = list(graph.graph.nodes).index(node)
    size = node.meta["val"].numel() * node.meta["val"].element_size()
    more = dataclasses.replace(
        plan.kept[0], name=node.name, begin=position, end=position + 9, num_bytes=size, slot=len(plan.slot_bytes)
    )
    return dataclasses.replace(plan, kept=(*plan.kept, more), slot_bytes=(*plan.slot_bytes, size))


def _plan_with_one_slot(graph: LoopGraph) -> MemoryPlan:
    plan = plan_memory(graph)
    return dataclasses.replace(plan, kept=tuple(dataclasses.replace(value, slot=0) for value in plan.kept))


Mutate = Callable[[LoopGraph], MemoryPlan | None]

ON_DIT: dict[str, Mutate] = {
    "wrong source: the evaluation before": partial(_instead, old=(1, ATTN), new=(0, ATTN), reader=2),
    "stale source: not the latest": partial(_instead, old=(3, ATTN), new=(1, ATTN), reader=4),
    "off by one in the last reader": partial(_instead, old=(3, MLP), new=(1, MLP), reader=5),
    "sites swapped within a block": partial(_exchange, first=(1, ATTN), second=(1, MLP), reader=2),
    "sites swapped between blocks": partial(_exchange, first=(1, ATTN), second=(1, "blocks.1.attn"), reader=2),
    "one site read twice": partial(_instead, old=(1, ATTN), new=(1, "blocks.1.attn"), reader=2),
    "skipped site computed and read": partial(_site_recomputed, read=True),
    "skipped site computed for nobody": partial(_site_recomputed, read=False),
    "store removed": _removed_store,
    "value computed again for its reader": _computed_again,
    "delta read as output": _delta_read,
    "zeros read": partial(_scaled_read, factor=0.0),
    "read off by one unit in the last place": partial(_scaled_read, factor=1.0 + 2.0**-23),
    "read through bfloat16": _rounded_read,
    "cached value written in place": _written_in_place,
    "gate dropped": _dropped_gate,
    "gate of the source evaluation": _stale_gate,
    "gate of the neighbour": _gate_of_the_neighbour,
    "gate off by one unit in the last place": _gate_off_by_little,
    "kept for another reader": partial(_kept_for_another_reader, reader=5, other=4),
    "kept for an earlier reader": partial(_kept_for_another_reader, reader=4, other=2),
    "kept value off by one unit in the last place": _kept_scaled,
    "kept value negated": _kept_negated,
    "kept with the gate of another reader": _kept_gates_swapped,
    "timesteps of two evaluations swapped": _folded_swapped,
    "folded constant off by one unit": _folded_changed,
    "loop coefficient changed by 1e-9": partial(_coefficient_changed, factor=1.0 + 1e-9),
    "loop coefficients swapped": _coefficients_swapped,
    "guidance halves swapped": _halves_swapped,
    "evaluation repeated for nobody": partial(_evaluation_repeated, read=False),
    "evaluation repeated and read": partial(_evaluation_repeated, read=True),
    "random draw shared": _draw_shared,
    "random draw added": _draw_added,
    "operands swapped": _operands_swapped,
    "addition repeated": _addition_repeated,
    "residual dropped": _residual_dropped,
    "weight transposed": _weight_transposed,
    "weight of another module": _weight_of_another_module,
    "bias dropped": _bias_dropped,
    "epsilon of a norm changed": _epsilon_changed,
    "batched rows dealt wrongly": _batched_rows_shifted,
    "batched inputs stacked wrongly": _batched_inputs_shifted,
    "pruned rows off by one": _pruned_rows_shifted,
    "one row too many pruned": _pruned_row_too_many,
    "term left out of a kept sum": _term_left_out_of_a_sum,
    "cycle": _cycle,
    "use before definition": _wrong_order,
    "weight that does not exist": _missing_weight,
    "note of another evaluation": partial(_wrong_note, evaluation=5),
    "note of another site": partial(_wrong_note, sites=((1, MLP, 0),)),
    "note of another dtype": _note_of_another_form,
    "freed early": partial(_plan, end=lambda value: value.end - 1),
    "freed late": partial(_plan, end=lambda value: value.end + 3),
    "kept before it is made": partial(_plan, begin=lambda value: value.begin - 1),
    "not kept": _plan_without_one,
    "kept for nobody": _plan_with_one_too_many,
    "one slot for all": _plan_with_one_slot,
}


def _shared_call(graph: LoopGraph) -> None:
    value, user = _reader(graph, 0, "shared", 1)
    user.replace_input_with(value, _value(graph, 0, "shared@1"))


def _other_result(graph: LoopGraph) -> None:
    value, user = _reader(graph, 1, "pair", 2)
    user.replace_input_with(value, _value(graph, 1, "pair", 1))


def _results_exchanged(graph: LoopGraph) -> None:
    a, user_of_a = _reader(graph, 1, "pair", 2)
    b, user_of_b = _reader(graph, 1, "pair", 2, port=1)
    user_of_a.replace_input_with(a, b)
    user_of_b.replace_input_with(b, a)


ON_SHARED: dict[str, Mutate] = {
    "other call of a shared module": _shared_call,
    "other result of a tuple": _other_result,
    "results of a tuple swapped": _results_exchanged,
}

MUTATIONS: tuple[tuple[Callable[[str], Subject], dict[str, Mutate]], ...] = (
    (dit, ON_DIT),
    (shared_and_pair, ON_SHARED),
)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return a row a mutation, 1 where the proof catches it, and the shares that the proof and numbers alone catch."""
    Options("mutations").read(args)
    rows: list[Row] = []
    task = progress.add_task("mutations", total=len(PIPELINES) * sum(len(each) for _, each in MUTATIONS))
    for pipeline in PIPELINES:
        judged: list[Outcome] = []
        for make, mutations in MUTATIONS:
            subject = make(pipeline)
            where = {"graph": subject.name, "pipeline": pipeline}
            rows.append(Row("right_graph_proven", float(subject.prove(subject.graph).holds), "", where))
            for name, mutate in mutations.items():
                progress.advance(task)
                try:
                    judged.append(outcome(subject, mutate))
                except NotApplicable:
                    continue
                rows.append(_row(judged[-1], {**where, "mutation": name}))
        count: dict[str, Condition] = {"pipeline": pipeline, "mutations": len(judged)}
        rows.append(Row("caught_share", sum(bool(each.structure) for each in judged) / len(judged), "", count))
        rows.append(Row("caught_by_numbers_share", sum(each.numeric for each in judged) / len(judged), "", count))
    return rows + state_rows(progress)


def _row(judged: Outcome, conditions: Mapping[str, str]) -> Row:
    numbers = "caught" if judged.numeric else "missed"
    return Row(
        "caught", float(bool(judged.structure)), "", {**conditions, "check": judged.structure, "numbers": numbers}
    )
