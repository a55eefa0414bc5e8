"""The denoiser as a loop sees it while another function makes its calls."""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from l2c_compile.frontend.stand_in import StandIn, without_hooks_of
from tests.tiny import Residual, at, draw, residual


class Calls(list[object]):
    """The calls that were made, each of which returns the word "prediction"."""

    def __call__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        self.append((args, kwargs))
        return "prediction"


def test_calls_are_made_by_the_function_and_not_by_the_denoiser() -> None:
    model, calls = residual(), Calls()
    denoiser: Any = model
    with StandIn(model, calls):
        assert denoiser(1, t=2) == denoiser.forward(1, t=2) == "prediction"
    assert calls == [((1,), {"t": 2})] * 2
    assert isinstance(model(draw(3, 4), torch.ones(3)), torch.Tensor)


def test_whatever_else_is_asked_the_denoiser_answers() -> None:
    model = residual()
    with StandIn(model, Calls()):
        assert type(model) is Residual
        assert model.eval() is model
        assert list(inspect.signature(model.forward).parameters) == ["x_BD", "t_B", "y"]
        assert inspect.getfullargspec(model.forward).args == ["self", "x_BD", "t_B", "y"]
        assert isinstance(model.forward, types.MethodType)
        assert model.forward.__self__ is model
        assert "y" in model.forward.__code__.co_varnames
        assert vars(model)["training"] is False


def test_hooks_run_in_the_loop_around_the_call() -> None:
    model, calls, seen = residual(), Calls(), list[object]()
    denoiser: Any = model
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    with StandIn(model, calls):
        denoiser(1)
        denoiser.forward(1)
    assert calls == [((2,), {}), ((1,), {})]
    assert seen == [((2,), "prediction")]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_denoiser_is_put_back_exactly(own: bool, fails: bool) -> None:
    model = residual()
    if own:
        model.forward = model.forward  # type: ignore[method-assign]
        vars(model)["_compiled_call_impl"] = model._call_impl
        vars(model)["last"] = 1
    before = dict(vars(model))
    try:
        with StandIn(model, Calls(), lambda: pytest.fail("copied")):
            assert vars(model) != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert list(vars(model)) == list(before)
    assert all(vars(model)[name] is value for name, value in before.items())


def test_it_is_itself_where_an_evaluation_is_captured() -> None:
    model, calls = residual(), Calls()
    denoiser: Any = model
    stand_in = StandIn(model, calls)
    with stand_in:
        with stand_in.put_away():
            assert "forward" not in vars(model)
            assert isinstance(denoiser(draw(3, 4), torch.ones(3)), torch.Tensor)
        assert denoiser() == "prediction"


def test_a_forward_that_the_loop_puts_around_it_stays_and_is_no_part_of_an_evaluation() -> None:
    model, calls = residual(), Calls()
    denoiser: Any = model
    stand_in = StandIn(model, calls)
    with stand_in:
        inner = denoiser.forward
        denoiser.forward = lambda *args: [inner(*args)]
        assert denoiser(1) == ["prediction"]
        with stand_in.put_away():
            assert "forward" not in vars(model)
        assert denoiser(1) == ["prediction"]
    (result,) = denoiser(draw(3, 4), torch.ones(3))
    del denoiser.forward
    assert torch.equal(result, model(draw(3, 4), torch.ones(3)))


def test_a_copy_asks_first() -> None:
    def refuse() -> NoReturn:
        raise KeyError("copied")

    model = residual()
    with StandIn(model, Calls(), refuse):
        for copies in (copy.copy, copy.deepcopy):
            with pytest.raises(KeyError, match="copied"):
                copies(model)
    assert copy.deepcopy(model) is not model


def test_without_its_hooks_a_module_runs_its_forward_only() -> None:
    model = residual()
    wanted = model(draw(3, 4), at(draw(3, 4), 1))
    model.register_forward_hook(lambda module, args, output: output + 1)
    vars(model)["_compiled_call_impl"] = lambda *args: None
    before = dict(vars(model))
    with without_hooks_of(model):
        assert torch.equal(nn.Module.__call__(model, draw(3, 4), at(draw(3, 4), 1)), wanted)
    assert all(vars(model)[name] is value for name, value in before.items())
