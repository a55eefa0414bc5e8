"""What an operation returns, derived from the forms of its operands."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from l2c_compile.checking.operators import Inference, bind, flattened, hashable, name_of, on_values, replace_tensors
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.forms import TensorForm

aten = torch.ops.aten
X = TensorForm.of(torch.empty(2, 6))


def test_arguments_are_bound_by_position_and_name_with_their_defaults() -> None:
    assert bind(aten.sum.dim_IntList, (X, [1]), {"keepdim": True}) == (X, (1,), True, None)
    assert bind(aten.add.Tensor, (X,), {"other": X}) == (X, X, 1)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((X,), {}), ((X, X, X), {}), ((X, X), {"nothing": 1}), ((X, X, 1, 1, 1), {})]
)
def test_a_call_that_no_schema_allows_is_an_error(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    with pytest.raises(VerificationError, match=r"add\.Tensor is called with"):
        bind(aten.add.Tensor, args, kwargs)


def inferred(target: torch._ops.OpOverload, *args: object) -> tuple[object, int | None]:
    result = Inference().of(target, bind(target, args, {}))
    return result.forms, result.shares


def test_forms_and_shared_memory_come_from_torch() -> None:
    assert inferred(aten.neg.default, X) == (X, None)
    assert inferred(aten.t.default, X) == (TensorForm.of(torch.empty(2, 6).t()), 0)
    assert inferred(aten.reshape.default, X, [3, 4]) == (TensorForm.of(torch.empty(3, 4)), 0)
    turned = TensorForm.of(torch.empty(6, 2).t())
    assert inferred(aten.reshape.default, turned, [3, 4])[1] is None
    forms, shares = inferred(aten.split.Tensor, X, 4, 1)
    assert [form.shape for form in forms] == [(2, 4), (2, 2)]  # type: ignore[attr-defined]
    assert shares == 0


def test_what_torch_refuses_is_an_error_of_ours() -> None:
    with pytest.raises(VerificationError, match=r"view\.default does not take \(float32\[2, 6\]"):
        inferred(aten.view.default, X, [5, 5])


def test_each_question_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inference, asked = Inference(), []
    ask = Inference._ask
    monkeypatch.setattr(Inference, "_ask", lambda self, *a: asked.append(a) or ask(self, *a))  # type: ignore[func-returns-value]
    for number in (1, 1, 1.0, True):
        inference.of(aten.add.Tensor, bind(aten.add.Tensor, (X, X), {"alpha": number}))
    assert len(asked) == 3


def test_values_take_the_places_of_nodes_also_in_lists() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(aten.cat.default, ([x, y, x], 1))
    args, kwargs = on_values(node, {x: "X", y: "Y"})
    assert (args, kwargs) == ((("X", "Y", "X"), 1), {})
    assert list(flattened(((x, (y,)), 3))) == [x, y]


def test_everything_of_a_type_is_replaced() -> None:
    assert replace_tensors((1, [X, (X,)]), TensorForm, lambda form: form.shape) == (1, ((2, 6), ((2, 6),)))


def test_keys_tell_apart_what_python_calls_equal() -> None:
    assert len({hashable(value) for value in (1, 1.0, True, 0.0, -0.0, "1", (1,), (1.0,))}) == 8
    assert hashable([1, [2.0]]) == hashable((1, (2.0,)))


def test_short_names() -> None:
    assert name_of(aten.add.Tensor) == "add.Tensor"
    assert name_of(len) == "len"
