"""What the Python of a loop may ask of its denoiser and do with tensors: all equals eager mode, bit for bit."""

from __future__ import annotations

import collections
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import SaveError, ScheduleError, UnknownSiteError
from tests.tiny import Residual, at, check_equals_reference, draw, own, residual, same_bits, seeded

Result = Any


def check(model: nn.Module, loop: Callable[..., Any], evaluations: int, **conditions: object) -> None:
    """Compare with everything computed and with site a reused at odd evaluations."""
    check_equals_reference(model, CacheSchedule.all_compute(evaluations, ["a", "b"]), loop, draw(3, 4), **conditions)
    if evaluations > 1:
        table = {"a": [int(e % 2 == 0) for e in range(evaluations)], "b": [1] * evaluations}
        check_equals_reference(model, CacheSchedule.from_table(table), loop, draw(3, 4), **conditions)


MODEL = residual()


def asks_for_the_signature(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    named = inspect.signature(denoiser.forward).parameters
    assert inspect.getfullargspec(denoiser.forward).args[-1] == "y"
    assert type(denoiser) is Residual
    assert isinstance(denoiser.forward, type(denoiser.eval))
    assert not vars(denoiser)["training"]
    return denoiser(x, at(x, 1), **({"y": 2.0} if "y" in named else {}))


def calls_a_model_that_it_encloses(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    return MODEL(x, at(x, 1)) + denoiser(x, at(x, 2)) + denoiser.a(x)


def wraps_the_denoiser(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = denoiser

        def forward(self, x: Tensor, t: Tensor) -> Result:
            return self.inner(x * 2, t)

    return Scaled()(x, at(x, 1))


def solves_an_equation(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    times = torch.linspace(0, 1, 3).to(x)
    assert (times[1:] > times[:-1]).all()
    solution = torch.empty(len(times), *x.shape, dtype=x.dtype)
    solution[0] = x
    for i, (start, end) in enumerate(itertools.pairwise(times)):
        y = solution[i]
        first = denoiser(y, start.expand(x.shape[0]))
        if end != 1:
            y = y + first * (end - start)
        solution[i + 1] = y + denoiser(y, end.expand(x.shape[0])) * float(end - start)
    return solution


def fills_views_of_its_own(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    out = torch.zeros(3, *x.shape)
    rows, flat, turned, last = list(out), out.view(-1), out.transpose(0, 1), out[-1, :, 1:3]
    out[0] = x
    rows[1].copy_(denoiser(rows[0], at(x, 0)))
    flat[-12:] = denoiser(turned[:, 1], at(x, 1)).reshape(-1)
    last *= 2
    return out, rows, flat, turned, last


def accumulates(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    total, gaps = torch.ones(3, 4), torch.zeros(6, 8)[::2, ::2]
    alias = total
    total += denoiser(x, at(x, 1))
    assert alias is total
    assert len(total) == 3
    total.data[0] = 1.0
    gaps += total
    torch.add(alias, x, out=gaps)
    several = [torch.zeros(3, 4), torch.zeros(3, 4)]
    torch._foreach_add_(several, [x, total])
    return total, gaps, several


def draws_into_its_own(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    one, two, three = torch.empty(3, 4).normal_(), torch.zeros(4, 3).t(), torch.empty(3, 4)
    torch.nn.init.uniform_(two)
    torch.randn(3, 4, out=three)
    return denoiser(x + one, at(x, 1)) + two * three


def indexes_by_constants(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    mask, array = torch.tensor([True, False, True, True]), np.array([2, 0])
    y = denoiser(x, at(x, 1)).clone()
    y[:, mask] = x[:, mask] * 2
    y[np.array([True, False, True])] = 0.5
    return y, x[:, array], torch.masked_select(x, mask), x[1, mask], x[x.new_tensor([1, 0, 1]).bool()]


def inpaints(denoiser: Any, x: Tensor, condition: Tensor, known: tuple[tuple[bool, ...], ...]) -> Result:  # noqa: ANN401
    mask = torch.tensor(known)
    for i in range(2):
        x[mask] = condition[mask]
        x = x - denoiser(x, at(x, i))
    return x


def multiplies_by_arrays(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    weights: Any = np.linspace(0.1, 1, 4)
    scale: Any = np.float32(0.3)
    return x * weights, denoiser(x, at(x, 1)) / weights.astype(np.float32), x * scale - scale


@torch.inference_mode()
def runs_in_inference_mode(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    out = torch.empty(3, 4)
    out[:] = x
    for i in range(2):
        out = denoiser(out * torch.linspace(0, 1, 4), at(x, i)) + denoiser.a.bias
    return out


@torch.no_grad()
def runs_without_gradients(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    x.requires_grad_()
    y = x.detach()
    y.requires_grad = True
    return denoiser(denoiser(y, at(x, 1)), at(x, 0))


def clips_at_a_quantile(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    limit = torch.quantile(x.abs(), 0.9, dim=1, keepdim=True)
    return denoiser(x.clamp(-limit, limit), at(x, 1)) / limit


@torch.jit.script
def scripted(a: Tensor, b: Tensor) -> Tensor:
    return a * 2 + torch.tanh(b)


def goes_below_torchs_functions(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    return scripted(x, denoiser(x, at(x, 1))), torch.func.vmap(lambda row: row * 2 + row.sum())(x)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context")
@pytest.mark.parametrize(
    ("loop", "evaluations"),
    [
        (asks_for_the_signature, 1),
        (calls_a_model_that_it_encloses, 2),
        (wraps_the_denoiser, 1),
        (solves_an_equation, 4),
        (fills_views_of_its_own, 2),
        (accumulates, 1),
        (draws_into_its_own, 1),
        (indexes_by_constants, 1),
        (multiplies_by_arrays, 1),
        (runs_in_inference_mode, 2),
        (runs_without_gradients, 2),
        (clips_at_a_quantile, 1),
        (goes_below_torchs_functions, 1),
    ],
)
def test_a_loop_equals_itself_in_eager_mode(loop: Callable[..., Any], evaluations: int) -> None:
    check(MODEL, loop, evaluations)
    assert "forward" not in vars(MODEL)


def test_a_mask_that_is_a_python_value_is_a_constant() -> None:
    known = ((True, False, False, True),) * 3
    check(MODEL, inpaints, 2, condition=draw(3, 4, seed=2), known=known)


def test_a_generator_gives_what_it_yields() -> None:
    def loop(denoiser: Any, x: Tensor) -> Iterator[Tensor]:  # noqa: ANN401
        for i in range(2):
            x = x - denoiser(x, at(x, i))
            yield x

    sampler = l2c_compile(MODEL, CacheSchedule.from_table({"a": [1, 0], "b": [1, 1]}), loop)
    results: Any = sampler(draw(3, 4))
    assert inspect.isgenerator(results)
    assert len(list(results)) == 2
    assert sampler.verify(draw(3, 4)).holds
    everything = l2c_compile(MODEL, CacheSchedule.all_compute(2), loop)
    with torch.no_grad():
        assert same_bits(list(everything(draw(3, 4))), list(loop(MODEL, draw(3, 4))))
    with pytest.raises(SaveError, match="result is a generator, which a file does not hold; let the loop return"):
        sampler.save("generator.pt2", draw(3, 4))


class Guided(Residual):
    def forward_with_guidance(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
        both = self.forward(torch.cat([x, x * 0.5]), torch.cat([t, t]))
        with_condition, without = both.chunk(2)
        return without + scale * (with_condition - without)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> nn.Module:
        return (self.a, self.b)[index]


def test_other_methods_that_call_forward_are_evaluations() -> None:
    def loop(denoiser: Guided, x: Tensor) -> Tensor:
        assert len(denoiser) == 2
        assert denoiser[0] is denoiser.a
        for i in range(2):
            x = x - denoiser.forward_with_guidance(x, at(x, i), 1.5)
        return x

    check(seeded(Guided()), loop, 2)


class CallsSuper(Residual):
    def __call__(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return super().__call__(x * 2, t) + 1


class CallsForward(Residual):
    def __call__(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.forward(x * 2, t) + 1


def two_steps(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
    for i in range(2):
        x = x - denoiser(x, at(x, i))
    return x


@pytest.mark.parametrize("kind", [CallsSuper, CallsForward])
def test_a_call_of_its_own_is_part_of_the_loop(kind: type[Residual]) -> None:
    check(seeded(kind()), two_steps, 2)


def test_hooks_on_the_denoiser_are_part_of_the_loop() -> None:
    model = residual()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))
    model.register_forward_hook(lambda module, args, output: output + args[0])

    def loop(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
        x = denoiser(denoiser(x, at(x, 1)), at(x, 0))
        # This goes past the hooks.
        return x + denoiser.forward(x, at(x, 1))

    check(model, loop, 3)


@pytest.mark.filterwarnings("error")
def test_parts_that_torch_compiled_are_taken_apart_with_one_warning() -> None:
    def doubled(x: Tensor) -> Tensor:
        return x + x

    model = residual()
    model.b.compile(backend="eager")
    compiled = torch.compile(doubled, backend="eager")

    def loop(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
        return denoiser(compiled(x), at(x, 1))

    sampler = l2c_compile(model, CacheSchedule.all_compute(1, ["a", "b"]), loop)
    with pytest.warns(UserWarning, match=r"code of function .*doubled, module 'b'; .* in the last bits") as caught:
        sampler.capture(draw(3, 4))
    assert len(caught) == 1
    with torch.no_grad():
        assert same_bits(sampler(draw(3, 4)), loop(residual(), draw(3, 4)))
    assert sampler.verify(draw(3, 4)).holds


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize(
    "whole",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.jit.trace(model, (draw(3, 4), torch.ones(3))),  # type: ignore[no-untyped-call]
    ],
    ids=["torch.compile", "torch.jit.trace"],
)
def test_a_denoiser_that_is_compiled_whole_equals_its_python(whole: Any) -> None:  # noqa: ANN401
    model = whole(residual())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = l2c_compile(model, CacheSchedule.all_compute(2), two_steps)(draw(3, 4))
    with torch.no_grad():
        assert same_bits(got, two_steps(residual(), draw(3, 4)))


@dataclass
class Registered:
    sample: Tensor
    name: str = "x"


torch.export.register_dataclass(Registered)


class ReturnsContainers(Residual):
    def forward(self, x: Tensor, t: Tensor) -> Result:  # type: ignore[override]
        y = super().forward(x, t)
        return Registered(y), collections.OrderedDict(y=y), collections.deque([x])


def test_containers_that_torch_knows_may_be_returned() -> None:
    def loop(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
        first, second, third = denoiser(x, at(x, 1))
        return Registered(first.sample * 2, first.name), second["y"] + third[0]

    check(seeded(ReturnsContainers()), loop, 1)


class OddlyNamed(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for module in self.children():
            x = torch.tanh(module(x))
        return x


def test_names_of_modules_may_have_spaces_and_parentheses() -> None:
    model = seeded(OddlyNamed("a b", "c (d)", "(e)"))
    for sites in (["a b", "c (d)"], ["*"]):
        schedule = CacheSchedule.from_table({site: [1, 0] for site in sites})
        check_equals_reference(model, schedule, two_steps, draw(3, 4))


def test_a_name_that_reads_as_a_call_is_told_so() -> None:
    model = seeded(OddlyNamed("a@1", "b"))
    with pytest.raises(UnknownSiteError, match=r"no module 'a'. There is module 'a@1', whose name a site cannot spell"):
        l2c_compile(model, CacheSchedule.all_compute(2, ["a@1"]), two_steps)
    with pytest.raises(ScheduleError, match=r"site \* stands for module 'a@1', whose name a site cannot spell"):
        l2c_compile(model, CacheSchedule.all_compute(2, ["*"]), two_steps)


def test_a_site_that_returns_no_tensor_is_told_so() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    model = residual()
    model.add_module("nothing", Nothing())
    model.a.register_forward_hook(lambda module, args, output: model.nothing(output))  # type: ignore[operator]
    with pytest.raises(UnknownSiteError, match=r"module 'nothing' returns NoneType, in which there is no tensor"):
        l2c_compile(model, CacheSchedule.all_compute(2, ["nothing"]), two_steps)(draw(3, 4))


def test_a_module_that_another_thread_uses_meanwhile_stays_usable() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = residual()

    def loop(denoiser: Any, x: Tensor) -> Result:  # noqa: ANN401
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: MODEL(draw(3, 4), torch.ones(3))).result()
        return denoiser(x, at(x, 1)) + other.detach()

    check(model, loop, 1)


def test_inputs_stay_what_they_are() -> None:
    noise = draw(3, 4)
    before = own(noise)
    l2c_compile(MODEL, CacheSchedule.all_compute(2), two_steps)(noise)
    assert same_bits(noise, before)
