"""Loops against the authors' records, closed forms, diffusers, and each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l2c_compile.errors import L2CError, LoopError
from l2c_compile.loops import (
    DDIM,
    LINEAR_BETAS,
    STABLE_DIFFUSION_BETAS,
    BetaSchedule,
    BuiltInLoop,
    DPMSolver,
    FlowEuler,
    Guidance,
    loop_from_dict,
)
from l2c_compile.loops.noise_schedules import DiscreteVP, Spacing, respaced_timesteps
from l2c_compile.models import DiT, UViT

LOOPS: list[BuiltInLoop] = [
    DDIM(4),
    DDIM(5, eta=0.5, spacing="trailing", betas=STABLE_DIFFUSION_BETAS),
    DDIM(4, guidance=Guidance(3.0, {"y": 10}, channels=2)),
    DPMSolver(5, order=1),
    DPMSolver(5, order=2, algorithm="dpmsolver", guidance=Guidance(0.4, {"y": 10}, batched=False, base="cond")),
    DPMSolver(6, order=3, spacing="log_snr", first_timestep=1),
    DPMSolver(7, order=3, algorithm="dpmsolver"),
    DPMSolver(4, method="multistep", lower_order_final=False),
    FlowEuler(4, shift=3.0, time_scale=1.0, guidance=Guidance(2.0, {"y": 10}, batched=False)),
]
"""One of each kind."""

each_loop = pytest.mark.parametrize("loop", LOOPS, ids=[f"{i}-{loop.name}" for i, loop in enumerate(LOOPS)])


def toy(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
    """Predict something that depends on everything, with a learned variance behind it."""
    shift = (t_B.to(x.dtype) / 1000.0 + 0.1 * y.to(x.dtype))[:, None, None, None]
    return torch.cat([torch.tanh(0.7 * x + shift), x * shift], dim=1)


def toy_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 2, 2, dtype=dtype), torch.tensor([1, 5, 7])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# the authors' records


def test_ddim_with_dit_reproduces_the_authors_samples(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/dit.pt"), weights_only=True)
    model = DiT(**golden["config"])
    model.load_state_dict(golden["state_dict"])
    loop = DDIM(golden["steps"], guidance=Guidance(golden["cfg_scale"], {"y": model.num_classes}, channels=3))
    with torch.no_grad():
        latent = loop(model, golden["noise"], y=golden["labels"])
    assert relative_error(latent, golden["full"]) <= 1e-5
    assert loop.timesteps == tuple(reversed(golden["timestep_map"]))


def test_dpm_solver_with_uvit_reproduces_the_authors_samples(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/uvit.pt"), weights_only=True)
    model = UViT(**golden["config"])
    model.load_state_dict(golden["state_dict"])
    null = {"y": golden["null_label"]}
    loop = DPMSolver(
        golden["nfe"],
        order=2,
        betas=STABLE_DIFFUSION_BETAS,
        first_timestep=1,
        guidance=Guidance(golden["cfg_scale"], null, batched=False, base="cond"),
    )
    with torch.no_grad():
        latent = loop(model, golden["noise"], y=golden["labels"])
    assert relative_error(latent, golden["full"]) <= 1e-5
    # theirs were interpolated in float32
    assert loop.network_timesteps == pytest.approx(golden["eval_timesteps"], abs=5e-4)
    assert loop.num_evaluations == 2 * golden["nfe"]


# closed forms: Gaussian data, for which the exact noise prediction and the exact trajectory are known


MEAN, STD = torch.tensor([-1.5, 0.3, 0.8])[None, :, None].double(), 0.4


def gaussian_noise(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return E[noise | x] for data drawn from N(MEAN, STD**2)."""
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_flow(x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Carry x along the probability flow from (alpha, sigma) to another: it keeps its number of deviations."""
    deviations = (x - start[0] * MEAN) / math.hypot(start[0] * STD, start[1])
    return end[0] * MEAN + math.hypot(end[0] * STD, end[1]) * deviations


def dpm_error(loop: DPMSolver) -> float:
    torch.manual_seed(0)
    schedule = DiscreteVP(loop.betas)
    noise = torch.randn(4, 3, 5, dtype=torch.float64)

    def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
        level = schedule.at((t_B[0].item() + 1 - loop.first_timestep) / loop.betas.num_timesteps)
        return gaussian_noise(x, level.alpha, level.sigma)

    first, last = schedule.at(1.0), schedule.at(1.0 / loop.betas.num_timesteps)
    exact = gaussian_flow(noise, (first.alpha, first.sigma), (last.alpha, last.sigma))
    return (loop(denoiser, noise) - exact).abs().max().item()


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(
    ("method", "order", "few", "many"),
    [
        ("singlestep", 1, 40, 80),
        ("singlestep", 2, 40, 80),
        # 3k + 2 evaluations end in a step of order 2, whose local error does not spoil the global order. With fewer the
        # error changes sign between the channels and shows no order at all
        ("singlestep", 3, 122, 242),
        ("multistep", 2, 40, 80),
    ],
)
def test_dpm_solvers_converge_with_their_order(algorithm: str, method: str, order: int, few: int, many: int) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "method": method, "order": order}
    settings |= {"lower_order_final": False, "spacing": "log_snr", "first_timestep": 1}

    def error(evaluations: int) -> float:
        return dpm_error(DPMSolver(evaluations, **settings))

    measured = math.log(error(few) / error(many)) / math.log(many / few)
    assert measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("first_timestep", [0, 1])
def test_dpm_solvers_reach_the_exact_sample_for_any_spacing(spacing: str, first_timestep: int) -> None:
    settings: dict[str, Any] = {"spacing": spacing, "first_timestep": first_timestep}
    for method in ("singlestep", "multistep"):
        assert dpm_error(DPMSolver(200, **settings, method=method)) < 5e-3


def test_ddim_converges_to_the_exact_sample() -> None:
    torch.manual_seed(0)
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    alphas_bar = LINEAR_BETAS.alphas_bar()

    def error(steps: int) -> float:
        def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
            share = alphas_bar[int(t_B[0])]
            return gaussian_noise(x, math.sqrt(share), math.sqrt(1.0 - share))

        start = (math.sqrt(alphas_bar[-1]), math.sqrt(1.0 - alphas_bar[-1]))
        return (DDIM(steps)(denoiser, noise) - gaussian_flow(noise, start, (1.0, 0.0))).abs().max().item()

    assert error(500) < 0.01
    assert error(50) / error(100) == pytest.approx(2.0, abs=0.5)


def test_ancestral_ddim_keeps_the_distribution() -> None:
    torch.manual_seed(0)
    alphas_bar = LINEAR_BETAS.alphas_bar()

    def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
        share = alphas_bar[int(t_B[0])]
        return gaussian_noise(x, math.sqrt(share), math.sqrt(1.0 - share))

    samples = DDIM(200, eta=1.0)(denoiser, torch.randn(4000, 3, 1, dtype=torch.float64))
    # 4000 samples: the standard error of the mean is 0.006, of the deviation 0.005
    torch.testing.assert_close(samples.mean(0, keepdim=True), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(samples.std(0), torch.full((3, 1), STD, dtype=torch.float64), rtol=0, atol=0.03)


def test_flow_euler_is_exact_on_straight_paths() -> None:
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    clean = torch.randn(4, 3, 5, dtype=torch.float64)
    for shift in (1.0, 3.0):
        latent = FlowEuler(7, shift=shift)(lambda x, t_B: noise - clean, noise)
        torch.testing.assert_close(latent, clean, rtol=1e-12, atol=1e-12)


# diffusers


def test_ddim_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs(torch.float64)
    for spacing in ("leading", "trailing"):
        scheduler = diffusers.DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing=spacing, steps_offset=0
        )
        scheduler.set_timesteps(20)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
        loop = DDIM(20, spacing=spacing)
        assert loop.timesteps == tuple(scheduler.timesteps.tolist())
        assert relative_error(loop(toy, noise, y=y), x) < 1e-5


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("steps", "lower_order_final"), [(27, False), (9, True)])
def test_multistep_dpm_solver_equals_diffusers(algorithm: str, steps: int, lower_order_final: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs(torch.float64)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type=algorithm,
        final_sigmas_type="sigma_min",
        lower_order_final=lower_order_final,
    )
    # 999 is divisible by the steps: only then are the timesteps of diffusers, which it rounds, evenly spaced
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
    settings: dict[str, Any] = {"algorithm": algorithm, "lower_order_final": lower_order_final}
    loop = DPMSolver(steps, method="multistep", **settings)
    assert loop.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert relative_error(loop(toy, noise, y=y), x) < 1e-4


def test_flow_euler_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0 - i / 6 for i in range(6)])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
    loop = FlowEuler(6, shift=3.0)
    assert loop.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert relative_error(loop(toy, noise, y=y), x) < 1e-5


# randomness


def test_only_eta_draws_noise_and_a_seed_repeats_it() -> None:
    noise, y = toy_inputs()

    def sample(eta: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return DDIM(6, eta=eta)(toy, noise, y=y)

    torch.testing.assert_close(sample(1.0, 1), sample(1.0, 1), rtol=0, atol=0)
    assert not torch.equal(sample(1.0, 1), sample(1.0, 2))
    torch.testing.assert_close(sample(0.0, 1), sample(0.0, 2), rtol=0, atol=0)


def test_every_step_but_the_last_draws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[Tensor] = []
    original = torch.randn_like

    def counted(x: Tensor) -> Tensor:
        draws.append(x)
        return original(x)

    monkeypatch.setattr(torch, "randn_like", counted)
    noise, y = toy_inputs()
    DDIM(6, eta=1.0)(toy, noise, y=y)
    assert len(draws) == 5


# guidance


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("base", ["uncond", "cond"])
def test_batched_guidance_equals_two_calls(channels: int | None, base: str) -> None:
    noise, y = toy_inputs()
    settings: dict[str, Any] = {"channels": channels, "base": base}
    one, two = (Guidance(2.5, {"y": 10}, batched=batched, **settings) for batched in (True, False))
    torch.testing.assert_close(DDIM(5, guidance=one)(toy, noise, y=y), DDIM(5, guidance=two)(toy, noise, y=y))


def test_guidance_combines_as_published() -> None:
    x, y = toy_inputs()
    cond, uncond = (toy(x, torch.full((3,), 7.0), label)[:, :4] for label in (y, torch.full_like(y, 10)))
    dit = Guidance(2.5, {"y": 10}).evaluate(toy, x, 7.0, {"y": y})
    uvit = Guidance(2.5, {"y": 10}, base="cond").evaluate(toy, x, 7.0, {"y": y})
    torch.testing.assert_close(dit, uncond + 2.5 * (cond - uncond))
    torch.testing.assert_close(uvit, cond + 2.5 * (cond - uncond))


def test_guidance_of_the_first_channels_keeps_the_conditional_others() -> None:
    x, y = toy_inputs()
    everywhere = Guidance(2.5, {"y": 10}).evaluate(toy, x, 7.0, {"y": y})
    first = Guidance(2.5, {"y": 10}, channels=3).evaluate(toy, x, 7.0, {"y": y})
    torch.testing.assert_close(first[:, :3], everywhere[:, :3])
    torch.testing.assert_close(first[:, 3:], toy(x, torch.full((3,), 7.0), y)[:, 3:4])


def test_guidance_calls_the_conditional_half_first() -> None:
    x, y = toy_inputs()
    seen: list[list[int]] = []

    def denoiser(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        assert x.shape[0] == t_B.shape[0] == y.shape[0]
        seen.append(y.tolist())
        return x

    DDIM(1, spacing="trailing", guidance=Guidance(2.0, {"y": 9}))(denoiser, x, y=y)
    DDIM(1, spacing="trailing", guidance=Guidance(2.0, {"y": 9}, batched=False))(denoiser, x, y=y)
    assert seen == [[1, 5, 7, 9, 9, 9], [1, 5, 7], [9, 9, 9]]


@pytest.mark.parametrize("batched", [True, False])
def test_tensor_nulls_are_expanded_and_other_conditions_are_shared(batched: bool) -> None:
    x, _ = toy_inputs()
    text, null, mask = torch.randn(3, 2, 6), torch.zeros(2, 6), torch.randn(3, 1, 1, 1)

    def denoiser(x: Tensor, t_B: Tensor, text: Tensor, mask: Tensor, factor: float) -> Tensor:
        return factor * (x * mask + text.sum((1, 2))[:, None, None, None])

    guidance = Guidance(3.0, {"text": null}, batched=batched)
    got = guidance.evaluate(denoiser, x, 1, {"text": text, "mask": mask, "factor": 2.0})
    torch.testing.assert_close(got, 2.0 * (x * mask + 3.0 * text.sum((1, 2))[:, None, None, None]))


def test_guidance_that_does_not_fit_the_conditions_is_refused() -> None:
    x, y = toy_inputs()
    with pytest.raises(LoopError, match=r"null for condition 'label'.*called with: y"):
        DDIM(2, guidance=Guidance(2.0, {"label": 9}))(toy, x, y=y)
    with pytest.raises(LoopError, match=r"cannot double condition 'extra' of type dict.*batched=False"):
        DDIM(2, guidance=Guidance(2.0, {"y": 9}))(toy, x, y=y, extra={"a": y})


# what every loop keeps


@each_loop
def test_timesteps_are_what_the_denoiser_sees(loop: BuiltInLoop) -> None:
    noise, y = toy_inputs()
    seen: list[float] = []

    def denoiser(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        assert t_B.shape == (x.shape[0],)
        assert t_B.dtype == (torch.int64 if isinstance(loop, DDIM) else torch.float32)
        seen.append(t_B[0].item())
        return toy(x, t_B, y)

    latent = loop(denoiser, noise, y=y)
    assert latent.shape == noise.shape
    assert latent.isfinite().all()
    assert seen == pytest.approx(loop.timesteps)
    assert loop.num_evaluations == len(seen)


@each_loop
def test_a_description_survives_json(loop: BuiltInLoop) -> None:
    assert loop_from_dict(json.loads(json.dumps(loop.to_dict()))) == loop


@each_loop
def test_loops_keep_the_dtype(loop: BuiltInLoop) -> None:
    noise, y = toy_inputs()
    for dtype in (torch.bfloat16, torch.float64):
        assert loop(toy, noise.to(dtype), y=y).dtype == dtype


@each_loop
def test_loops_never_look_at_a_value(loop: BuiltInLoop) -> None:
    noise, y = toy_inputs()
    assert loop(toy, noise.to("meta"), y=y.to("meta")).shape == noise.shape


@each_loop
def test_traced_loops_write_nothing_in_place_and_equal_the_eager_loop(loop: BuiltInLoop) -> None:
    noise, y = toy_inputs()
    before = noise.clone()
    traced = make_fx(lambda x, labels: loop(toy, x, y=labels))(noise, y)
    ops = [node.target for node in traced.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not [op for op in ops if op._schema.is_mutable]
    assert not [op for op in ops if op._schema.name in ("aten::_local_scalar_dense", "aten::lift_fresh_copy")]
    torch.manual_seed(1)
    wanted = loop(toy, noise, y=y)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(noise, y), wanted, rtol=0, atol=0)
    torch.testing.assert_close(noise, before, rtol=0, atol=0)


# noise schedules


def test_respacing_equals_the_dit_code() -> None:
    assert respaced_timesteps(1000, 10) == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert respaced_timesteps(1000, 4, "leading") == (0, 250, 500, 750)
    assert respaced_timesteps(1000, 4, "trailing") == (249, 499, 749, 999)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_respaced_timesteps_are_distinct_ascending_and_in_range(spacing: Spacing) -> None:
    for steps in (2, 3, 7, 51, 333, 999, 1000):
        picked = respaced_timesteps(1000, steps, spacing)
        assert len(set(picked)) == steps
        assert list(picked) == sorted(picked)
        assert 0 <= picked[0] <= picked[-1] <= 999


@pytest.mark.parametrize("betas", [LINEAR_BETAS, STABLE_DIFFUSION_BETAS])
def test_the_continuous_schedule_passes_through_the_trained_one(betas: BetaSchedule) -> None:
    schedule, alphas_bar = DiscreteVP(betas), betas.alphas_bar()
    for index in (0, 1, 500, 999):
        level = schedule.at((index + 1) / 1000)
        assert level.alpha**2 == pytest.approx(alphas_bar[index], rel=1e-12)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, rel=1e-12)
        assert schedule.at_log_snr(level.log_snr).time == pytest.approx(level.time, rel=1e-9)


# mistakes


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: DDIM(0), "steps must be an integer of at least 1, got 0"),
    (lambda: DDIM(2.5), "steps must be an integer"),  # type: ignore[arg-type]
    (lambda: DDIM(1001), "takes 1 to 1000 steps, got 1001"),
    (lambda: DDIM(1), "use 'trailing'"),
    (lambda: DDIM(5, eta=-0.1), "eta must be a number of at least 0"),
    (lambda: DDIM(5, eta=math.nan), "eta must be a number"),
    (lambda: DDIM(5, eta=9.0), "use a smaller eta"),
    (lambda: DDIM(5, spacing="odd"), "spacing is 'linspace'"),  # type: ignore[arg-type]
    (lambda: DDIM(5, guidance=3.0), "wants a Guidance or None"),  # type: ignore[arg-type]
    (lambda: DPMSolver(0), "evaluations must be"),
    (lambda: DPMSolver(5, order=4), r"order in \(1, 2, 3\), got 4"),
    (lambda: DPMSolver(5, order=3, method="multistep"), r"multistep DPMSolver wants order in \(1, 2\)"),
    (lambda: DPMSolver(5, algorithm="sde"), "wants algorithm"),  # type: ignore[arg-type]
    (lambda: FlowEuler(5, shift=0.0), "shift must be a number above 0"),
    (lambda: FlowEuler(5, time_scale=math.inf), "time_scale must be a number"),
    (lambda: Guidance("4", {"y": 1}), "number as scale"),  # type: ignore[arg-type]
    (lambda: Guidance(4.0, {}), "null conditions such as"),
    (lambda: Guidance(4.0, {"y": "none"}), "must be a number or a tensor"),  # type: ignore[dict-item]
    (lambda: Guidance(4.0, {"y": 1}, channels=0), "positive number of channels"),
    (lambda: Guidance(4.0, {"y": 1}, base="null"), "'uncond' or 'cond'"),  # type: ignore[arg-type]
    (lambda: Guidance(4.0, {"y": torch.zeros(2)}).to_dict(), "cannot be described in JSON"),
    (lambda: BetaSchedule("cosine"), "'linear' or 'scaled_linear'"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(start=0.5, end=0.1), "0 < start <= end < 1"),
    (lambda: loop_from_dict({"name": "dim", "steps": 5}), "no loop is called 'dim'; did you mean 'ddim'"),
    (lambda: loop_from_dict({"steps": 5}), "no loop is called"),
    (lambda: loop_from_dict({"name": "ddim", "step": 5}), "DDIM has no field 'step'; did you mean 'steps'"),
    (lambda: loop_from_dict({"name": "ddim"}), "lacks steps"),
    (lambda: loop_from_dict({"name": "ddim", "steps": 5, "guidance": {"scale": 2.0}}), "Guidance lacks null"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(LoopError, match=message) as caught:
        make()
    assert isinstance(caught.value, L2CError)
    assert isinstance(caught.value, ValueError)
