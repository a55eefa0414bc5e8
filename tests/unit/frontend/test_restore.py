"""What a denoiser stores in a call does not outlive its capture."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import CaptureError
from tests.tiny import at, draw, steps

pytestmark = pytest.mark.usefixtures("captured_anew")


@functools.lru_cache(maxsize=8)
def bounded_table(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size)


@functools.cache
def unbounded_table(size: int) -> tuple[Tensor, int]:
    return torch.linspace(1.5, 2.5, size), size


class Tables(nn.Module):
    """A denoiser that keeps in many places what it makes in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.table: Tensor | None = None
        self.listed: list[Tensor] = []
        self.by_size: dict[str, dict[int, Tensor]] = {"tables": {}}
        self.num_calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.num_calls += 1
        if self.table is None:
            self.table = torch.linspace(0.0, 1.0, 4)
        if not self.listed:
            self.listed.append(torch.linspace(1.0, 2.0, 4))
        nested = self.by_size["tables"].setdefault(4, torch.linspace(2.0, 3.0, 4))
        self.latest = x
        tables = self.table + self.listed[0] + nested + bounded_table(4) + unbounded_table(4)[0]
        result: Tensor = self.a(x) * tables + t[:, None]
        return result


@pytest.fixture(autouse=True)
def _empty_caches() -> None:
    bounded_table.cache_clear()
    unbounded_table.cache_clear()


def test_tables_that_are_made_in_the_first_call_stay_the_models_own() -> None:
    torch.manual_seed(0)
    model, noise = Tables().eval(), draw(2, 4)
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    sampler = l2c_compile(model, CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    sampler.capture(noise)
    assert bounded_table.cache_info().currsize == unbounded_table.cache_info().currsize == 0
    got = sampler(noise)
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before
    assert (model.table, model.listed, model.by_size, model.num_calls) == (None, [], {"tables": {}}, 0)
    # A second form is captured on tensors of its own, and eager runs make real tables.
    sampler(draw(3, 4))
    for table in (bounded_table(4), unbounded_table(4)[0]):
        assert not isinstance(table, FakeTensor)
    with torch.no_grad():
        eager = model(noise, at(noise, 0))
    assert not isinstance(eager, FakeTensor)
    assert sampler.verify(noise).holds
    assert torch.equal(sampler(noise), got)


def test_tables_that_are_there_already_are_taken() -> None:
    model, noise = Tables().eval(), draw(2, 4)
    with torch.no_grad():
        model(noise, at(noise, 0))
    table = model.table
    sampler = l2c_compile(model, CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    assert sampler.verify(noise).bitwise
    assert model.table is table


class MakesALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(4, 4)
        result: Tensor = self.late(self.a(x))
        return result


def test_a_layer_that_is_made_in_a_call_is_refused_until_it_was_made() -> None:
    model, noise = MakesALayer().eval(), draw(2, 4)
    sampler = l2c_compile(model, CacheSchedule.all_compute(1), lambda denoiser, x: denoiser(x, at(x, 0)))
    with pytest.raises(CaptureError, match="makes its submodule 'late' in a call; call it once, eagerly"):
        sampler(noise)
    assert not hasattr(model, "late")
    with torch.no_grad():
        model(noise, at(noise, 0))
    assert sampler.verify(noise).bitwise


def test_an_attribute_that_a_failing_call_wrote_is_restored() -> None:
    class Fails(Tables):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            super().forward(x, t)
            raise ValueError("made up")

    model: Any = Fails().eval()
    with pytest.raises(CaptureError, match="made up"):
        l2c_compile(model, CacheSchedule.all_compute(2), steps(2))(draw(2, 4))
    assert (model.table, model.listed, model.num_calls) == (None, [], 0)
    assert not hasattr(model, "latest")


class OfOneKind(dict[str, Any]):
    """A dict that holds itself, and that cannot be made or copied without the kind of its values."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self["self"] = self

    def copy(self) -> OfOneKind:
        raise TypeError("made up")


def test_a_container_that_holds_itself_and_cannot_be_copied_is_restored() -> None:
    class Odd(Tables):
        def __init__(self) -> None:
            super().__init__()
            self.typed = OfOneKind(Tensor)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.typed["x"] = x
            return super().forward(x, t)

    model, noise = Odd().eval(), draw(2, 4)
    typed = model.typed
    sampler = l2c_compile(model, CacheSchedule.all_compute(2), steps(2))
    sampler.capture(noise)
    assert model.typed is typed
    assert typed.keys() == {"self"}
    assert typed["self"] is typed
    assert sampler.verify(noise).holds
