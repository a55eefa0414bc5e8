"""What the pass finds, what it leaves alone, and that what it makes is the same to the kernels' bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, load, run_reference
from l2c_compile.analyses.memory_plan import plan_memory
from l2c_compile.backends.options import Options
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, num_bytes
from l2c_compile.kernels._launch import Terms
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.passes.base import PassReport, Pipeline
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.fuse_cached_residuals import FuseCachedResiduals
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pipeline import BITWISE, LOOP, REGIONS
from l2c_compile.passes.plan_memory import PlanMemory
from l2c_compile.schedules.rules import Reading, Rule, T
from tests.exact import assert_within, exact_norm, exact_sum, gamma, sum_bound
from tests.tiny import draw, run, seeded, set_passes, steps, tiny_dit, tiny_uvit, unrolled

NOISE = draw(2, 3, 8)
ON_CPU = FuseCachedResiduals(devices=frozenset({"cpu"}))
SUM, NORM = torch.ops.l2c.cached_residual.default, torch.ops.l2c.cached_residual_norm.default
FORCED = Pipeline(tuple(ON_CPU if p.name == ON_CPU.name else p for p in LOOP.passes), LOOP.assumes)

Write = Callable[["Sublayers", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Sublayers(nn.Module):
    """x and the outputs a, b of two layers, put together as ``write(self, x, a, b, gate_B1D, t_B)`` says."""

    def __init__(self, write: Write, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gates = nn.Linear(1, 16)
        self.norm = nn.LayerNorm(8)
        self.write = write
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second, after = self.layers
        x = torch.tanh(x)
        gate, shift = self.gates(t[:, None].to(x.dtype)).unsqueeze(1).chunk(2, dim=-1)
        y: Tensor = self.write(self, x, first(x), second(x), gate, shift)
        result: Tensor = after(y)
        return result


@dataclass
class Found:
    graph: LoopGraph
    report: PassReport
    before: Tensor
    after: Tensor

    @property
    def calls(self) -> list[torch.fx.Node]:
        nodes = self.graph.graph.nodes
        return [node for node in nodes if node.target in (SUM, NORM)]

    def terms(self) -> int:
        (call,) = self.calls
        caches = call.args[1]
        assert isinstance(caches, (list, tuple))
        return len(caches)

    def check_close(self, factor: float = 1.0) -> None:
        # Each side rounds a handful of sums of values of order 1, and layers of 8 carry that on.
        size = float(self.before.abs().max())
        eps = torch.finfo(self.before.dtype).eps
        assert (self.after - self.before).abs().max() <= factor * 64 * eps * size
        assert not torch.isnan(self.after).any()


BOTH = {"layers.0": [1, 0], "layers.1": [1, 0]}


def fused(
    write: Write | nn.Module,
    rows: dict[str, list[int]] | CacheSchedule = BOTH,
    noise: Tensor = NOISE,
    the_pass: FuseCachedResiduals = ON_CPU,
) -> Found:
    """Return the graph after the bitwise passes and this one, and the results before and after it."""
    schedule = rows if isinstance(rows, CacheSchedule) else CacheSchedule.from_table(rows)
    model = write if isinstance(write, nn.Module) else Sublayers(write, noise.dtype)
    graph = unrolled(seeded(model), schedule, steps(schedule.num_evaluations), noise)
    BITWISE.without(["plan-memory"]).run(graph)
    (before,) = run(graph, noise)
    runs = Pipeline((the_pass, DropDead()), ON_CPU.needs).run(graph)
    (after,) = run(graph, noise)
    return Found(graph, runs[0].report, before, after)


def modulated(h: Tensor, gate: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(h, (8,), eps=1e-6) * (1 + gate) + shift


SUMS: dict[str, Write] = {
    "in order": lambda m, x, a, b, g, s: x + a + b,
    "gated": lambda m, x, a, b, g, s: x + g * a + s * b,
    "gate on the right": lambda m, x, a, b, g, s: (x + a * g) + b * s,
    "reordered": lambda m, x, a, b, g, s: b * s + (g * a + x),
    "gate of (B, D) with a dimension put in": lambda m, x, a, b, g, s: x + g.squeeze(1)[:, None] * a + b,
    "expanded gate": lambda m, x, a, b, g, s: x + g.expand_as(x) * a + b,
    "gate a token": lambda m, x, a, b, g, s: x + x.new_ones(3, 8).cumsum(0) * a + b,
    "scale and shift": lambda m, x, a, b, g, s: x + (a * g + s) + b,
    "gate over scale and shift": lambda m, x, a, b, g, s: x + m.norm.weight * (g * a + s) + b,
    "scalar weights": lambda m, x, a, b, g, s: x + 0.5 * (g * a) - b / 4,
    "alpha": lambda m, x, a, b, g, s: torch.add(torch.sub(x, a, alpha=2), b, alpha=3),
    "negative": lambda m, x, a, b, g, s: x + (-a) + b,
}


@cache
def written(name: str) -> Found:
    """Return one of ``SUMS`` or ``NORMS``, fused; the tests that share it do not change it."""
    return fused({**SUMS, **NORMS}[name])


@pytest.mark.parametrize("name", SUMS)
def test_every_way_to_write_the_sum_becomes_one_op(name: str) -> None:
    found = written(name)
    assert [call.target for call in found.calls] == [SUM], found.report.reasons()
    assert found.terms() == 2
    assert found.report.rewrites == 1
    found.check_close()


NORMS: dict[str, Write] = {
    "modulated": lambda m, x, a, b, g, s: modulated(x + a + b, g, s),
    "affine": lambda m, x, a, b, g, s: m.norm(x + a + b),
    "affine and modulated": lambda m, x, a, b, g, s: m.norm(x + a + b) * (1 + g) + s,
    "bare": lambda m, x, a, b, g, s: F.layer_norm(x + a + b, (8,)),
    "scaled by another factor than 1 + s": lambda m, x, a, b, g, s: F.layer_norm(x + a + b, (8,)) * g + s,
    "shifted only": lambda m, x, a, b, g, s: s + F.layer_norm(x + a + b, (8,)),
    "rms": lambda m, x, a, b, g, s: F.rms_norm(x + a + b, (8,), m.norm.weight, 1e-5) * (g + 1) + s,
    "rms, eps of the dtype": lambda m, x, a, b, g, s: F.rms_norm(x + a + b, (8,)),
    "native": lambda m, x, a, b, g, s: torch.native_layer_norm(x + a + b, (8,), None, None, 1e-6)[0] * (1 + g),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_and_modulation_behind_it_come_along(name: str) -> None:
    found = written(name)
    assert [call.target for call in found.calls] == [NORM], found.report.reasons()
    assert evaluation_of(found.calls[0]) == 1
    # Nothing of the norm is left in the evaluation that is fused.
    rest = [str(n.target) for n in found.graph.graph.nodes if evaluation_of(n) == 1]
    assert not any("layer_norm" in name or "rms_norm" in name for name in rest)
    found.check_close(8)


def test_the_stream_that_others_read_is_the_first_result() -> None:
    def write(m: Sublayers, x: Tensor, a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> Tensor:
        h = x + g * a
        return h * torch.sin(modulated(h, g, s)) + b

    found = fused(write)
    # The second sum has one kept term and no norm.
    assert [call.target for call in found.calls] == [NORM]
    assert ["nothing to save" in reason for reason in found.report.reasons()] == [True]
    found.check_close(8)


def test_a_computed_branch_in_front_of_a_kept_one_is_a_term_as_well() -> None:
    found = fused(NORMS["modulated"], {"layers.0": [1, 1], "layers.1": [1, 0]})
    assert [call.target for call in found.calls] == [NORM]
    assert found.terms() == 2
    found.check_close(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "write",
    [
        lambda m, x, a, b, g, s: x + (g.float() * a.float()).to(x.dtype) + b,
        lambda m, x, a, b, g, s: (x.float() + a.float() * g.float() + b.float()).to(x.dtype),
        lambda m, x, a, b, g, s: modulated((x + a + b).float(), g.float(), s.float()).to(x.dtype),
    ],
    ids=["term", "stream", "norm"],
)
def test_casts_are_looked_through(write: Write, dtype: torch.dtype) -> None:
    found = fused(write, noise=NOISE.to(dtype))
    assert len(found.calls) == 1, found.report.reasons()
    assert found.terms() == 2
    # No cast of the stream is left: the kernel reads and writes the dtype that goes on.
    base = found.calls[0].args[0]
    assert isinstance(base, torch.fx.Node)
    assert base.meta["val"].dtype == dtype
    streams = [n for n in found.graph.graph.nodes if evaluation_of(n) == 1 and "_to_copy" in str(n.target)]
    assert all(n.meta["val"].shape[1] == 1 for n in streams), streams
    found.check_close()


@dataclass(frozen=True)
class Extrapolate(Rule):
    name = "test-fuse-extrapolate"

    @property
    def num_sources(self) -> int:
        return 2

    def combine(self, reading: Reading[T]) -> T:
        aten = torch.ops.aten
        new, old = reading.history
        return aten.sub.Tensor(aten.mul.Scalar(new, 2.0), old)  # type: ignore[no-any-return]


def test_a_linear_combination_is_terms_with_weights_where_both_sources_are_kept_anyway() -> None:
    rule = Extrapolate()
    cells = {(2, "layers.0"): ((1, 0), rule), (3, "layers.0"): ((1, 0), rule)}
    schedule = with_rules(4, {"layers.1": [1, 1, 0, 0]}, cells)
    found = fused(SUMS["gated"], schedule)
    by_evaluation = {evaluation_of(call): call for call in found.calls}
    last = by_evaluation[3]
    # Evaluations 2 and 3 read the same combination, which merge-common made one node of evaluation 2.
    assert len(last.args[1]) == 2  # type: ignore[arg-type]
    found.check_close()


def test_a_linear_combination_that_would_keep_two_tensors_for_one_is_left_to_plan_memory() -> None:
    schedule = with_rules(4, {"layers.1": [1, 1, 0, 1]}, {(3, "layers.0"): ((1, 0), Extrapolate())})
    found = fused(NORMS["modulated"], schedule)
    (call,) = [c for c in found.calls if evaluation_of(c) == 3]
    (cache,) = [c for c in call.args[1] if "sub" in str(c)]  # type: ignore[union-attr]
    assert evaluation_of(cache) == 3  # type: ignore[arg-type]
    PlanMemory().run(found.graph)
    assert evaluation_of(cache) == 1  # type: ignore[arg-type]


def with_rules(
    count: int, rows: dict[str, list[int]], cells: Mapping[tuple[int, str], tuple[tuple[int, ...], Rule]]
) -> CacheSchedule:
    from l2c_compile.schedules.schedule import Reuse
    from l2c_compile.schedules.sites import Site

    held = CacheSchedule.from_table({**rows, "layers.0": [1] * count})
    reuses = dict(held.reuses)
    reuses.update({(e, Site.parse(name)): Reuse(sources, rule) for (e, name), (sources, rule) in cells.items()})
    return CacheSchedule(count, held.sites, reuses)


LEFT: dict[str, tuple[Write, dict[str, list[int]]]] = {
    "one kept value and no norm": (lambda m, x, a, b, g, s: x + g * a, {"layers.0": [1, 0]}),
    "nothing kept": (NORMS["modulated"], {"layers.2": [1, 0]}),
    "a norm over other dimensions, one kept value": (
        lambda m, x, a, b, g, s: F.layer_norm(x + a, (3, 8)),
        {"layers.0": [1, 0]},
    ),
    "a view in between, one kept value on each side": (
        lambda m, x, a, b, g, s: ((x + a).reshape(2, 24) + b.reshape(2, 24)).reshape(2, 3, 8),
        BOTH,
    ),
    "a product of kept values": (lambda m, x, a, b, g, s: x * a * b, BOTH),
    "a difference from kept values": (lambda m, x, a, b, g, s: a - x + 0 * b.sum(), BOTH),
    "a gate by gate product, three factors": (
        lambda m, x, a, b, g, s: torch.tanh(x) + g * (s * (m.norm.weight * a)),
        {"layers.0": [1, 0]},
    ),
    "kept values only": (lambda m, x, a, b, g, s: torch.cos(a + b), BOTH),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_keeps_every_bit(name: str) -> None:
    found = fused(*LEFT[name])
    assert found.calls == []
    assert torch.equal(found.before, found.after)


def test_a_partial_sum_that_someone_else_reads_stays() -> None:
    def write(m: Sublayers, x: Tensor, a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> Tensor:
        h = x + a
        return h + b + torch.sin(h)

    found = fused(write)
    (call,) = found.calls
    partial = call.args[0]
    assert isinstance(partial, torch.fx.Node)
    assert [each.name for each in found.report.left_alone.values()] == [partial.name]
    assert found.terms() == 2
    found.check_close()


def test_a_gate_that_needs_the_latent_and_is_as_large_as_the_stream_stays_a_product() -> None:
    found = fused(lambda m, x, a, b, g, s: x + torch.sigmoid(x) * a + b)
    (call,) = found.calls
    caches = call.args[1]
    assert next(str(c.target) for c in caches) == "aten.mul.Tensor"  # type: ignore[union-attr]
    assert call.args[2] == []
    found.check_close()


def test_a_random_term_is_drawn_where_it_was() -> None:
    def write(m: Sublayers, x: Tensor, a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> Tensor:
        return x + a + b

    graph = unrolled(seeded(Sublayers(write)), CacheSchedule.from_table(BOTH), steps(2), NOISE)
    BITWISE.run(graph)
    sums = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    last = [n for n in sums if evaluation_of(n) == 1][-1]
    with graph.graph.inserting_before(last):
        source = last.args[0]
        drawn = emit(graph.graph, torch.ops.aten.randn_like.default, (source,), 1)
        noisy = emit(graph.graph, torch.ops.aten.add.Tensor, (source, drawn), 1)
    last.replace_input_with(source, noisy)
    torch.manual_seed(3)
    (before,) = run(graph, NOISE)
    ON_CPU.run(graph)
    DropDead().run(graph)
    assert drawn in graph.graph.nodes
    torch.manual_seed(3)
    (after,) = run(graph, NOISE)
    assert (after - before).abs().max() <= 64 * torch.finfo(after.dtype).eps * before.abs().max()


def test_a_stream_that_the_kernel_does_not_take_has_a_reason() -> None:
    found = fused(lambda m, x, a, b, g, s: x + a + b, noise=draw(2, 3, 2, 8))
    assert found.calls == []
    assert any("takes (B, T, D) floats" in reason for reason in found.report.reasons())


def test_on_a_cpu_the_default_pipeline_leaves_the_graph_to_inductor() -> None:
    found = fused(NORMS["modulated"], the_pass=FuseCachedResiduals())
    assert found.calls == []
    assert found.report.rewrites == 0
    assert found.report.reasons() == {"is a graph without tensors on cuda, where the kernels pay": 1}
    assert torch.equal(found.before, found.after)
    assert "fuse-cached-residuals" in [p.name for p in LOOP.passes]
    assert "fuse-cached-residuals" not in [p.name for p in BITWISE.passes]


class Transposed(nn.Module):
    """A stream that is not contiguous, as the patch embedding of a DiT leaves it."""

    def __init__(self, *, viewed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.viewed = viewed

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.sin(x).transpose(1, 2)
        h = h + self.layers[0](h) + self.layers[1](h)
        # A view only of the transposed layout: a copy of a contiguous one.
        back = h.transpose(1, 2)
        return back.view(2, 4, 12).view(2, 8, 6) if self.viewed else torch.cos(back)


def test_a_stream_in_another_layout_becomes_contiguous_and_those_behind_it_know() -> None:
    found = fused(Transposed(viewed=False), noise=draw(2, 8, 6))
    assert len(found.calls) == 1
    found.check_close()
    for node, value in recorded(found.graph, draw(2, 8, 6)):
        assert node.meta["val"].stride() == value.stride(), node


def test_a_stream_that_is_viewed_in_its_layout_is_left_alone() -> None:
    found = fused(Transposed(viewed=True), noise=draw(2, 8, 6))
    assert found.calls == []
    assert any("memory layout" in reason for reason in found.report.reasons())
    assert torch.equal(found.before, found.after)


def recorded(graph: LoopGraph, *inputs: Tensor) -> list[tuple[torch.fx.Node, Tensor]]:
    values: list[tuple[torch.fx.Node, Tensor]] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values.append((n, value))
            return value

    with torch.no_grad():
        Recorder(graph.root, graph=graph.graph).run(*inputs)
    return values


@pytest.mark.parametrize("name", [*SUMS, *NORMS])
def test_every_op_in_the_graph_is_within_the_bound_of_its_kernel(name: str) -> None:
    found = written(name)
    values = dict(recorded(found.graph, NOISE))
    (call,) = found.calls
    args: Any = torch.fx.node.map_arg(call.args, values.__getitem__)
    x, *lists = args[:7]
    terms = Terms(*lists)
    with torch.no_grad():
        total, magnitude = exact_sum(x, terms)
        result = call.target(*args)  # type: ignore[operator]
        stream = result if call.target is SUM else result[0]
        assert_within(stream, total, sum_bound(total, magnitude, len(terms), x.dtype))
        if call.target is NORM:
            wanted, bound = exact_norm(stream, args[7], args[8], args[9:13])
            assert_within(result[1], wanted, bound)


DIT_LOOP = DDIM(steps=4, guidance=Guidance(scale=2.0, null={"y": 5}))
DIT_ROWS = {
    **{f"blocks.{i}.{name}": [1, 0, 1, 0] for i in (0, 2) for name in ("attn", "mlp")},
    "blocks.1.attn": [1, 1, 1, 0],
    "blocks.1.mlp": [1, 0, 0, 0],
}


@cache
def sampler_of(name: str, passes: Pipeline) -> tuple[CompiledSampler, Tensor, dict[str, Tensor]]:
    """Return a sampler that several tests share, and its inputs."""
    if name == "dit":
        schedule, loop = CacheSchedule.from_table(DIT_ROWS), DIT_LOOP
        model: nn.Module = tiny_dit(3)
    else:
        schedule = CacheSchedule.from_table(
            {"in_blocks.*.attn": [1, 0, 0, 1], "in_blocks.*.mlp": [1, 0, 1, 0], "mid_block.mlp": [1, 0, 1, 0]}
        )
        loop, model = DDIM(steps=4), tiny_uvit()
    schedule = schedule.resolve([path for path, _ in model.named_modules()])
    sampler = CompiledSampler(model, schedule, loop, Options(numerics="rounding", without=["pack-weights"]))
    set_passes(sampler, passes)
    return sampler, draw(2, 4, 4, 4), {"y": torch.tensor([1, 2])}


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_whole_samplers_agree_with_the_reference(name: str) -> None:
    sampler, noise, conditions = sampler_of(name, FORCED)
    program = sampler.capture(noise, **conditions)
    (done,) = [each for each in program.passes if each.name == "fuse-cached-residuals"]
    assert done.report.rewrites >= 3, done.report.reasons()
    assert sampler.loop is not None
    wanted = run_reference(sampler.model, sampler.loop, sampler.schedule, noise, conditions)
    plain, *_ = sampler_of(name, LOOP)
    got, unfused = sampler(noise, **conditions), plain(noise, **conditions)
    # No farther from the reference than the other passes that round already are, times the sums of four evaluations.
    assert isinstance(got, Tensor)
    assert isinstance(unfused, Tensor)
    assert isinstance(wanted, Tensor)
    allowed = max(float((unfused - wanted).abs().max()), gamma(4) * float(wanted.abs().max()))
    assert (got - wanted).abs().max() <= 8 * allowed


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_a_fused_graph_keeps_no_more_for_later_evaluations(name: str) -> None:
    fused_sampler, noise, conditions = sampler_of(name, FORCED)
    plain, *_ = sampler_of(name, LOOP)
    with_ops = plan_memory(fused_sampler.capture(noise, **conditions).graph)
    without = plan_memory(plain.capture(noise, **conditions).graph)
    assert with_ops.cache.peak_bytes <= without.cache.peak_bytes
    assert {kept.num_bytes for kept in with_ops.kept} <= {kept.num_bytes for kept in without.kept}


@pytest.mark.parametrize("name", ["dit", "uvit"])
def test_regions_take_the_ops(name: str) -> None:
    sampler, noise, conditions = sampler_of(name, FORCED)
    graph = sampler.capture(noise, **conditions).graph
    inputs = (noise, conditions["y"])
    wanted = run(graph, *inputs)
    outlined = graph.copy()
    REGIONS.run(outlined)
    assert REGIONS.passes == (OutlineRegions(),)
    bodies = [body for _, body in outlined.root.named_children() if isinstance(body, torch.fx.GraphModule)]
    ops = [n for body in bodies for n in body.graph.nodes if n.target in (SUM, NORM)]
    # A region of its own for each form: fewer than there are calls.
    calls = [n for n in graph.graph.nodes if n.target in (SUM, NORM)]
    assert 0 < len(ops) <= len(calls)
    (got,) = run(outlined, *inputs)
    assert torch.equal(got, wanted[0])


def test_torch_compile_and_a_file_take_the_ops(tmp_path: object) -> None:
    sampler, noise, conditions = sampler_of("dit", FORCED)
    wanted = sampler(noise, **conditions)
    assert isinstance(wanted, Tensor)
    compiled = torch.compile(sampler, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(noise, **conditions), wanted, rtol=1e-5, atol=1e-6)
    path = f"{tmp_path}/fused.pt2"
    sampler.save(path)
    loaded = load(path)
    assert any(node.target is NORM for node in loaded.graph_module.graph.nodes)
    assert torch.equal(loaded(noise, **conditions), wanted)


def test_the_ops_cost_no_multiply_adds_and_the_summary_counts_the_same() -> None:
    fused_sampler, noise, conditions = sampler_of("dit", FORCED)
    plain, *_ = sampler_of("dit", LOOP)
    fused_sampler.capture(noise, **conditions)
    plain.capture(noise, **conditions)
    assert fused_sampler.summary().multiply_adds == plain.summary().multiply_adds
    assert all(num_bytes(n) > 0 for n in fused_sampler._current().graph.graph.nodes if n.target is NORM)


def test_a_second_run_finds_nothing() -> None:
    assert ON_CPU.run(written("modulated").graph).rewrites == 0
