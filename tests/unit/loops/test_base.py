"""What all built-in loops have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l2c_compile.errors import L2CError, LoopError
from l2c_compile.loops import (
    DDIM,
    STABLE_DIFFUSION_BETAS,
    BetaSchedule,
    BuiltInLoop,
    DPMSolver,
    FlowEuler,
    Guidance,
    loop_from_dict,
)
from tests.toy_denoisers import toy, toy_inputs

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
