"""A snapshot holds while nothing changed, says what did, and is put back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2c_compile.state.python_state import PythonState

LIMIT = 3
TABLES: dict[str, int] = {}


class Net(nn.Module):
    kinds = ["a"]  # noqa: RUF012 - a list that all instances share

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.scale, self.name, self.flag = 1.0, "net", True
        self.sizes, self.config = [1, 2], SimpleNamespace(eps=0.1)
        self.table, self.array = torch.zeros(2), np.zeros(3)
        self.pair, self.ticks = (1, None), itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale  # type: ignore[no-any-return]


def loop(denoiser: Any, x: Tensor, steps: int = 2) -> Tensor:  # noqa: ANN401
    for _ in range(min(steps, LIMIT) + len(TABLES)):
        x = denoiser(x)
    return x


@pytest.fixture
def net() -> Net:
    return Net()


def state_of(net: Net) -> PythonState:
    return PythonState({"denoiser": net, "loop": loop})


class Other(Net):
    pass


CHANGES: dict[str, tuple[Callable[[Net], object], str]] = {
    "a number": (lambda n: setattr(n, "scale", 2.0), "'denoiser.scale' was 1.0 and is 2.0"),
    "an equal number of another type": (lambda n: setattr(n, "scale", 1), "'denoiser.scale' was 1.0 and is 1"),
    "the sign of a zero": (lambda n: n.config.__dict__.update(eps=-0.0), "'denoiser.config.eps' was 0.1 and is -0.0"),
    "a text": (lambda n: setattr(n, "name", "x"), "'denoiser.name' was 'net' and is 'x'"),
    "an attribute that goes": (lambda n: delattr(n, "name"), "'denoiser.name' was 'net' and is gone"),
    "a new attribute": (lambda n: setattr(n, "late", 1), "'denoiser.late' is new (1)"),
    "a list that grows": (lambda n: n.sizes.append(3), "'denoiser.sizes[2]' is new (3)"),
    "an element of a list": (lambda n: n.sizes.__setitem__(0, True), "'denoiser.sizes[0]' was 1 and is True"),
    "another tuple": (lambda n: setattr(n, "pair", (2, None)), "'denoiser.pair' was (1, None) and is (2, None)"),
    "a tensor in place": (lambda n: n.table.add_(1), "'denoiser.table' was written to"),
    "another tensor": (lambda n: setattr(n, "table", torch.zeros(2)), "'denoiser.table' was written to"),
    "an array in place": (lambda n: n.array.fill(1), "'denoiser.array.elements' was written to"),
    "an iterator": (lambda n: next(n.ticks), "'denoiser.ticks.position' was written to"),
    "a submodule": (lambda n: setattr(n, "a", nn.Identity()), "'denoiser.a' was a Linear and is a Identity"),
    "the class of a submodule": (
        lambda n: setattr(n, "__class__", Other),
        "'denoiser.__class__' was Net and is Other",
    ),
    "a hook": (lambda n: n.a.register_forward_hook(lambda *_: None), "_forward_hooks"),
    "a forward": (lambda n: setattr(n.a, "forward", n.b.forward), "'denoiser.a.forward' is new"),
    "the mode": (lambda n: n.a.eval(), "'denoiser.a.training' was True and is False"),
    "a list of the class": (lambda n: n.kinds.append("b"), "'class Net.kinds[1]' is new ('b')"),
    "the form of a weight": (lambda n: setattr(n.a, "weight", nn.Parameter(torch.ones(3, 2))), "'denoiser.a.weight'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_named_and_put_back(net: Net, change: str) -> None:
    state = state_of(net)
    assert state.holds()
    assert state.is_untouched()
    do, message = CHANGES[change]
    try:
        do(net)
        assert not state.holds()
        assert not state.is_untouched()
        assert message in "; ".join(map(str, state.changes()))
    finally:
        state.restore()
    if change not in ("a tensor in place", "an array in place", "an iterator", "the class of a submodule"):
        assert state.holds()


def test_a_global_that_the_loop_names_is_seen_and_put_back(monkeypatch: pytest.MonkeyPatch, net: Net) -> None:
    state = state_of(net)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert [str(change) for change in state.changes()] == ["'global LIMIT' was 3 and is 4"]
    state.restore()
    assert LIMIT == 3
    TABLES["new"] = 1
    assert not state.holds()
    state.restore()
    assert TABLES == {}


def test_a_closure_and_defaults_are_seen(net: Net) -> None:
    factor = 2.0

    def closed(denoiser: Any, x: Tensor, power: int = 1) -> Tensor:  # noqa: ANN401
        return denoiser(x) * factor**power  # type: ignore[no-any-return]

    state = PythonState({"denoiser": net, "loop": closed})
    factor = 3.0
    assert [str(change) for change in state.changes()] == ["'loop's factor' was 2.0 and is 3.0"]
    state.restore()
    assert factor == 2.0
    closed.__defaults__ = (2,)
    assert not state.holds()
    assert [change.path for change in state.changes()] == ["loop.__code__"]


def test_a_class_is_put_back(net: Net) -> None:
    state, forward = state_of(net), Net.forward
    try:
        Net.forward = lambda self, x: x  # type: ignore[method-assign]
        Net.extra = 1  # type: ignore[attr-defined]
        assert not state.holds()
        state.restore()
        assert Net.forward is forward
        assert not hasattr(Net, "extra")
    finally:
        Net.forward = forward  # type: ignore[method-assign]


def test_equal_values_in_other_objects_change_nothing(net: Net) -> None:
    state = state_of(net)
    net.scale, net.sizes = float("1"), [1, 2]
    net.a.weight = nn.Parameter(torch.ones(2, 2))
    assert not state.holds()
    assert state.changes() == []


def test_weights_of_the_denoiser_may_be_written_to(net: Net) -> None:
    state = state_of(net)
    with torch.no_grad():
        net.a.weight.add_(1)
    assert state.holds()


def test_what_lies_in_something_new_is_not_named_again(net: Net) -> None:
    state = state_of(net)
    vars(net)["late"] = {"a": [1, 2], "b": nn.Linear(2, 2)}
    assert [change.path for change in state.changes()] == ["denoiser.late"]


def test_a_state_is_installed_with_other_values_in_place_of_some(net: Net) -> None:
    table = net.table
    net.scale = 5.0
    later = state_of(net)
    net.scale, net.table = 1.0, torch.ones(2)
    substitute = torch.full((2,), 7.0)
    later.install({id(table): substitute}, {"denoiser.scale": 6.0})
    assert net.table is substitute
    assert net.scale == 6.0
    assert later.numbers()["denoiser.scale"] == 5.0


def test_tensors_that_came_since_are_found_by_their_paths(net: Net) -> None:
    before = state_of(net)
    net.latest, net.sizes[0] = torch.ones(1), torch.ones(2)  # type: ignore[call-overload]
    assert state_of(net).tensors_not_in(before).keys() == {"denoiser.latest", "denoiser.sizes[0]"}


def test_an_object_that_cannot_be_compared_is_compared_by_identity(net: Net) -> None:
    class Stubborn:
        def __eq__(self, other: object) -> bool:
            raise ValueError("no")

        __hash__ = object.__hash__

    vars(net)["stubborn"] = Stubborn()
    state = state_of(net)
    assert state.holds()
    vars(net)["stubborn"] = Stubborn()
    assert not state.holds()
    assert [change.path for change in state.changes()] == ["denoiser.stubborn"]
