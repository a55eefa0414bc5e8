"""A form runs only while what it was made from is there; otherwise it is captured anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from l2c_compile.errors import StaleConstantsError
from tests.tiny import Residual, at, draw, residual, same_bits, steps

FACTOR = 1.0


class Scaled(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.sizes, self.shift = 1.0, {"a": 2}, torch.zeros(4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return super().forward(*args, **kwargs) * self.scale + self.sizes["a"] + self.shift


class Louder(Scaled):
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return 2 * super().forward(*args, **kwargs)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as LoRA injects it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = x - 0.1 * FACTOR * denoiser(x, at(x, i))
    return x


def sampler_of(model: nn.Module, **options: Any) -> CompiledSampler:  # noqa: ANN401
    return l2c_compile(model, CacheSchedule.from_table({"b": [1, 0, 1]}), loop, **options)


def check(sampler: CompiledSampler, noise: Tensor) -> None:
    wanted = run_reference(copy.deepcopy(sampler.model), sampler.loop, sampler.schedule, noise.clone(), {})
    assert same_bits(sampler(noise), wanted)


CHANGES: dict[str, Callable[[Scaled], object]] = {
    "attribute": lambda m: setattr(m, "scale", 2.0),
    "type of a number": lambda m: setattr(m, "scale", 1),
    "dict": lambda m: m.sizes.update(a=3),
    "tensor in place": lambda m: m.shift.add_(1),
    "tensor through numpy": lambda m: m.shift.numpy().fill(1),
    "tensor through data": lambda m: m.shift.data.fill_(1),
    "hook": lambda m: m.b.register_forward_hook(lambda module, args, output: output * 2),
    "pre-hook": lambda m: m.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "forward": lambda m: setattr(m.b, "forward", lambda x: x * 3),
    "submodule": lambda m: setattr(m, "b", nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    "adapter": lambda m: setattr(m, "a", Adapted(m.a)),
    "class": lambda m: setattr(m, "__class__", Louder),
    "eps of a norm": lambda m: setattr(m.norm, "eps", 0.5),
    "mode": lambda m: m.train(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("level", ["first", "structure"])
def test_a_change_between_calls_is_captured_anew(change: str, level: str) -> None:
    torch.manual_seed(0)
    model, noise = Scaled().eval(), draw(2, 4)
    said: list[str] = []
    sampler = sampler_of(model, check=level, progress=said.append)
    check(sampler, noise)
    CHANGES[change](model)
    check(sampler, noise)
    assert any(line.startswith("capture anew: ") for line in said)
    count = len(said)
    check(sampler, noise)
    assert len(said) == count


def test_a_state_that_comes_back_finds_its_form() -> None:
    model, noise = Scaled().eval(), draw(2, 4)
    sampler = sampler_of(model)
    first = sampler.capture(noise)
    model.scale = 2.0
    assert sampler.capture(noise) is not first
    model.scale = 1.0
    assert sampler.capture(noise) is first


def test_a_global_of_the_loop_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, noise = sampler_of(residual()), draw(2, 4)
    check(sampler, noise)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    check(sampler, noise)


def test_an_object_among_the_conditions_is_guarded_by_what_it_holds() -> None:
    class Settings:
        def __init__(self) -> None:
            self.sizes = [0.1]

    def uses_settings(denoiser: Any, x: Tensor, settings: Settings) -> Tensor:  # noqa: ANN401
        for i in range(3):
            x = x - settings.sizes[0] * denoiser(x, at(x, i))
        return x

    model, noise, settings = residual(), draw(2, 4), Settings()
    sampler = l2c_compile(model, CacheSchedule.from_table({"b": [1, 0, 1]}), uses_settings)
    for size in (0.1, 0.5):
        settings.sizes[0] = size
        wanted = run_reference(model, uses_settings, sampler.schedule, noise, {"settings": settings})
        assert same_bits(sampler(noise, settings=settings), wanted)


def test_another_default_dtype_is_captured_anew() -> None:
    def makes_numbers(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x - denoiser(x, at(x, 0)) * torch.tensor(1 / 3).to(x.dtype)  # type: ignore[no-any-return]

    model, noise = residual().double(), draw(2, 4).double()
    sampler = l2c_compile(model, CacheSchedule.all_compute(1, ["a"]), makes_numbers)
    check(sampler, noise)
    try:
        torch.set_default_dtype(torch.float64)
        check(sampler, noise)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_state_that_never_comes_back_is_warned_of() -> None:
    model, noise = Scaled().eval(), draw(2, 4)
    sampler = sampler_of(model, check="structure")
    for number in range(8):
        model.scale = float(number)
        sampler(noise)
    model.scale = 8.0
    with pytest.warns(UserWarning, match=r"captured for the 9th time .*'denoiser\.scale' was 7\.0 and is 8\.0"):
        sampler(noise)


class Fades(nn.Module):
    """Folded constants come from ``time``, a packed copy from ``a``."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a = nn.Linear(1, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a(x) + self.time(t[:, None])  # type: ignore[no-any-return]


