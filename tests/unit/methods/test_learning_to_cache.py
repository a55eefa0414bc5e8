"""``learn_l2c``: its training step against plain hooks, its budgets, its data, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, Router, l2c_compile, load_schedule_file, run_reference
from l2c_compile.errors import FileFormatError, ScheduleError, UnknownSiteError
from l2c_compile.finders import LatentData
from l2c_compile.finders.open_evaluations import OpenEvaluation
from l2c_compile.finders.training import Learner, RoundReport
from l2c_compile.loops import DDIM, BuiltInLoop, DPMSolver, FlowEuler, Guidance, loop_from_dict
from l2c_compile.methods import L2CSettings, alternating_pairs, learn_l2c, published_pairs
from l2c_compile.models import DiT
from tests.tiny import draw, residual, seeded, steps, tiny_dit

SITES = ("a", "b")
DIT_SITES = ("blocks.*.attn", "blocks.*.mlp")


def draw_latents(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    return torch.randn(count, 4, generator=generator), {}


def draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    noise = torch.randn(count, 4, 4, 4, generator=generator)
    return noise, {"y": torch.randint(0, 5, (count,), generator=generator)}


def settings(**changes: Any) -> L2CSettings:  # noqa: ANN401
    given: dict[str, Any] = {"rounds": 3, "batch_size": 4}
    if "budget" not in changes:
        given["penalty"] = 1e-3
    return L2CSettings(**{**given, **changes})


Step = tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]


@pytest.fixture
def training_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Collect (logits before, loss, gradients) of every update."""
    seen: list[Step] = []
    original = Learner.loss

    def spy(self: Learner, distances: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        before = {e: self.logits[e].detach().clone() for e in distances}
        loss, gradients = original(self, distances)
        seen.append((before, loss, {e: g.clone() for e, g in gradients.items()}))
        return loss, gradients

    monkeypatch.setattr(Learner, "loss", spy)
    return seen


class Hooks:
    """Plain forward hooks on the sublayers of a DiT: keep their outputs, or mix them with kept ones."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self.scores: Tensor | None = None
        for column, path in enumerate(paths):
            model.get_submodule(path).register_forward_hook(self.hook(column, path))

    def hook(self, column: int, path: str) -> Callable[..., Tensor | None]:
        def run(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            if self.scores is None:
                self.kept[path] = output.detach()
                return None
            return self.scores[column] * output + (1 - self.scores[column]) * self.kept[path]

        return run


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


def test_squared_errors_can_be_summed_over_a_sample(training_steps: list[Step]) -> None:
    for reduction in ("mean", "sum"):
        learn_l2c(residual(), DDIM(steps=2), draw_latents, SITES, settings(rounds=1, penalty=1e-9, reduction=reduction))
    assert float(training_steps[1][1]) == pytest.approx(4 * float(training_steps[0][1]), rel=1e-4)


def test_pairs_of_solvers() -> None:
    guidance = Guidance(1.5, null={"y": 5}, batched=False)
    assert published_pairs(DDIM(steps=6)) == [(0, 1), (2, 3), (4, 5)]
    assert published_pairs(DDIM(steps=4, guidance=guidance)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert published_pairs(DPMSolver(evaluations=6)) == [(1, 2), (3, 4)]
    assert published_pairs(DPMSolver(evaluations=4, guidance=guidance)) == [(2, 4), (3, 5)]
    assert published_pairs(FlowEuler(steps=3)) == alternating_pairs(3) == [(0, 1)]


def test_a_router_reuses_in_cached_evaluations_only_and_can_be_compiled(tmp_path: Path) -> None:
    loop = DPMSolver(evaluations=6, guidance=Guidance(1.5, null={"y": 5}, batched=False))
    router = learn_l2c(tiny_dit(), loop, draw_images, DIT_SITES, settings(rounds=8, penalty=10.0))
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


def test_training_leaves_the_model_as_it_was() -> None:
    model = residual()
    model.a.bias.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    learn_l2c(model, DDIM(steps=2), draw_latents, SITES, settings())
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_logits_begin_standard_normal_and_are_clamped() -> None:
    seen: list[Tensor] = []
    chosen = settings(rounds=30, penalty=100.0, learning_rate=1.0)
    learn_l2c(residual(), DDIM(steps=4), draw_latents, SITES, chosen, on_round=lambda r: seen.append(r.router().scores))
    assert seen[-1][1].tolist() == pytest.approx([torch.sigmoid(torch.tensor(-5.0)).item()] * 2)
    assert len(set(seen[0][[1, 3]].flatten().tolist())) == 4


def many_tokens() -> DiT:
    """Return a model whose sublayers are most of its work, as in models of real size."""
    model = DiT(input_size=16, patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=5)
    return seeded(model)  # type: ignore[no-any-return]


def draw_large_images(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    return torch.randn(count, 4, 16, 16, generator=generator), {"y": torch.zeros(count, dtype=torch.int64)}


@pytest.mark.parametrize("budget", [0.65, 0.8])
def test_a_budget_of_multiply_adds_is_met(budget: float) -> None:
    model, loop = many_tokens(), DDIM(steps=6)
    router = learn_l2c(model, loop, draw_large_images, DIT_SITES, settings(rounds=40, batch_size=1, budget=budget))
    noted = router.info["kept_multiply-adds"]
    assert isinstance(noted, float)
    # The smallest site is an attention, 1 of 6 * (1 + 2) parts.
    assert budget - 1 / 18 < noted <= budget
    sampler = l2c_compile(model, router, loop)
    sampler.capture(*draw_large_images(1, torch.Generator())[:1], y=torch.zeros(1, dtype=torch.int64))
    # Conditioning is shared, folded and pruned in the static graph, but whole in the estimate: 1% of this model.
    assert sampler.summary().multiply_adds_kept == pytest.approx(noted, abs=0.02)


def test_a_budget_of_time_is_met() -> None:
    chosen = settings(rounds=40, batch_size=1, budget=0.9, budget_in="time", price_by="time")
    router = learn_l2c(many_tokens(), DDIM(steps=2), draw_large_images, DIT_SITES, chosen)
    assert 0.5 < router.info["kept_time"] <= 0.9  # type: ignore[operator]
    assert router.schedule().reuses


def test_a_site_that_matters_is_computed_and_one_that_does_not_is_reused() -> None:
    model = residual()
    with torch.no_grad():
        model.b.weight.zero_()
    router = learn_l2c(model, DDIM(steps=4), draw_latents, SITES, settings(rounds=60, penalty=1e-6))
    for e in router.cacheable:
        assert router.scores[e, 0] > 0.5 > 0.1 > router.scores[e, 1]


def test_prices_follow_what_a_site_takes(training_steps: list[Step]) -> None:
    model = tiny_dit(depth=1)
    for price_by in ("sites", "multiply-adds"):
        chosen = settings(rounds=1, penalty=1e3, price_by=price_by)
        learn_l2c(model, DDIM(steps=2), draw_images, DIT_SITES, chosen)
    shares = []
    for before, _, gradients in training_steps:
        r = before[1].sigmoid()
        weights = gradients[1] / (1e3 * r * (1 - r))
        shares.append(float(weights[1] / weights[0]))
    # Four matrices of D x D against two of D x 4 D; torch counts no multiply-adds for fused attention itself.
    assert shares == pytest.approx([1.0, 2.0], rel=1e-3)


def test_straight_through_mixes_with_rounded_scores(training_steps: list[Step]) -> None:
    chosen = settings(rounds=1, penalty=1e-9, straight_through=True, threshold=0.01)
    learn_l2c(residual(), DDIM(steps=2), draw_latents, SITES, chosen)
    # All scores are above the threshold: the student computes everything, so it is the teacher.
    assert float(training_steps[0][1]) < 1e-8
    chosen = settings(rounds=60, budget=0.9, straight_through=True)
    router = learn_l2c(residual(), DDIM(steps=4), draw_latents, SITES, chosen)
    assert router.info["kept_multiply-adds"] <= 0.9  # type: ignore[operator]


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


def test_nested_sites_share_their_price() -> None:
    reports: list[RoundReport] = []
    chosen = settings(rounds=30, penalty=1e4, learning_rate=0.5, budget_in="multiply-adds")
    sites = ["blocks.0", "blocks.0.mlp", "blocks.0.attn"]
    learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, sites, chosen, on_round=reports.append)
    whole = learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, ["blocks.0"], chosen, on_round=reports.append)
    assert whole.cacheable == (1,)
    assert reports[29].kept == pytest.approx(reports[-1].kept)


LOOPS_FROM_DATA: list[tuple[BuiltInLoop, int]] = [
    (DDIM(steps=4), 2),
    (DDIM(steps=4, guidance=Guidance(1.5, null={"y": 5}, channels=3)), 2),
    (DDIM(steps=4, guidance=Guidance(1.5, null={"y": 5}, batched=False)), 4),
    (DPMSolver(evaluations=6), 2),
    (DPMSolver(evaluations=4, method="multistep"), 0),
]


@pytest.mark.parametrize(
    ("loop", "start"), LOOPS_FROM_DATA, ids=["DDIM", "guided", "in two calls", "DPM-Solver-2", "multistep"]
)
def test_data_go_through_the_loops_own_update(loop: BuiltInLoop, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noised to what the eager loop holds somewhere, the data arrive where the eager loop arrives."""
    model, noise, labels = tiny_dit(), draw(1, 4, 4, 4), torch.tensor([3])
    eager: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: eager.append(args[0].clone()))
    with torch.no_grad():
        loop(model, noise, y=labels)
    hook.remove()
    asked: list[int] = []

    def noised(clean: Tensor, noise: Tensor, e: int) -> Tensor:
        asked.append(e)
        return eager[e][:1]

    seen: list[Tensor] = []
    original = OpenEvaluation.observe

    def observe(self: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        seen.append(tensors[0].clone())
        return original(self, tensors)

    monkeypatch.setattr(OpenEvaluation, "observe", observe)
    data = LatentData(torch.zeros(1, 4, 4, 4), {"y": labels}, dropout=0.0, noised=noised)
    pair = published_pairs(loop)[-1]
    learn_l2c(model, loop, data, DIT_SITES, settings(rounds=1, batch_size=1), pairs=[pair])
    assert asked == [start]
    assert len(seen) == pair[1] - start + 1
    for got, expected in zip(seen, eager[start:], strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_data_are_noised_as_the_loop_holds_them_and_some_labels_dropped() -> None:
    data = LatentData(torch.ones(50, 4), {"y": torch.arange(50)}, null={"y": 99}, dropout=0.3)
    clean, conditions = data.draw_clean(1000, torch.Generator().manual_seed(0))
    labels = conditions["y"]
    assert isinstance(labels, Tensor)
    assert clean.shape == (1000, 4)
    assert 0.2 < float((labels == 99).float().mean()) < 0.4
    loop = DDIM(steps=5)
    for (signal, sigma), t in zip(loop.noise_levels, loop.timesteps, strict=True):
        assert signal**2 == pytest.approx(float(loop.betas.alphas_bar()[int(t)]))
        assert signal**2 + sigma**2 == pytest.approx(1)
    solver = DPMSolver(evaluations=4, guidance=Guidance(1.5, null={"y": 5}, batched=False))
    assert len(solver.noise_levels) == 8
    assert solver.noise_levels[0] == solver.noise_levels[1] != solver.noise_levels[2]
    assert FlowEuler(steps=2).noise_levels == ((0.0, 1.0), (0.5, 0.5))


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


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"penalty": None},
        {"penalty": 1e-3, "budget": 0.5},
        {"penalty": -1.0},
        {"budget": 1.5},
        {"threshold": 1.0},
        {"learning_rate": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="want"):
        settings(**changes)


def test_data_of_unequal_length_are_refused() -> None:
    with pytest.raises(ScheduleError, match="3 latents, but 2 of condition 'y'"):
        LatentData(draw(3, 4), {"y": torch.zeros(2)})


def learned(path: Path | None = None, stop_after: int | None = None, **changes: Any) -> Router:  # noqa: ANN401
    class Stop(Exception):
        pass

    def on_round(report: RoundReport) -> None:
        if report.round == stop_after:
            raise Stop

    chosen = settings(**{"rounds": 7, "budget": 0.7, "checkpoint_every": 2, **changes})
    try:
        return learn_l2c(
            residual(), DDIM(steps=4, eta=0.5), draw_latents, SITES, chosen, checkpoint=path, on_round=on_round
        )
    except Stop:
        return learned(path, **changes)


@pytest.mark.parametrize("stop_after", [1, 2, 5, 6])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path, stop_after: int) -> None:
    assert learned(tmp_path / "c", stop_after) == learned()


def test_more_rounds_go_on_from_a_finished_run(tmp_path: Path) -> None:
    learned(tmp_path / "c", rounds=3)
    assert learned(tmp_path / "c", rounds=7) == learned()


def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "c"
    learned(path)
    before = path.read_bytes()
    with pytest.raises(ScheduleError, match="was made with another learning_rate, seed"):
        learned(path, seed=3, learning_rate=0.5)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(FileFormatError, match="no checkpoint"):
        learned(path)
    residual_router = learned()
    residual_router.save(path)
    with pytest.raises(FileFormatError, match="no checkpoint"):
        learned(path)


def test_a_budget_of_time_is_resumed_with_the_times_it_began_with(tmp_path: Path) -> None:
    """Measured again they would be others, so that two runs agree only if the resumed one keeps them."""
    path = tmp_path / "c"
    changes: dict[str, Any] = {"budget": 0.95, "budget_in": "time", "price_by": "time"}
    whole = learned(path, rounds=2, **changes)
    assert learned(path, rounds=2, **changes) == whole


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    learned(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "logits.3"}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(FileFormatError, match="parts of it are missing"):
        learned(path)
