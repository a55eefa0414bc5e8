"""``learn_rollout``: its updates against plain hooks, its weights, its windows, and interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import Router, l2c_compile, run_reference
from l2c_compile.errors import ScheduleError
from l2c_compile.finders.training import Learner, RoundReport
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.methods import RolloutSettings, learn_rollout
from tests.learning import (
    DIT_SITES,
    SITES,
    Hooks,
    Step,
    draw_images,
    draw_latents,
    training_steps,
)
from tests.tiny import at, draw, residual, steps, tiny_dit

__all__ = ["training_steps"]


def settings(**changes: Any) -> RolloutSettings:  # noqa: ANN401
    given: dict[str, Any] = {"rounds": 3, "batch_size": 4, "weigh_every": 0}
    if "budget" not in changes:
        given["penalty"] = 1e-3
    return RolloutSettings(**{**given, **changes})


class CachingHooks(Hooks):
    """Hooks that mix with kept outputs and note what was computed."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.computed: dict[str, Tensor] = {}
        super().__init__(model, paths)

    def hook(self, column: int, path: str) -> Any:  # noqa: ANN401
        def run(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            self.computed[path] = output
            if self.scores is None:
                return None
            return self.scores[column] * output + (1 - self.scores[column]) * self.kept[path]

        return run


def test_every_update_is_the_authors(training_steps: list[Step]) -> None:
    noise, penalty, threshold, num_evaluations = draw(4, 4), 1e-2, 0.5, 5
    chosen = settings(rounds=1, penalty=penalty, threshold=threshold)
    learn_rollout(residual(), steps(num_evaluations), lambda count, generator: (noise, {}), SITES, chosen)
    assert [list(before) for before, _, _ in training_steps] == [[1], [2], [3], [4]]
    model = residual()
    hooks = CachingHooks(model, list(SITES))
    x = noise
    with torch.no_grad():
        x = x - 0.25 * model(x, at(x, num_evaluations))
    cache = dict(hooks.computed)
    some_stale = False
    for e, (before, loss, gradients) in enumerate(training_steps, start=1):
        t_B = at(x, num_evaluations - e)
        beta = before[e].clone().requires_grad_()
        hooks.scores = None
        with torch.no_grad():
            teacher = model(x, t_B)
        hooks.scores, hooks.kept = torch.sigmoid(beta), cache
        student = model(x, t_B)
        expected = (student - teacher).pow(2).mean() + penalty * torch.sigmoid(beta).sum()
        (gradient,) = torch.autograd.grad(expected, beta)
        assert abs(loss - expected) <= 1e-5 * abs(expected)
        assert (gradients[e] - gradient).norm() <= 1e-5 * gradient.norm()
        is_fresh = torch.sigmoid(beta) > threshold
        some_stale |= not bool(is_fresh.all())
        cache = {path: hooks.computed[path].detach() if is_fresh[i] else cache[path] for i, path in enumerate(SITES)}
        x = x - 0.25 * student.detach()
    assert some_stale


def test_a_router_may_reuse_in_all_evaluations_but_the_first_of_each_branch() -> None:
    loop = DDIM(steps=3, guidance=Guidance(1.5, null={"y": 5}, channels=3, batched=False))
    router = learn_rollout(tiny_dit(), loop, draw_images, DIT_SITES, settings(rounds=8, learning_rate=0.5, budget=0.6))
    assert router.cacheable == (2, 3, 4, 5)
    assert router.branches == 2
    assert router.scores[:2].min() == router.scores[:2].max() == pytest.approx(0.99331, abs=1e-5)
    noise, conditions = draw_images(2, torch.Generator().manual_seed(3))
    assert l2c_compile(tiny_dit(), router).verify(noise, **conditions).bitwise
    ages = {e - reuse.sources[0] for (e, _), reuse in router.schedule().reuses.items()}
    assert max(ages) > 2


def test_weights_are_what_caching_up_to_an_evaluation_changes() -> None:
    model, loop, noise = residual(), steps(4), draw(4, 4)
    learners: list[Learner] = []
    original = Learner.finish_round

    def spy(self: Learner) -> tuple[float, float]:
        learners.append(self)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "finish_round", spy)
        chosen = settings(rounds=1, learning_rate=1e-9, threshold=0.6)
        before = learn_rollout(model, loop, lambda count, generator: (noise, {}), SITES, chosen)
        chosen = settings(rounds=2, learning_rate=1e-9, threshold=0.6, weigh_every=1)
        learn_rollout(model, loop, lambda count, generator: (noise, {}), SITES, chosen)
    weights = learners[-1].weights_E
    assert weights is not None
    results = []
    for last in range(4):
        rows = before.schedule()
        table = {site: [v if e <= last else 1 for e, v in enumerate(rows.row(site))] for site in rows.sites}
        result = run_reference(model, loop, type(rows).from_table(table), noise, {})
        assert isinstance(result, Tensor)
        results.append(result.double())
    changes = [float((results[e] - results[e - 1]).square().mean()) for e in range(1, 4)]
    assert max(changes) > 0
    expected = torch.tensor([1.0, *(3 * change / sum(changes) for change in changes)], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_recomputed_activations_give_the_same_bits(horizon: int) -> None:
    routers = [
        learn_rollout(
            tiny_dit(),
            DDIM(steps=5),
            draw_images,
            DIT_SITES,
            settings(horizon=horizon, recompute_activations=recompute),
        )
        for recompute in (False, True)
    ]
    assert routers[0] == routers[1]


def test_gradients_of_a_window_pass_through_latents_and_caches(training_steps: list[Step]) -> None:
    noise, num_evaluations = draw(4, 4), 4
    chosen = settings(rounds=1, horizon=3, penalty=1e-12, threshold=0.3)
    learn_rollout(residual(), steps(num_evaluations), lambda count, generator: (noise, {}), SITES, chosen)
    ((before, loss, gradients),) = training_steps
    model = residual()
    hooks = CachingHooks(model, list(SITES))
    logits = {e: row.clone().requires_grad_() for e, row in before.items()}
    x, total = noise, torch.zeros(())
    with torch.no_grad():
        x = x - 0.25 * model(x, at(x, num_evaluations))
    cache = dict(hooks.computed)
    for e, beta in logits.items():
        t_B = at(x, num_evaluations - e)
        hooks.scores = None
        with torch.no_grad():
            teacher = model(x, t_B)
        hooks.scores, hooks.kept = torch.sigmoid(beta), cache
        student = model(x, t_B)
        total = total + (student - teacher).pow(2).mean()
        is_fresh = torch.sigmoid(beta) > 0.3
        cache = {path: hooks.computed[path] if is_fresh[i] else cache[path] for i, path in enumerate(SITES)}
        x = x - 0.25 * student
    assert abs(loss - total) <= 1e-5 * abs(total)
    for e, gradient in zip(logits, torch.autograd.grad(total, list(logits.values())), strict=True):
        assert (gradients[e] - gradient).norm() <= 1e-4 * gradient.norm()


def learned(path: Path | None = None, stop_after: int | None = None) -> Router:
    class Stop(Exception):
        pass

    def on_round(report: RoundReport) -> None:
        if report.round == stop_after:
            raise Stop

    chosen = settings(rounds=7, budget=0.7, checkpoint_every=2, weigh_every=3)
    try:
        return learn_rollout(residual(), DDIM(steps=4), draw_latents, SITES, chosen, checkpoint=path, on_round=on_round)
    except Stop:
        return learned(path)


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path, stop_after: int) -> None:
    assert learned(tmp_path / "c", stop_after) == learned()


def test_a_loop_of_one_evaluation_has_nothing_to_reuse() -> None:
    with pytest.raises(ScheduleError, match="a loop of 1 evaluations has none that could reuse"):
        learn_rollout(residual(), steps(1), draw_latents, SITES, settings())


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes in ({"horizon": 0}, {"weigh_every": -1}):
        with pytest.raises(ScheduleError, match="horizon one from 1"):
            settings(**changes)