def fused_step(model: Fades, name: str) -> None:
    weights = list(getattr(model, name).parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.1, fused=True).step()


def through_data(model: Fades, name: str) -> None:
    getattr(model, name).weight.data.mul_(1.5)


def through_numpy(model: Fades, name: str) -> None:
    array = getattr(model, name).weight.detach().numpy()
    array *= 1.5


@pytest.mark.parametrize("write", [fused_step, through_data, through_numpy])
def test_a_write_that_torch_does_not_count_is_seen(write: Callable[[Fades, str], None]) -> None:
    model, noise = Fades().eval(), draw(32, 32)
    sampler = l2c_compile(model, CacheSchedule.all_compute(2, ["a"]), steps(2), numerics="rounding")
    sampler(noise)
    write(model, "a")
    fresh = l2c_compile(copy.deepcopy(model), CacheSchedule.all_compute(2, ["a"]), steps(2), numerics="rounding")
    assert same_bits(sampler(noise), fresh(noise))
    write(model, "time")
    with pytest.raises(StaleConstantsError, match=r"weight 'time\.weight' changed .*call refresh\(\)"):
        sampler(noise)
    sampler.refresh()
    assert torch.allclose(
        torch.as_tensor(sampler(noise)),
        torch.as_tensor(run_reference(model, sampler.loop, sampler.schedule, noise, {})),
        atol=1e-5,
    )


def test_weights_that_the_loop_reads_itself_are_followed() -> None:
    class WithNull(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.null = nn.Parameter(torch.ones(4))

    decoder = nn.Linear(4, 4)

    def reads(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(2):
            x = x - 0.1 * denoiser(x, at(x, i)) + denoiser.null[None].expand(2, -1) * denoiser.null[0].item()
        return decoder(x)  # type: ignore[no-any-return]

    model, noise = WithNull().eval(), draw(2, 4)
    sampler = l2c_compile(model, CacheSchedule.all_compute(2, ["a"]), reads)
    for weight in (None, model.null, decoder.weight):
        if weight is not None:
            weight.data.mul_(2)
        wanted = run_reference(model, reads, sampler.schedule, noise, {})
        assert same_bits(sampler(noise), wanted)


def test_a_weight_made_in_inference_mode_that_the_loop_reads_is_followed() -> None:
    model, noise = residual(), draw(2, 4)
    with torch.inference_mode():
        model.null = nn.Parameter(torch.ones(4), requires_grad=False)

    def reads(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x - denoiser(x, at(x, 0)) + denoiser.null[None].expand(2, -1) * denoiser.null[0].item()  # type: ignore[no-any-return]

    sampler = l2c_compile(model, CacheSchedule.all_compute(1, ["a"]), reads, check="structure")
    for factor in (1, 2):
        with torch.inference_mode():
            model.null.mul_(factor)
        assert same_bits(sampler(noise), run_reference(model, reads, sampler.schedule, noise, {}))


def test_another_model_loop_or_schedule_of_the_sampler_is_captured_anew() -> None:
    sampler, noise = sampler_of(residual()), draw(2, 4)
    check(sampler, noise)
    sampler.model = Scaled().eval()
    check(sampler, noise)
    sampler.schedule = CacheSchedule.from_table({"a": [1, 0, 0]})
    check(sampler, noise)
    sampler.loop = steps(3)
    check(sampler, noise)


def test_without_checks_only_weights_and_the_mode_count() -> None:
    model, noise = Scaled().eval(), draw(2, 4)
    sampler = sampler_of(model, check=None)
    first = sampler.capture(noise)
    model.scale = 5.0
    assert sampler.capture(noise) is first
    model.train()
    assert sampler.capture(noise) is not first


def test_a_word_that_is_no_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="check wants 'first', 'structure' or None, got 'all'"):
        sampler_of(residual(), check="all")
