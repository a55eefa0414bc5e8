"""mix-sites: every site of an evaluation is mixed with what was cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, run_reference
from l2c_compile.errors import ScheduleError
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import SITE
from l2c_compile.passes.mix_sites import MixSites
from l2c_compile.passes.pipeline import MIXED, OBSERVED
from l2c_compile.passes.return_sites import ReturnSites
from tests.behaviour.test_site_forms import Stack
from tests.tiny import draw, residual, seeded, steps, targets, tiny_dit, tiny_uvit

LABELS = torch.tensor([1, 3])


def captured(*sites: str) -> EvaluationGraph:
    evaluation, _ = OpenDenoiser(residual(), sites).call((draw(2, 4), torch.ones(2)), {})
    return evaluation.captured.copy()


def two_evaluations(
    model: nn.Module, sites: list[str], noise: Tensor, scores: list[float], **conditions: Tensor
) -> object:
    """Return the result of a loop whose second evaluation is mixed with what the first one computed."""
    denoiser = OpenDenoiser(model, sites)
    values: list[Tensor] = []

    def on_evaluation(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
        if e == 0:
            outputs, computed = evaluation.observe(tensors)
            values.extend(computed)
            return outputs
        return evaluation.mix(tensors, torch.tensor(scores), values)[0]

    with torch.no_grad():
        return denoiser.run(steps(2), noise, conditions, on_evaluation)


def by_reference(
    model: nn.Module, sites: list[str], noise: Tensor, scores: list[float], **conditions: Tensor
) -> object:
    schedule = CacheSchedule.from_table({site: [1, int(score)] for site, score in zip(sites, scores, strict=True)})
    return run_reference(model, steps(2), schedule, noise, conditions)


FORMS: list[list[str]] = [
    ["blocks.0.mlp"],
    ["blocks.0..blocks.2"],
    ["delta(blocks.0..blocks.1)", "blocks.2"],
    ["shared@1", "shared"],
    ["delta(shared@1)"],
    ["pair"],
    ["outer", "outer.0"],
    ["blocks.1", "blocks.1.mlp", "delta(blocks.1.mlp.0)"],
]


@pytest.mark.parametrize("sites", FORMS, ids=" ".join)
def test_scores_of_0_and_1_are_the_schedule_exactly(sites: list[str]) -> None:
    model, noise = seeded(Stack()), draw(2, 4)
    for bits in range(2 ** len(sites)):
        scores = [float(bits >> index & 1) for index in range(len(sites))]
        got = two_evaluations(model, sites, noise, scores)
        assert isinstance(got, Tensor)
        assert torch.equal(got, by_reference(model, sites, noise, scores)), scores  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [tiny_dit(), tiny_uvit()], ids=["DiT", "U-ViT"])
def test_transformers_follow_the_schedule_exactly(model: nn.Module) -> None:
    sites = sorted(path for path, _ in model.named_modules() if path.endswith(("attn", "mlp")))
    scores = [float(index % 3 == 0) for index in range(len(sites))]
    noise = draw(2, 4, 4, 4)

    class Noise(nn.Module):
        """The first channels of what the model predicts; loops below want the form of the latent."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.model(x, t, y)[:, :4]  # type: ignore[no-any-return]

    sites = [f"model.{site}" for site in sites]
    got = two_evaluations(Noise(), sites, noise, scores, y=LABELS)
    assert torch.equal(got, by_reference(Noise(), sites, noise, scores, y=LABELS))  # type: ignore[arg-type]


