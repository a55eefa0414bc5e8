"""What a loop may return."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2c_compile.errors import CaptureError, LoopTraceError
from l2c_compile.frontend.loop_result import check_holds_no_tensors, consumed


def counts(end: int) -> Generator[int, None, str]:
    yield from range(end)
    return "done"


def test_a_generator_is_run_to_its_end_and_made_anew() -> None:
    leaves, spec = tree_flatten(consumed(counts(3)))
    assert leaves == [0, 1, 2, "done"]
    again = tree_unflatten([4, 5, 6, "end"], spec)
    assert [next(again) for _ in range(3)] == [4, 5, 6]
    with pytest.raises(StopIteration, match="end"):
        next(again)


def test_anything_else_stays() -> None:
    result = [torch.ones(1), {"a": 1}]
    assert consumed(result) is result


async def one() -> int:
    return 1


async def ones() -> AsyncIterator[int]:
    yield 1


def test_an_asynchronous_loop_is_refused() -> None:
    for result in (one(), ones()):
        with pytest.raises(LoopTraceError, match="is asynchronous"):
            consumed(result)


@dataclass
class Box:
    content: object


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(1)


@pytest.mark.parametrize("content", [[fake()], {"a": (fake(),)}, Box([fake()])])
def test_an_object_that_hides_tensors_without_values_is_named(content: object) -> None:
    with pytest.raises(CaptureError, match=r"It returns an object of type Box, .*register_dataclass\(Box\)"):
        check_holds_no_tensors([1, Box(content)], "It returns", CaptureError)


@pytest.mark.parametrize("tree", [[1, None, "a"], Box(torch.ones(1)), Box([1, "a"]), [fake()]])
def test_values_and_tensors_that_torch_sees_are_let_through(tree: object) -> None:
    check_holds_no_tensors(tree, "It returns", CaptureError)
