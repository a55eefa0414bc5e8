"""A source must hold what the module would return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from l2c_compile import CacheSchedule, Reuse, Site, l2c_compile
from l2c_compile.errors import L2CError, ScheduleError, UnknownSiteError
from tests.tiny import check_equals_reference, draw, seeded


class Returning(nn.Module):
    """A site that returns what a function makes of its value and of the Python number of the evaluation."""

    def __init__(self, returned: Callable[[Tensor, int], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.returned = returned

    def forward(self, x: Tensor, i: int) -> Any:  # noqa: ANN401
        return self.returned(self.inner(x), i)


class Denoiser(nn.Module):
    def __init__(self, returned: Callable[[Tensor, int], Any], used: Callable[..., Any]) -> None:
        super().__init__()
        self.site = Returning(returned)
        self.used = used

    def forward(self, x: Tensor, i: int) -> Tensor:
        result: Tensor = x + self.used(self.site(x, i))
        return result


def loop(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
    for i in range(4):
        x = x - 0.25 * denoiser(x, i)
    return x


def reused(*entries: tuple[int, int], site: str = "site") -> CacheSchedule:
    return CacheSchedule(4, (Site.parse(site),), {(e, Site.parse(site)): Reuse((source,)) for e, source in entries})


def parity(x: Tensor, i: int) -> tuple[Tensor, float]:
    return x, float(i % 2)


def test_a_python_value_that_differs_is_refused() -> None:
    sampler = l2c_compile(seeded(Denoiser(parity, lambda r: r[0] * r[1])), reused((1, 0)), loop)
    with pytest.raises(ScheduleError, match=r"site 'site', evaluation 1: .* value 0\.0 .*and 1\.0 .*return a tensor"):
        sampler(draw(3, 4))


def test_an_equal_python_value_is_reused() -> None:
    check_equals_reference(seeded(Denoiser(parity, lambda r: r[0] * r[1])), reused((2, 0), (3, 1)), loop, draw(3, 4))


def test_another_structure_is_refused() -> None:
    model = seeded(Denoiser(lambda x, i: [x] * (1 + i % 2), sum))
    with pytest.raises(ScheduleError, match=r"returns \[tensor\], and \[tensor, tensor\] where it is reused"):
        l2c_compile(model, reused((1, 0)), loop)(draw(3, 4))
    check_equals_reference(model, reused((2, 0), (3, 1)), loop, draw(3, 4))


@pytest.mark.parametrize("returned", [lambda x, i: None, lambda x, i: 0.5])
def test_a_site_without_a_tensor_is_refused(returned: Callable[[Tensor, int], Any]) -> None:
    model = seeded(Denoiser(returned, lambda r: r or 1.0))
    with pytest.raises(UnknownSiteError, match=r"site 'site': module 'site' returns \w+, in which there is no tensor"):
        l2c_compile(model, reused((1, 0)), loop)(draw(3, 4))


class Alternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(4, 4)
        self.odd = nn.Linear(4, 4)

    def forward(self, x: Tensor, i: int) -> Tensor:
        result: Tensor = self.odd(x) if i % 2 else self.even(x)
        return result


def test_a_site_need_not_be_called_where_it_is_neither_read_nor_reused() -> None:
    model = seeded(Alternating())
    check_equals_reference(model, reused((2, 0), site="even"), loop, draw(3, 4))
    sampler = check_equals_reference(model, reused((3, 1), site="delta(odd)"), loop, draw(3, 4))
    assert str(sampler.predict(draw(3, 4)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((1, 0), r"site 'even', evaluation 1: is reused, but evaluation 1 does not call it .*; compute it"),
        ((2, 1), r"site 'even', evaluation 2: reuses evaluation 1, but evaluation 1 does not call it .*another source"),
    ],
)
def test_a_site_must_be_called_where_it_is_read_or_reused(entry: tuple[int, int], message: str) -> None:
    with pytest.raises(L2CError, match=message):
        l2c_compile(seeded(Alternating()), reused(entry, site="even"), loop)(draw(3, 4))
