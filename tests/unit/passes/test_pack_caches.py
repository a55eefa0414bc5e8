"""Packed caches: what is packed, how far off it is, how many bytes it is, and nothing at all unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from l2c_compile import CacheSchedule, l2c_compile, load
from l2c_compile.analyses.memory_plan import plan_memory
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.passes.base import Numerics, PassReport, Pipeline
from l2c_compile.passes.fuse_cached_residuals import FuseCachedResiduals
from l2c_compile.passes.pack_caches import PackCaches
from l2c_compile.passes.pipeline import BITWISE, CACHE_FORMATS, LOOP, REGIONS, with_packed_caches
from l2c_compile.torch_backend import l2c
from tests.exact import U
from tests.tiny import draw, run, seeded, set_passes, steps, tiny_dit, unrolled

PACK = torch.ops.l2c.pack_cache.default
FUSED = (torch.ops.l2c.cached_residual.default, torch.ops.l2c.cached_residual_norm.default)
FORMATS = sorted(CACHE_FORMATS)
ON_CPU = FuseCachedResiduals(devices=frozenset({"cpu"}))
FORCED = Pipeline(tuple(ON_CPU if p.name == ON_CPU.name else p for p in LOOP.passes), LOOP.assumes)

LOOP_4 = DDIM(steps=4, guidance=Guidance(scale=2.0, null={"y": 5}))
ROWS = {"blocks.*.attn": [1, 0, 1, 0], "blocks.*.mlp": [1, 0, 0, 0]}
NOISE, LABELS = draw(2, 4, 4, 4), torch.tensor([1, 2])


class Residual(nn.Module):
    """One sublayer of a stream (B, T, D), and what is made of it as ``how`` says."""

    def __init__(
        self, dim: int = 8, how: str = "plain", make: Callable[[int], nn.Module] = lambda dim: nn.Linear(dim, dim)
    ) -> None:
        super().__init__()
        self.layer, self.after, self.how = make(dim), make(dim), how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        branch = self.layer(torch.tanh(x))
        if self.how == "transposed":
            branch = branch.transpose(1, 2).contiguous().transpose(1, 2)
        if self.how == "viewed":
            branch = branch.transpose(1, 2).contiguous().transpose(1, 2)
            x = x + branch.transpose(1, 2).view(branch.shape[0], -1).view_as(x)
        result: Tensor = self.after(x + branch)
        return result


def packed(
    model: nn.Module, rows: dict[str, list[int]], noise: Tensor, cache_format: str = "int8"
) -> tuple[LoopGraph, PassReport, Tensor, Tensor]:
    """Return the graph after packing, the report, and the results before and after."""
    schedule = CacheSchedule.from_table(rows)
    graph = unrolled(seeded(model), schedule, steps(schedule.num_evaluations), noise)
    BITWISE.run(graph)
    (before,) = run(graph, noise)
    the_pass = PackCaches(CACHE_FORMATS[cache_format])
    report = Pipeline((the_pass,), the_pass.needs).run(graph)[0].report
    (after,) = run(graph, noise)
    return graph, report, before, after


@cache
def dit_sampler(cache_format: Any = None, passes: Pipeline | None = None, **options: Any) -> Any:  # noqa: ANN401 - a sampler
    """Return a sampler that several tests share."""
    sampler = l2c_compile(tiny_dit(), CacheSchedule.from_table(ROWS), LOOP_4, caches=cache_format, **options)
    if passes is not None:
        set_passes(sampler, passes)
    return sampler


def packs(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=PACK)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_a_kept_value_is_packed_once_and_unpacked_once_an_evaluation(cache_format: str) -> None:
    graph, report, before, after = packed(Residual(), {"layer": [1, 0, 0]}, draw(2, 3, 8), cache_format)
    assert report.rewrites == 1
    (pack,) = packs(graph.graph)
    assert evaluation_of(pack) == 0
    value = pack.args[0]
    assert isinstance(value, fx.Node)
    # The evaluation that made it reads it as it was, the others as it was packed.
    assert {evaluation_of(user) for user in value.users} == {0}
    q, scale = pack.users
    assert sorted(evaluation_of(user) for user in q.users) == [1, 2]  # type: ignore[type-var]
    assert sorted(evaluation_of(user) for user in scale.users) == [1, 2]  # type: ignore[type-var]
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.05 * float(before.abs().max()))


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_later_evaluation_reads_is_within_the_bound_of_the_format(cache_format: str, dtype: torch.dtype) -> None:
    noise = draw(2, 3, 16).to(dtype)
    graph, *_ = packed(Residual(16).to(dtype), {"layer": [1, 0]}, noise, cache_format)
    (pack,) = packs(graph.graph)
    values: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(graph.root, graph=graph.graph).run(noise)
    x = values[pack.args[0]].double()  # type: ignore[index]
    q, scale = (values[part] for part in pack.users)
    (reader,) = [n for n in graph.graph.nodes if evaluation_of(n) == 1 and n.target is torch.ops.aten.mul.Tensor][:1]
    read = values[reader].to(dtype)
    assert torch.equal(read, (q.float() * scale.unsqueeze(-1)).to(dtype))
    step = scale.double().unsqueeze(-1)
    fp8 = torch.maximum(x.abs() * 2**-4, step * 2**-10)
    bound = (
        (step / 2 if cache_format == "int8" else fp8) + 4 * U * x.abs() + torch.finfo(dtype).eps * read.double().abs()
    )
    assert bool(((read.double() - x).abs() <= bound).all())


def test_a_kernel_reads_it_packed() -> None:
    for cache_format in FORMATS:
        sampler = dit_sampler(passes=with_packed_caches(FORCED, cache_format))
        graph = sampler.capture(NOISE, y=LABELS).graph.graph
        parts = {user for pack in packs(graph) for user in pack.users}
        calls = [node for node in graph.nodes if node.target in FUSED]
        assert calls
        for call in calls:
            caches, token_scales = call.args[1], call.args[6]
            assert [cache in parts for cache in caches] == [scale is not None for scale in token_scales]
        # Nothing else reads what is packed.
        assert {user.target for part in parts for user in part.users} <= set(FUSED)
        plain = dit_sampler(passes=FORCED)
        got, wanted = sampler(NOISE, y=LABELS), plain(NOISE, y=LABELS)
        assert not torch.equal(got, wanted)
        assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_kernel_and_plain_reads_agree() -> None:
    by_kernel = dit_sampler(passes=with_packed_caches(FORCED, "int8"))
    by_aten = dit_sampler(passes=with_packed_caches(LOOP, "int8"))
    got, wanted = by_kernel(NOISE, y=LABELS), by_aten(NOISE, y=LABELS)
    # An error of one rounding may move a packed value by one unit, which is 1 / 254 of the largest of its row.
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


LEFT = {
    "integers have none": (Residual(1), (2, 3, 1), "a row would take 5 bytes packed, and takes 4"),
    "four dimensions": (Residual(8), (2, 3, 2, 8), r"only (B, T, D) and (N, D)"),
    "float64": (Residual(8).double(), (2, 3, 8), "only float32, bfloat16 and float16"),
    "wide": (Residual(8200, make=nn.LayerNorm), (1, 8200), "up to 8192"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_worth_packing_is_left_as_it_is_with_a_reason(name: str) -> None:
    model, shape, reason = LEFT[name]
    dtype = next(model.parameters()).dtype
    graph, report, before, after = packed(model, {"layer": [1, 0]}, draw(*shape).to(dtype))
    assert packs(graph.graph) == []
    assert [reason in text for text in report.reasons()] == [True]
    assert torch.equal(before, after)


def test_a_value_in_another_layout_is_packed_and_those_behind_it_know() -> None:
    noise = draw(2, 3, 8)
    graph, report, *_ = packed(Residual(how="transposed"), {"layer": [1, 0]}, noise)
    assert report.rewrites == 1

    class Checker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                assert value.stride() == n.meta["val"].stride(), n
            return value

    with torch.no_grad():
        Checker(graph.root, graph=graph.graph).run(noise)


def test_bytes_are_one_an_element_and_four_a_token() -> None:
    noise = draw(2, 3, 64)
    graph, *_ = packed(Residual(64), {"layer": [1, 0]}, noise)
    kept = {value.name: value.num_bytes for value in plan_memory(graph).kept if value.last_read_in > value.made_in}
    (pack,) = packs(graph.graph)
    q, scale = pack.users
    assert kept == {q.name: 2 * 3 * 64, scale.name: 2 * 3 * 4}


def test_the_summary_counts_packed_bytes_and_values() -> None:
    plain = dit_sampler(numerics="rounding")
    packed_sampler = dit_sampler("int8", numerics="rounding")
    for sampler in (plain, packed_sampler):
        sampler.capture(NOISE, y=LABELS)
    before, after = plain.summary(), packed_sampler.summary()
    assert before.num_packed == 0
    assert "packed" not in before.in_short()
    assert after.num_packed == before.num_unpacked > 0
    assert after.num_unpacked == 0
    assert f"{after.num_packed} of {after.num_packed} kept values are packed" in after.in_short()
    # float32 rows of 16: 20 bytes of 64, and the value that is being packed beside it.
    assert after.cache.bytes_per_evaluation[1] == before.cache.bytes_per_evaluation[1] * 20 // 64
    assert after.multiply_adds == before.multiply_adds


def test_nothing_is_packed_unless_asked_for() -> None:
    assert PackCaches.numerics is Numerics.APPROXIMATE
    assert not any(isinstance(each, PackCaches) for each in LOOP.passes)
    sampler = dit_sampler()
    assert packs(sampler.capture(NOISE, y=LABELS).graph.graph) == []
    assert sampler.verify(NOISE, y=LABELS).bitwise


@pytest.mark.parametrize("value", ["int4", "FP8", "", "float8"])
def test_another_format_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"caches wants one of int8, fp8 or None, got '{value}'"):
        dit_sampler(value)


def test_packing_can_be_left_out_by_name() -> None:
    sampler = dit_sampler("fp8", without=("pack-caches",))
    assert packs(sampler.capture(NOISE, y=LABELS).graph.graph) == []


@pytest.mark.parametrize("cache_format", FORMATS)
def test_regions_torch_compile_and_files_take_packed_caches(cache_format: str, tmp_path: Path) -> None:
    sampler = dit_sampler(cache_format)
    program = sampler.capture(NOISE, y=LABELS)
    wanted = sampler(NOISE, y=LABELS)
    outlined = program.graph.copy()
    REGIONS.run(outlined)
    (got,) = run(outlined, NOISE, LABELS)
    assert torch.equal(got, wanted)
    compiled: Any = torch.compile(sampler, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(NOISE, y=LABELS), wanted, rtol=1e-5, atol=1e-6)
    path = tmp_path / "packed.pt2"
    sampler.save(path)
    loaded = load(path)
    assert torch.equal(loaded(NOISE, y=LABELS), wanted)
    assert loaded.summary().num_packed == sampler.summary().num_packed > 0


def test_the_dynamo_backend_takes_the_option() -> None:
    model = seeded(Residual(16))

    def sample(x: Tensor) -> Tensor:
        x = 2.0 * x
        for t in (1.0, 0.5):
            x = x - 0.1 * model(x, torch.full((2,), t))
        return x

    options: Any = {"router": CacheSchedule.from_table({"layer": [1, 0]}), "backend": "eager"}
    noise = draw(2, 3, 16)
    with torch.no_grad():
        plain = torch.compile(sample, backend=l2c, options=options)(noise)
        torch._dynamo.reset()
        approximate = torch.compile(sample, backend=l2c, options={**options, "caches": "int8"})(noise)
        torch._dynamo.reset()
    assert not torch.equal(plain, approximate)
    assert torch.allclose(plain, approximate, atol=0.02)
