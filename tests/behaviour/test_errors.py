"""What bad input gets: one sentence that names the place and the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, L2CError, l2c_compile
from l2c_compile.errors import BackendError, CaptureError, LoopTraceError, ScheduleError, UnknownSiteError
from tests.tiny import at, draw, residual, seeded, steps

MODEL = residual()


def compiled(loop: Any, evaluations: int = 1, model: nn.Module = MODEL, sites: Any = ()) -> CompiledSampler:  # noqa: ANN401
    return l2c_compile(model, CacheSchedule.all_compute(evaluations, sites), loop)


def test_an_unknown_site_names_the_nearest_modules() -> None:
    with pytest.raises(UnknownSiteError, match=r"site norn: the denoiser has no module 'norn'.*did you mean 'norm'"):
        compiled(steps(1), sites=["norn"])
    with pytest.raises(UnknownSiteError, match=r"site blocks\.\*: the denoiser has no module of that form"):
        compiled(steps(1), sites=["blocks.*"])


@pytest.mark.parametrize("performed", [1, 3])
def test_a_schedule_for_another_number_of_evaluations_names_both(performed: int) -> None:
    with pytest.raises(
        ScheduleError, match=rf"is for 2 evaluations, but the loop calls the denoiser {performed} times; use a schedule"
    ):
        compiled(steps(performed), 2)(draw(3, 4))


def test_a_first_use_without_a_source_names_site_and_evaluation() -> None:
    with pytest.raises(ScheduleError, match=r"site a is reused at evaluation 0, .*compute the site earlier"):
        CacheSchedule.from_table({"a": [0, 1]})


def branches(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    x = denoiser(x, at(x, 1))
    return x if x.mean() > 0 else -x


def asks_item(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, x.max().item()))


def asks_numpy(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return torch.from_numpy(np.sort(denoiser(x, at(x, 1)).numpy()))


def asks_array(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return np.asarray(denoiser(x, at(x, 1)))


def asks_float(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1)) * float(x.std())


def asks_list(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, sum(x[0].tolist())))


def indexes_by_mask(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1))[x > 0]


def compares(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return x if torch.allclose(x, denoiser(x, at(x, 1))) else -x


def fills_with_value(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, torch.full((3,), x[0, 0]))  # type: ignore[call-overload]


def differentiates(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return torch.autograd.grad(denoiser(x, at(x, 1)).sum(), x)


def passes_a_generator(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x + torch.randn(x.shape, generator=torch.Generator()), at(x, 1))


def seeds(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    torch.manual_seed(3)
    return denoiser(x + torch.randn_like(x), at(x, 1))


SHARED = torch.zeros(3, 4)


def writes_into_what_was_there(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    SHARED.copy_(x)
    return denoiser(SHARED, at(x, 1))


def writes_into_an_array(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    out = torch.zeros(3, 4)
    array = out.numpy()
    out += denoiser(x, at(x, 1))
    return x * float(array.sum())


def writes_into_a_weight(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    denoiser.a.weight[:1] = x[:1]
    return denoiser(x, at(x, 1))


def has_its_memory_as_another_dtype(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    out = torch.zeros(3, 4)
    integers = out.view(torch.int32)
    out.copy_(denoiser(x, at(x, 1)))
    return integers + 1


def copies_the_denoiser(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return copy.deepcopy(denoiser)(x, at(x, 1))


def copies_the_denoiser_flatly(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return copy.copy(denoiser)(x, at(x, 1))


def calls_the_forward_of_the_class(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return type(denoiser).forward(denoiser, x, at(x, 1))


def branches_in_torch(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (denoiser(x, at(x, 1)),))


def gives_values_to_numpy(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1)) + np.sin(x)


def reads_a_random_number(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, torch.randint(0, 5, (1,)).item()))


def reads_a_weight(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1)) if denoiser.a.bias.to(x)[0] > 0 else x


async def is_asynchronous(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1))


def returns_nothing(denoiser: Any, x: Tensor) -> None:  # noqa: ANN401
    denoiser(x, at(x, 1))


@dataclass
class Sample:
    latent: Tensor


class Latents(dict[str, Tensor]):
    pass


def returns_a_dataclass(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return Sample(denoiser(x, at(x, 1)))


def returns_a_kind_of_dict(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return x, Latents(latent=denoiser(x, at(x, 1)))


def returns_an_iterator(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return map(torch.sin, [denoiser(x, at(x, 1))])


def passes_a_dataclass(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(Sample(x), at(x, 1))


def enters_autocast(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return denoiser(x, at(x, 1))


def never_calls(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return x + 1


def returns_an_object(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    denoiser(x, at(x, 1))
    return object()


def passes_a_list_of_sets(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1), {1, 2})


@pytest.mark.filterwarnings("ignore:coroutine 'is_asynchronous' was never awaited")
@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (branches, r"branches on a value .*test_errors\.py:\d+, after 1 evaluation; .* use torch\.where"),
        (asks_item, r"reads the values .*\(item\) at .*test_errors\.py:\d+, after 0 evaluations"),
        (asks_numpy, r"reads the values .*\(numpy\)"),
        (asks_array, r"gives the values of the latent to numpy \(__array__\)"),
        (asks_float, r"turns a value made from the latent into a Python number \(__float__\).*test_errors\.py"),
        (asks_list, r"reads the values .*\(tolist\)"),
        (indexes_by_mask, r"result that depends on values of the latent \(aten\.nonzero"),
        (compares, r"result that depends on values of the latent \(aten\.allclose"),
        (fills_with_value, r"result that depends on values of the latent \(aten\._local_scalar_dense"),
        (differentiates, r"differentiates \(grad\) .*; a sampler computes no gradients"),
        (passes_a_generator, r"passes a torch\.Generator at .*draw from the default generator"),
        (seeds, r"seeds the random number generator.*seed it before the sampler is called"),
        (writes_into_what_was_there, r"made from the latent into a tensor that was made before the loop ran.*; clone"),
        (writes_into_an_array, r"shares its memory with numpy at .*; clone it in the loop first"),
        (writes_into_a_weight, r"into the denoiser's weight or buffer 'a\.weight' at .*; clone it first"),
        (has_its_memory_as_another_dtype, r"into memory that it also has as int32.*; make views .* after the write"),
        (copies_the_denoiser, r"copies the denoiser at .*test_errors\.py:\d+, .*; make the copy before the loop"),
        (copies_the_denoiser_flatly, r"copies the denoiser at .*test_errors\.py"),
        (calls_the_forward_of_the_class, r"never calls .*, or only the forward of its class; call .*denoiser\(x"),
        (branches_in_torch, r"calls torch\.cond, whose branches .* made from the latent .*; use torch\.where"),
        (gives_values_to_numpy, r"gives the values of the latent to numpy \(sin\) .*; compute with torch"),
        (reads_a_random_number, r"reads the values of random numbers into Python \(item\)"),
        (reads_a_weight, r"branches on a value made from the denoiser's weights .*; weights may change"),
        (is_asynchronous, r"is asynchronous, .*; give a plain function"),
        (returns_nothing, r"returns no tensor; return the latent"),
        (returns_a_dataclass, r"returns an object of type Sample, .*; call torch\.export\.register_dataclass\(Sample"),
        (
            returns_a_kind_of_dict,
            r"of type Latents, .*register_pytree_node\(Latents, \.\.\.\), or use a plain",
        ),
        (returns_an_iterator, r"returns an object of type map, .*; use a list of what it gives"),
        (passes_a_dataclass, r"gives the denoiser an object of type Sample, whose tensors torch does not see"),
        (enters_autocast, r"uses autocast at .*forward, or cast"),
        (never_calls, r"never calls the denoiser"),
        (returns_an_object, r"returns a object; return tensors"),
        (passes_a_list_of_sets, r"gives the denoiser an argument of type set at .*give it a tensor"),
    ],
)
def test_a_loop_that_cannot_be_unrolled_is_told_where_and_what_else(loop: Callable[..., object], message: str) -> None:
    with pytest.raises(LoopTraceError, match=message) as caught:
        compiled(loop)(draw(3, 4))
    assert isinstance(caught.value, ValueError)


def by_condition(denoiser: Any, x: Tensor, mask: Tensor) -> Any:  # noqa: ANN401
    return denoiser(x, at(x, 1)) if mask.any() else x


def by_indices_of_a_condition(denoiser: Any, x: Tensor, mask: Tensor) -> Any:  # noqa: ANN401
    x[mask] = denoiser(x, at(x, 1))[mask]
    return x


@pytest.mark.parametrize("loop", [by_condition, by_indices_of_a_condition])
def test_values_of_a_condition_are_told_apart_from_those_of_the_latent(loop: Callable[..., object]) -> None:
    message = r"condition 'mask' .*test_errors\.py.*or give the condition as Python numbers"
    with pytest.raises(LoopTraceError, match=message) as caught:
        compiled(loop)(draw(3, 4), mask=torch.ones(3, 4).bool())
    assert "the latent" not in str(caught.value)


def test_an_error_of_torchs_own_passes_through() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1))[9]

    with pytest.raises(IndexError, match="out of bounds"):
        compiled(loop)(draw(3, 4))


def test_autocast_is_refused_in_later_calls_too() -> None:
    sampler = compiled(steps(1))
    sampler(draw(3, 4))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(LoopTraceError, match="autocast is on where"),
    ):
        sampler(draw(3, 4))


def test_weights_without_values_are_named() -> None:
    with pytest.raises(ScheduleError, match=r"weights are on the meta device, .*load them; where accelerate"):
        compiled(steps(1), model=residual().to("meta"))(draw(3, 4))


def test_a_weight_made_in_inference_mode_is_named(captured_anew: None) -> None:
    with torch.inference_mode():
        model = residual()
    with pytest.raises(CaptureError, match=r"weight 'time\.weight' was made under torch\.inference_mode: .*deepcopy"):
        compiled(steps(1), model=model)(draw(3, 4))
    noise, own = draw(3, 4), copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(compiled(steps(1), model=own)(noise), steps(1)(model, noise))  # type: ignore[arg-type]


def test_a_scripted_denoiser_is_named(captured_anew: None) -> None:
    model = residual()
    model.a = torch.jit.script(model.a)  # type: ignore[assignment]
    with pytest.raises(CaptureError, match=r"module 'a' is made by torch\.jit, .*: give the module that it was made"):
        compiled(steps(1), model=model)(draw(3, 4))


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        result: Tensor = self.a(x)
        return Sample(result) if t.ndim == 2 else result


def test_a_denoiser_that_returns_an_unknown_object_is_told_how_to_register_it() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1)[:, None]).latent

    with pytest.raises(CaptureError, match=r"Wraps returns an object of type Sample, .*register_dataclass\(Sample\)"):
        compiled(loop, model=seeded(Wraps()))(draw(3, 4))


def test_an_error_of_the_loops_own_passes_through() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled(loop)(draw(3, 4))


class Misbehaves(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a = nn.Linear(4, 4)
        self.drop, self.norm, self.never = nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        h = self.a(x)
        if self.way == "branches" and h.sum() > 0:
            return h
        if self.way == "dropout":
            return self.drop(h)
        if self.way == "batchnorm":
            return self.norm(h)
        if self.way == "writes":
            return x.add_(h)
        if self.way == "writes weight":
            return self.a.bias.expand_as(x).relu_() + h
        if self.way == "draws":
            return h + torch.randn_like(h)
        if self.way == "bypasses":
            return self.never.forward(h)
        return h


def test_a_denoiser_that_export_rejects_gets_our_message_and_torchs_cause() -> None:
    model = seeded(Misbehaves("branches"))
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture one evaluation of Misbehaves") as caught:
        compiled(steps(1), model=model)(draw(3, 4))
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value.__cause__, L2CError)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("dropout", r"draws random numbers .* in module 'drop'; call \.eval\(\)"),
        ("batchnorm", r"changes its buffer 'norm\.running_mean' in every evaluation; call \.eval\(\)"),
        ("writes", r"changes its input .* in place; let it clone"),
        ("writes weight", r"changes its weight 'a\.bias' in place; let it clone that weight first"),
        ("draws", r"draws random numbers .* draw them in the loop"),
    ],
)
def test_a_denoiser_with_effects_is_told_what_to_do(way: str, message: str) -> None:
    shape = (4,) if way == "writes weight" else (3, 4)
    with pytest.raises(CaptureError, match=message):
        compiled(steps(1), model=seeded(Misbehaves(way)).train())(draw(*shape))


@pytest.mark.parametrize(
    ("site", "way", "message"),
    [
        ("never", "", r"site 'never': one evaluation of Misbehaves never calls it \(call number 0"),
        ("a@1", "", r"site 'a@1': .* never calls it \(call number 1 of module 'a'\)"),
        ("never", "bypasses", r"site 'never': .* bypasses its __call__"),
    ],
)
def test_a_site_that_is_never_called_is_named(site: str, way: str, message: str) -> None:
    with pytest.raises(UnknownSiteError, match=message):
        compiled(steps(1), model=seeded(Misbehaves(way)), sites=[site])(draw(3, 4))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.named = Split(), Named()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left, right = self.pair(x)
        return torch.cat([left, right], 1) + self.named(x=x)  # type: ignore[no-any-return]


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, 1)


class Named(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        return x + 1


def test_a_change_of_a_module_with_several_outputs_is_refused() -> None:
    schedule = CacheSchedule.from_table({"delta(pair)": [1, 0]})
    with pytest.raises(ScheduleError, match=r"site 'delta\(pair\)', evaluation 1: .*several tensors.*reuse its output"):
        l2c_compile(Two(), schedule, steps(2))(draw(3, 4))


def test_a_change_of_a_module_without_positional_input_is_refused() -> None:
    with pytest.raises(UnknownSiteError, match=r"site 'delta\(named\)': module 'named' takes no tensor as its first"):
        l2c_compile(Two(), CacheSchedule.all_compute(1, ["delta(named)"]), steps(1))(draw(3, 4))


def test_autocast_around_the_sampler_is_refused() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(LoopTraceError, match="autocast is on"):
        compiled(steps(1))(draw(3, 4))


def test_inputs_on_another_device_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"the denoiser is on cpu, an input on meta; move .*\.to\('cpu'\)"):
        compiled(steps(1))(draw(3, 4).to("meta"))


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"no backend 'inducter'.*did you mean 'inductor'"):
        l2c_compile(MODEL, CacheSchedule.all_compute(1), steps(1), backend="inducter")


def test_a_threshold_needs_a_router() -> None:
    with pytest.raises(ScheduleError, match="no scores for a threshold"):
        l2c_compile(MODEL, CacheSchedule.all_compute(1), steps(1), threshold=0.5)


def test_a_schedule_without_a_loop_needs_one() -> None:
    with pytest.raises(ScheduleError, match="does not say which loop"):
        l2c_compile(MODEL, CacheSchedule.all_compute(1))


def test_something_else_than_a_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="wants a Router or a CacheSchedule, got str; load_schedule_file"):
        l2c_compile(MODEL, "router.pt", steps(1))  # type: ignore[arg-type]


def test_nothing_is_summed_up_before_the_first_call() -> None:
    with pytest.raises(L2CError, match=r"nothing is compiled yet; call the sampler"):
        compiled(steps(1)).summary()


def test_a_condition_that_cannot_be_static_is_refused() -> None:
    with pytest.raises(L2CError, match="conditions must be tensors or hashable"):
        compiled(steps(1))(draw(3, 4), y={1, 2})