def hooked(model: nn.Module, scores: Tensor, cached: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Return the model's output with each site's output mixed by a plain forward hook."""
    hooks = []
    for score, (path, value) in zip(scores, cached.items(), strict=True):

        def mix(
            module: nn.Module, args: object, output: Tensor, score: Tensor = score, value: Tensor = value
        ) -> Tensor:
            return score * output + (1 - score) * value

        hooks.append(model.get_submodule(path).register_forward_hook(mix))
    try:
        return model(*inputs)  # type: ignore[no-any-return]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("nested", [False, True])
def test_mixtures_and_gradients_are_those_of_hooks(nested: bool) -> None:
    sites = ["blocks.0", "blocks.0.mlp"] if nested else ["blocks.0.mlp", "blocks.2", "outer"]
    model, x, t = seeded(Stack()).double(), draw(2, 4).double(), torch.ones(2, dtype=torch.float64)
    cached = {site: draw(2, 4, seed=7 + index).double() for index, site in enumerate(sites)}
    evaluation, tensors = OpenDenoiser(model, sites).call((x, t), {})
    results = []
    forwards: list[Callable[[Tensor], Tensor]] = [
        lambda scores: evaluation.mix(tensors, scores, list(cached.values()))[0][0],
        lambda scores: hooked(model, scores, cached, x, t),
    ]
    for forward in forwards:
        scores = torch.linspace(0.2, 0.9, len(sites), dtype=torch.float64, requires_grad=True)
        y = forward(scores)
        (gradient,) = torch.autograd.grad(y.square().sum(), scores)
        results.append((y.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    model = tiny_dit(depth=1).double()
    sites = ["blocks.0.attn", "delta(blocks.0.mlp)"]
    x = draw(1, 4, 4, 4).double()
    evaluation, tensors = OpenDenoiser(model, sites).call((x, torch.tensor([5]), torch.tensor([2])), {})
    _, values = evaluation.observe(tensors)
    cached = [(value + 0.5 * draw(*value.shape).double()).requires_grad_() for value in values]
    scores = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def mixed(x: Tensor, scores: Tensor, *cached: Tensor) -> Tensor:
        return evaluation.mix([x, *tensors[1:]], scores, cached)[0][0]

    assert torch.autograd.gradcheck(mixed, (x.requires_grad_(), scores, *cached), fast_mode=True)


def test_a_mixture_has_the_dtype_of_what_is_computed() -> None:
    evaluation, tensors = OpenDenoiser(residual().bfloat16(), ["a"]).call((draw(2, 4).bfloat16(), torch.ones(2)), {})
    outputs, values = evaluation.observe(tensors)
    mixed, _ = evaluation.mix(tensors, torch.tensor([0.5]), values)
    assert [t.dtype for t in (*values, *mixed, *outputs)] == [torch.bfloat16] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluation, tensors = OpenDenoiser(residual(), ["a"]).call((draw(2, 4), torch.ones(2)), {})
        _, values = evaluation.observe(tensors)
        evaluation.mix(tensors, torch.tensor([0.5]), values)
    assert values[0].dtype is torch.bfloat16


def test_mix_sites_redirects_every_user_once() -> None:
    program = captured("a", "b")
    ReturnSites().run(program)
    report = MixSites().run(program)
    assert report.rewrites == 2
    assert targets(program).count("lerp.Tensor") == 2
    assert all(not node.users for node in program.graph.find_nodes(op="call_function", target=SITE))
    assert [n.name for n in program.graph.find_nodes(op="placeholder")][-3:] == ["scores", "cached_0", "cached_1"]


def test_a_graph_without_sites_is_left_alone() -> None:
    program = captured("a")
    program.sites = ()
    OBSERVED.run(program)
    before = targets(program)
    assert ReturnSites().run(program).rewrites == MixSites().run(program).rewrites == 0
    assert targets(program) == before


class Indices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick = Indices()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        index: Tensor = self.pick(x)
        return x * index[:, None]


@pytest.mark.parametrize(
    ("model", "site", "message"),
    [
        (Picks(), "pick", "site 'pick' holds torch.int64, of which there is no mixture"),
        (Stack(), "delta(pair)", r"site 'delta\(pair\)': its module returns several tensors"),
    ],
)
def test_what_cannot_be_mixed_is_named(model: Any, site: str, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ScheduleError, match=message):
        OpenDenoiser(model, [site]).call((draw(2, 4), torch.ones(2)), {})[0].mixed  # noqa: B018


def test_sites_that_share_work_but_do_not_nest_are_refused() -> None:
    with pytest.raises(ScheduleError, match="overlap and neither contains the other"):
        OpenDenoiser(Stack(), ["blocks.0..blocks.1", "blocks.1..blocks.2"]).covers  # noqa: B018
    with pytest.raises(ScheduleError, match="nothing to learn without sites"):
        OpenDenoiser(Stack(), [])


def test_the_pipelines_leave_no_mark() -> None:
    for pipeline in (OBSERVED, MIXED):
        program = captured("a", "delta(b)")
        pipeline.run(program)
        assert not list(program.graph.find_nodes(op="call_function", target=SITE))
