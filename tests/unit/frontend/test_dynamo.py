"""What is read off the graph that Dynamo makes of a function: evaluations, sites, noise, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l2c_compile.torch_backend as backend_module
from l2c_compile import CacheSchedule, run_reference
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.torch_backend import l2c
from tests.dynamo_loops import TWO, Toy, check_toy_equals_reference, fails, toy_loop


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Wrong(nn.Module):
    """Writes where it must not, in the way it is told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner = Writer() if how == "input" else nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2.0
        y: Tensor = self.inner(h)
        return (y + h) if self.how == "input" else y.mul_(2.0) + h


class Writer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return x + 1.0


def test_training_gradients_and_autocast_are_errors() -> None:
    model = Toy()
    fails(lambda x: toy_loop(model, x), r"draws random numbers .*module 'dropout'.*\.eval\(\)", router=TWO)
    model.eval()
    options: dict[str, Any] = {"router": TWO, "backend": "eager"}
    sample = torch.compile(lambda x: toy_loop(model, x), backend=l2c, options=options)
    with pytest.raises(Exception, match=r"under torch.no_grad\(\)"):
        sample(torch.randn(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fails(lambda x: toy_loop(model, x), "autocast", router=TWO)


@pytest.mark.parametrize(
    ("how", "message"), [("input", "writes into its input in place"), ("view", "a write in place")]
)
def test_a_write_in_place_that_reaches_a_site_is_an_error(how: str, message: str) -> None:
    model = Wrong(how)
    fails(lambda x: toy_loop(model, x), message, router=TWO)


class BeginsWithASite(nn.Module):
    """A block whose first operation is a site by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(2.0 * x)  # type: ignore[no-any-return]


def test_the_input_of_a_block_is_read_whose_first_operation_is_a_site_too() -> None:
    model = BeginsWithASite().eval()
    table = {"delta(block)": [1, 1, 0, 1], "block.0": [1, 0, 1, 0]}
    check_toy_equals_reference(model, CacheSchedule.from_table(table))


class UsesTheShapeOfANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear.bias.expand_as(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("site", ["norm", "delta(norm)"])
def test_a_site_whose_values_nobody_uses_is_still_a_site(site: str) -> None:
    model = UsesTheShapeOfANorm().eval()
    schedule = CacheSchedule.from_table({site: [1, 0], "linear": [1, 0]})
    check_toy_equals_reference(model, schedule)


class TwoInARow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", ["layers.1", "delta(layers.1)"])
@pytest.mark.parametrize("run_first", [True, False])
def test_a_run_holds_what_is_read_where_its_last_module_is_reused(last: str, run_first: bool) -> None:
    rows = [("layers.0..layers.1", [1, 1, 0]), (last, [1, 0, 1])]
    schedule = CacheSchedule.from_table(dict(rows if run_first else rows[::-1]))
    model = TwoInARow().eval()
    check_toy_equals_reference(model, schedule)


class WritesIntoDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        before = self.inner(x)
        after: Tensor = self.dropout(before)
        after += 1.0
        return before * after  # type: ignore[no-any-return]


def test_a_write_into_what_dropout_returned_reaches_its_argument() -> None:
    schedule = CacheSchedule.from_table({"inner": [1, 0]})
    model = WritesIntoDropout().eval()
    check_toy_equals_reference(model, schedule)


def test_dropout_that_is_written_into_is_no_site() -> None:
    model = WritesIntoDropout().eval()
    schedule = CacheSchedule.from_table({"dropout": [1, 0]})
    fails(lambda x: toy_loop(model, x), "site 'dropout', evaluation 1: a write in place reaches", router=schedule)


def test_changing_an_input_in_place_is_an_error() -> None:
    model = Toy().eval()
    fails(lambda x: toy_loop(model, x.mul_(2.0)), "changes 'l_x_' in place", router=TWO)


def test_of_several_possible_denoisers_one_must_be_chosen() -> None:
    one, other = Toy().eval(), Toy().eval()

    def sample(x: Tensor) -> Tensor:
        return toy_loop(one, x) + toy_loop(other, x)

    fails(sample, "'one', 'other'|'other', 'one'", router=TWO)
    x = torch.randn(2, 4)
    wanted = run_reference(other, toy_loop, TWO, x, {})
    for chosen in (other, "other"):
        torch._dynamo.reset()
        options: dict[str, Any] = {"router": TWO, "backend": "eager", "denoiser": chosen}
        with torch.no_grad():
            got = torch.compile(sample, backend=l2c, options=options)(x)
            assert torch.equal(got, toy_loop(one, x) + wanted)  # type: ignore[operator]


@pytest.mark.parametrize("site", ["inner", "delta(inner)"])
def test_noise_that_is_met_first_in_the_denoiser_is_no_weight(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[LoopGraph] = []

    def keep(graph: LoopGraph, *rest: object, **options: object) -> nn.Module:
        graphs.append(graph)
        return graph.module()

    monkeypatch.setattr(backend_module, "lower_to_backend", keep)
    torch.manual_seed(0)
    model, x = Toy().eval(), torch.randn(2, 4)
    schedule = CacheSchedule.from_table({site: [1, 0]})
    options: dict[str, Any] = {"router": schedule, "backend": "eager"}
    with torch.no_grad():
        # Dynamo notes the module on the noise: its first use is there.
        got = torch.compile(lambda x: toy_loop(model, x), backend=l2c, options=options, fullgraph=True)(x)
    assert torch.equal(got, run_reference(model, toy_loop, schedule, x, {}))  # type: ignore[arg-type]
    (graph,) = graphs
    assert graph.num_noise == 1
    assert not graph.known_before_the_loop().intersection(
        node for node in graph.graph.nodes if "evaluation" in node.meta and node.op == "call_function"
    )


def test_a_broken_graph_is_an_error() -> None:
    model = Toy().eval()

    def sample(x: Tensor) -> Tensor:
        x = x - 0.1 * model(x)
        torch._dynamo.graph_break()
        result: Tensor = x - 0.1 * model(x)
        return result

    fails(sample, "broken into several graphs", router=TWO)


class Pair(nn.Module):
    """Returns two tensors, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.inner(x)
        return h, {"twice": h * 2.0}


class Pipeline:
    """Its denoiser has a site of two tensors and one that is called twice an evaluation."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.shared = Pair(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.pair(x)
            result: Tensor = self.shared(self.shared(one) + other["twice"])
            return result

    def __init__(self) -> None:
        self.model = self.Denoiser().eval()

    def loop(self, denoiser: nn.Module, noise: Tensor) -> Tensor:
        x = noise
        for _ in range(3):
            x = x - 0.1 * denoiser(x)
        return x

    def sample(self, noise: Tensor) -> dict[str, object]:
        with torch.inference_mode():
            return {"latent": self.loop(self.model, noise), "steps": 3}


def test_a_method_of_a_pipeline_with_shared_modules_and_tuples() -> None:
    torch.manual_seed(0)
    pipeline, noise = Pipeline(), torch.randn(2, 4)
    schedule = CacheSchedule.from_table({"pair": [1, 0, 0], "shared@1": [1, 1, 0]})
    wanted = run_reference(pipeline.model, pipeline.loop, schedule, noise, {})
    options: dict[str, Any] = {"router": schedule, "backend": "eager"}
    got = torch.compile(pipeline.sample, backend=l2c, options=options, fullgraph=True)(noise)
    assert got["steps"] == 3
    assert torch.equal(got["latent"], wanted)  # type: ignore[arg-type]
