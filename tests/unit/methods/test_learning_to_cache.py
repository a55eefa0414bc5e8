"""``learn_l2c``: its training step against plain hooks, its budgets, its data, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, l2c_compile, load_schedule_file, run_reference
from l2c_compile.errors import ScheduleError, UnknownSiteError
from l2c_compile.finders import LatentData
from l2c_compile.finders.training import Learner
from l2c_compile.loops import DDIM, DPMSolver, FlowEuler, Guidance, loop_from_dict
from l2c_compile.methods import alternating_pairs, learn_l2c, published_pairs
from l2c_compile.models import DiT
from tests.learning import (
    DIT_SITES,
    SITES,
    Hooks,
    Step,
    draw_images,
    draw_latents,
    settings,
    training_steps,
)
from tests.tiny import draw, residual, steps, tiny_dit

__all__ = ["training_steps"]


def authors_steps(model: DiT, num_steps: int, noise: Tensor, labels: Tensor, steps: list[Step], penalty: float) -> None:
    """Check updates of alternating pairs along a DDIM trajectory against the paper's own formulation."""
    paths = [f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in ("attn", "mlp")]
    hooks = Hooks(model, paths)
    alphas_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    stride = 999 / (num_steps - 1)
    timesteps = [round(stride * i) for i in range(num_steps)][::-1]
    x = noise
    for e, t in enumerate(timesteps):
        t_B = torch.full((len(x),), t)
        is_cached = e % 2 == 1
        if is_cached:
            (logits, loss, gradients) = steps[e // 2]
            beta = logits[e].clone().requires_grad_()
            kept = dict(hooks.kept)
            with torch.no_grad():
                teacher = model(x, t_B, labels)
            hooks.kept, hooks.scores = kept, torch.sigmoid(beta)
            student = model(x, t_B, labels)
            per_sample = (student - teacher).pow(2).flatten(1).mean(1)
            expected = per_sample.mean() + penalty * torch.sigmoid(beta).sum()
            hooks.scores = None
            (gradient,) = torch.autograd.grad(expected, beta)
            assert abs(loss - expected) <= 1e-5 * abs(expected)
            assert (gradients[e] - gradient).norm() <= 1e-5 * gradient.norm()
        with torch.no_grad():
            epsilon = model(x, t_B, labels)[:, : model.in_channels]
            now = alphas_bar[t]
            then = alphas_bar[timesteps[e + 1]] if e + 1 < num_steps else torch.ones((), dtype=torch.float64)
            x0 = (x.double() - (1 - now).sqrt() * epsilon) / now.sqrt()
            x = (then.sqrt() * x0 + (1 - then).sqrt() * epsilon).float()


def test_the_training_step_is_the_authors(shared: Callable[[str], Path], training_steps: list[Step]) -> None:
    record = torch.load(shared("golden/dit.pt"), weights_only=True)
    model = DiT(**{"in_channels": 4, "learn_sigma": True, **record["config"]}).eval()
    model.load_state_dict(record["state_dict"])
    labels = torch.cat([record["labels"], torch.full_like(record["labels"], record["config"]["num_classes"])])
    noise = torch.cat([record["noise"], draw(*record["noise"].shape)])

    def given(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
        return noise, {"y": labels}

    chosen = settings(rounds=1, batch_size=len(noise), penalty=5e-6)
    learn_l2c(model, DDIM(steps=record["steps"]), given, DIT_SITES, chosen)
    assert len(training_steps) == record["steps"] // 2
    authors_steps(model, record["steps"], noise, labels, training_steps, 5e-6)


def test_the_training_step_of_a_tiny_model_is_the_authors(training_steps: list[Step]) -> None:
    model = tiny_dit()
    noise, labels = draw(4, 4, 4, 4), torch.tensor([0, 1, 5, 5])
    chosen = settings(rounds=1, penalty=0.1)
    learn_l2c(model, DDIM(steps=4), lambda count, generator: (noise, {"y": labels}), DIT_SITES, chosen)
    authors_steps(model, 4, noise, labels, training_steps, 0.1)


def test_pairs_of_solvers() -> None:
    guidance = Guidance(1.5, null={"y": 5}, batched=False)
    assert published_pairs(DDIM(steps=6)) == [(0, 1), (2, 3), (4, 5)]
    assert published_pairs(DDIM(steps=4, guidance=guidance)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert published_pairs(DPMSolver(evaluations=6)) == [(1, 2), (3, 4)]
    assert published_pairs(DPMSolver(evaluations=4, guidance=guidance)) == [(2, 4), (3, 5)]
    assert published_pairs(FlowEuler(steps=3)) == alternating_pairs(3) == [(0, 1)]


def test_a_router_reuses_in_cached_evaluations_only_and_can_be_compiled(tmp_path: Path) -> None:
    loop = DPMSolver(evaluations=6, guidance=Guidance(1.5, null={"y": 5}, batched=False))
    router = learn_l2c(tiny_dit(), loop, draw_images, DIT_SITES, settings(rounds=4, penalty=10.0, learning_rate=1.0))
    assert router.cacheable == (4, 5, 8, 9)
    assert router.branches == 2
    assert router.loop is not None
    assert loop_from_dict(router.loop) == loop
    untrained = [e for e in range(12) if e not in router.cacheable]
    assert (router.scores[untrained] == 1.0).all()
    assert router.schedule().reuses
    router.save(tmp_path / "r.safetensors")
    read = load_schedule_file(tmp_path / "r.safetensors")
    assert read == router
    noise, conditions = draw_images(2, torch.Generator().manual_seed(3))
    sampler = l2c_compile(tiny_dit(), router)
    assert sampler.verify(noise, **conditions).bitwise


def test_a_site_that_matters_is_computed_and_one_that_does_not_is_reused() -> None:
    model = residual()
    with torch.no_grad():
        model.b.weight.zero_()
    router = learn_l2c(model, DDIM(steps=4), draw_latents, SITES, settings(rounds=20, penalty=1e-6, learning_rate=0.3))
    for e in router.cacheable:
        assert router.scores[e, 0] > 0.5 > 0.1 > router.scores[e, 1]


def test_weights_are_what_a_unit_of_distance_does_to_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = residual(), draw(4, 4)
    learners: list[Learner] = []
    original = Learner.weigh

    def spy(self: Learner, weights_E: Tensor) -> None:
        learners.append(self)
        original(self, weights_E)

    monkeypatch.setattr(Learner, "weigh", spy)
    outputs: list[Tensor] = []

    def loop(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        for i in range(4):
            outputs.append(denoiser(x, torch.full((4,), float(4 - i))))
            # What is off in the second evaluation is mostly forgotten.
            x = (0.1 if i == 1 else 1.0) * (x - 0.25 * outputs[-1])
        return x

    pairs = [(0, 1), (2, 3)]
    router = learn_l2c(
        model, loop, lambda count, generator: (noise, {}), SITES, settings(weigh_by_result=True), pairs=pairs
    )
    assert router.info["weighed"] == "by result"

    def sampled(cached: int | None) -> tuple[Tensor, list[Tensor]]:
        outputs.clear()
        row = [int(e != cached) for e in range(4)]
        result = run_reference(model, loop, CacheSchedule.from_table(dict.fromkeys(SITES, row)), noise, {})
        assert isinstance(result, Tensor)
        return result, list(outputs)

    wanted, full = sampled(None)
    expected = []
    for e in (1, 3):
        result, cached = sampled(e)
        expected.append(float((result - wanted).square().mean() / (cached[e] - full[e]).square().mean()))
    assert 5 * expected[0] < expected[1]
    weights = learners[0].weights_E
    assert weights is not None
    mean = sum(expected) / 2
    torch.testing.assert_close(weights[[1, 3]], torch.tensor(expected, dtype=torch.float64) / mean, rtol=1e-5, atol=0)


def test_weights_multiply_the_distances(training_steps: list[Step]) -> None:
    given = {"rounds": 1, "penalty": 1e-9}
    for weighed in (False, True):
        learn_l2c(residual(), DDIM(steps=4), draw_latents, SITES, settings(**given, weigh_by_result=weighed))
    (_, _, plain), _, (_, _, heavy), _ = training_steps
    assert plain.keys() == heavy.keys() == {1}
    factors = heavy[1] / plain[1]
    torch.testing.assert_close(factors, factors[:1].expand(2), rtol=1e-3, atol=0)
    assert abs(float(factors[0]) - 1.0) > 0.05


def test_a_loop_of_ones_own_learns_from_its_pairs() -> None:
    router = learn_l2c(residual(), steps(4), draw_latents, SITES, settings(), pairs=[(0, 1), (2, 3)])
    assert router.cacheable == (1, 3)
    assert router.loop is None
    data = LatentData(draw(8, 4), noised=lambda clean, noise, e: clean + e * noise)
    assert learn_l2c(residual(), steps(4), data, SITES, settings(), pairs=[(2, 3)]).cacheable == (3,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loop": steps(4)}, r"wants its pairs, for example pairs=alternating_pairs\(4"),
        ({"pairs": [(0, 2)]}, r"pair \(0, 2\): a cached evaluation takes from the one right before it, here 1"),
        ({"pairs": [(0, 1), (1, 2)]}, r"pair \(1, 2\): .* must be full"),
        ({"pairs": [(3, 4)]}, r"pair \(3, 4\): the loop has evaluations 0..3"),
        ({"pairs": [(0, 1), (0, 1)]}, "cached in two pairs"),
        ({"pairs": []}, "no pairs to learn from in 4 evaluations"),
        ({"loop": steps(4), "pairs": [(0, 1)], "inputs": LatentData(draw(3, 4))}, "give LatentData"),
        ({"sites": ()}, "nothing to learn without sites"),
        ({"settings": settings(budget=0.4)}, "a budget of 40.0% of the multiply-adds cannot be met: 55.6% is left"),
    ],
)
def test_what_cannot_be_learned_says_why(given: dict[str, Any], message: str) -> None:
    arguments = {"loop": DDIM(steps=4), "inputs": draw_latents, "sites": SITES, "settings": settings(), **given}
    with pytest.raises(ScheduleError, match=message):
        learn_l2c(residual(), **arguments)


def test_a_site_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownSiteError, match=r"blocks\.\*\.atn"):
        learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, ["blocks.*.atn"], settings())
