"""Loops as users write them: compiled, each gives what it gives in eager mode, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from tests.tiny import Residual, at, check_equals_reference, draw, residual, same_bits, seeded

Denoiser = Callable[..., Any]
Result = Any


@pytest.fixture(scope="module")
def model() -> Residual:
    return residual()


def check(model: nn.Module, loop: Any, evaluations: int, noise: object = None, **conditions: object) -> None:  # noqa: ANN401
    """Compare with everything computed and with site a reused at odd evaluations."""
    noise = draw(3, 4) if noise is None else noise
    check_equals_reference(model, CacheSchedule.all_compute(evaluations, ["a", "b"]), loop, noise, **conditions)
    table = {"a": [int(e % 2 == 0) for e in range(evaluations)], "b": [1] * evaluations}
    if evaluations > 1:
        check_equals_reference(model, CacheSchedule.from_table(table), loop, noise, **conditions)


def multistep_history_in_a_list(denoiser: Denoiser, x: Tensor) -> Result:
    history: list[Tensor] = []
    for i in range(4):
        history.insert(0, denoiser(x, at(x, i)))
        del history[2:]
        x = x + 0.3 * history[0] if len(history) == 1 else x + 0.3 * (1.5 * history[0] - 0.5 * history[1])
    return x


def writes_in_place(denoiser: Denoiser, x: Tensor) -> Result:
    x[:, :2] = denoiser(x, at(x, 1))[:, 2:]
    x.mul_(0.5).add_(denoiser(x, at(x, 0)))
    x[0] += 1.0
    x[x.shape[0] - 1, 1:] *= 2.0
    return x


def in_place_operators_reach_everybody(denoiser: Denoiser, x: Tensor) -> Result:
    alias, view = x, x[:, :2]
    x += 1.0
    view *= 2.0
    view -= 0.5
    x /= 3.0
    x **= 2
    prediction = denoiser(x, at(x, 2))
    kept = [prediction]
    prediction += x
    return alias, view, denoiser(kept[0], at(x, 1))


def writes_into_a_prediction(denoiser: Denoiser, x: Tensor) -> Result:
    first = denoiser(x, at(x, 1))
    x = x + first
    first.zero_()
    first[:, 0] = 7.0
    return x + denoiser(x, at(x, 0)), first


def writes_into_what_it_passed(denoiser: Denoiser, x: Tensor) -> Result:
    t = at(x, 3)
    first = denoiser(x, t)
    t.sub_(1.0)
    x.add_(first)
    return x + denoiser(x, t)


def mutates_its_constants(denoiser: Denoiser, x: Tensor) -> Result:
    sigmas, scratch = torch.linspace(1.0, 0.0, 4), torch.zeros(4)
    for i in range(3):
        scratch[i] = sigmas[i] * 2
        x = x + denoiser(x, at(x, i)) * scratch[i] + scratch.sum()
        scratch.mul_(0.5)
        sigmas = sigmas - 0.1
    return x


def asks_what_a_tensor_is(denoiser: Denoiser, x: Tensor) -> Result:
    assert isinstance(x, torch.Tensor)
    assert torch.is_tensor(x)
    assert torch.is_floating_point(x)
    assert x.is_floating_point()
    assert not x.requires_grad
    assert x.type() == "torch.FloatTensor"
    assert (len(x), x.ndim, x.dim(), x.numel()) == (3, 2, 2, 12)
    batch, _ = x.shape
    assert x.size(0) == batch == torch.numel(x) // 4
    x = torch.stack([row * (i + 1) for i, row in enumerate(x)])
    half, other = x.type(torch.float64).chunk(2, dim=1)
    largest = x.max(dim=1)
    assert largest.values.shape == (3,)
    joined = torch.cat(x.chunk(2, dim=1)[::-1], dim=1)
    assert torch.result_type(half, x) is torch.float64
    return joined + denoiser(torch.cat((half, other), 1).to(x), at(x, 1)) + largest.values[:, None] + x.T.mT.mean()


def asks_the_denoiser(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    assert isinstance(denoiser, nn.Module)
    assert isinstance(denoiser, Residual)
    assert not denoiser.training
    weight = next(denoiser.parameters())
    assert denoiser.a.in_features == x.shape[1]
    denoiser = denoiser.eval()
    return x.to(weight.dtype) + denoiser.forward(x, at(x, 1)) * denoiser.a.weight.sum()


def draws_on_its_shape(denoiser: Denoiser, x: Tensor) -> Result:
    x = x + torch.randn(x.shape) * 0.1 + torch.rand(3, 4) + torch.randn_like(x)
    x = denoiser(x, at(x, 1)) + torch.randn(x.shape[0], 1, device=x.device, dtype=x.dtype)
    unused = torch.randn(2)
    assert unused.shape == (2,)
    return x + torch.empty_like(x).normal_() + x.new_empty(x.shape).uniform_()


def uses_numpy_scalars(denoiser: Denoiser, x: Tensor) -> Result:
    betas: Any = np.linspace(0.1, 0.2, 3)
    small: Any = np.float32(0.3)
    x = betas[0] * x + x * small - small
    return (1 - betas[1]) * denoiser(x, at(x, float(betas[2]))) / betas[1] + np.sqrt(betas[2]) - x


def copies_its_latent(denoiser: Denoiser, x: Tensor) -> Result:
    before = copy.deepcopy(x)
    x.add_(1.0)
    return [before, copy.copy(x), x.clone(), denoiser(x, at(x, 1))]


def passes_signed_zeros(denoiser: Denoiser, x: Tensor) -> Result:
    return [1.0 / denoiser(x, at(x, 1), y) for y in (0.0, -0.0)]


def passes_numbers_of_every_type(denoiser: Denoiser, x: Tensor) -> Result:
    integer = x.long()
    return [integer * denoiser(x, at(x, 1), y) for y in (1, True, 1.0)] + [integer * 1, integer * 1.0]


def switches_conditions_off_halfway(denoiser: Denoiser, x: Tensor) -> Result:
    for i in range(4):
        both = torch.cat([x, x]) if i < 2 else x
        prediction = denoiser(both, at(both, i))
        x = x + 0.2 * (prediction[:3] - prediction[-3:] if i < 2 else prediction)
    return x


def ends_early_in_python(denoiser: Denoiser, x: Tensor) -> Result:
    for i in range(10):
        if i == 2:
            break
        x = denoiser(x, at(x, i))
    return x


@pytest.mark.parametrize(
    ("loop", "evaluations"),
    [
        (multistep_history_in_a_list, 4),
        (writes_in_place, 2),
        (in_place_operators_reach_everybody, 2),
        (writes_into_a_prediction, 2),
        (writes_into_what_it_passed, 2),
        (mutates_its_constants, 3),
        (asks_what_a_tensor_is, 1),
        (asks_the_denoiser, 1),
        (draws_on_its_shape, 1),
        (uses_numpy_scalars, 1),
        (copies_its_latent, 1),
        (passes_signed_zeros, 2),
        (passes_numbers_of_every_type, 3),
        (ends_early_in_python, 2),
    ],
)
def test_a_loop_equals_itself_in_eager_mode(model: Residual, loop: Any, evaluations: int) -> None:  # noqa: ANN401
    check(model, loop, evaluations)


def test_evaluations_may_differ_in_batch(model: Residual) -> None:
    noise = draw(3, 4)
    everything = CacheSchedule.all_compute(4, ["a", "b"])
    check_equals_reference(model, everything, switches_conditions_off_halfway, noise)
    table = {"a": [1, 0, 1, 0], "b": [1, 1, 1, 0]}
    check_equals_reference(model, CacheSchedule.from_table(table), switches_conditions_off_halfway, noise)


class Latents(NamedTuple):
    image: Tensor
    depth: Tensor


class TwoLatents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, latents: Latents, t: Tensor, *, text: dict[str, Tensor]) -> Latents:
        return Latents(self.a(latents.image) + text["pooled"], latents.depth * t[:, None])


def test_latents_may_be_a_tuple_and_conditions_a_dict() -> None:
    def loop(denoiser: Denoiser, noise: Latents, text: dict[str, Tensor], scale: float) -> Latents:
        image, depth = noise
        for i in range(2):
            image, depth = denoiser(Latents(image, depth), at(image, i), text=text)
            image = image * scale
        return Latents(image, depth)

    noise = Latents(draw(3, 4), draw(3, 4, seed=2))
    text = {"pooled": draw(3, 4, seed=3), "unused": draw(2)}
    check_equals_reference(
        seeded(TwoLatents()), CacheSchedule.from_table({"a": [1, 0]}), loop, noise, text=text, scale=0.5
    )


def test_static_conditions_are_python_values(model: Residual) -> None:
    def loop(denoiser: Denoiser, x: Tensor, *, sizes: list[int], mode: str, flag: bool, none: None) -> Result:
        for i in sizes:
            x = denoiser(x, at(x, i)) * (2.0 if flag and mode == "double" and none is None else 1.0)
        return x

    check(model, loop, 2, sizes=[3, 1], mode="double", flag=True, none=None)


def test_results_may_be_nested_and_hold_python_values(model: Residual) -> None:
    def loop(denoiser: Denoiser, x: Tensor) -> Result:
        constant = torch.linspace(0, 1, 3)
        y = denoiser(x, at(x, 1))
        return {"y": [y, x, y], "n": 3, "none": None, "text": "a", "half": 0.5, "constant": constant, "part": y[:, :1]}

    check(model, loop, 1)


def test_results_share_no_memory_with_inputs_weights_or_each_other_calls(model: Residual) -> None:
    def loop(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
        return x, denoiser(x, at(x, 1)), denoiser.a.weight, torch.ones(2)

    noise = draw(3, 4)
    sampler = check_equals_reference(model, CacheSchedule.all_compute(1, ["a", "b"]), loop, noise)
    first: Any = sampler(noise)
    wanted = [leaf.clone() for leaf in first]
    weight, before = model.a.weight.clone(), noise.clone()
    for leaf in first:
        leaf.zero_()
    assert torch.equal(model.a.weight, weight)
    assert torch.equal(noise, before)
    assert same_bits(sampler(noise), tuple(wanted))


@pytest.mark.parametrize(
    "noise",
    [draw(4, 3).t(), draw(3, 8)[:, ::2], draw(1, 4).expand(3, 4), draw(3, 4).requires_grad_()],
    ids=["transposed", "strided", "expanded", "requires grad"],
)
def test_noise_may_have_any_layout(model: Residual, noise: Tensor) -> None:
    def loop(denoiser: Denoiser, x: Tensor) -> Result:
        return x + denoiser(x, at(x, 1)) - denoiser(2 * x, at(x, 0))

    sampler = check_equals_reference(model, CacheSchedule.all_compute(2, ["a", "b"]), loop, noise)
    assert not sampler(noise).requires_grad


def test_channels_last_noise_equals_eager() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Result:
            result: Tensor = self.b(torch.relu(self.a(x))) + t[:, None, None, None]
            return result

    def loop(denoiser: Denoiser, x: Tensor) -> Result:
        for i in range(2):
            x = x + denoiser(x, at(x, i))
        return x

    noise = draw(2, 4, 6, 6).to(memory_format=torch.channels_last)
    check(seeded(Convolutions()), loop, 2, noise)
