"""One evaluation as a functional graph that knows its sites."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l2c_compile.frontend.capture import capture
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.forms import CallSignature, StaticValue, TensorForm
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, site_marks
from l2c_compile.schedules.sites import Site
from tests.tiny import Residual, at, draw, residual, run, same_bits


def signature(*args: object, **kwargs: object) -> CallSignature:
    leaves, spec = tree_flatten((args, kwargs))
    return CallSignature(spec, tuple(TensorForm.of(x) if isinstance(x, Tensor) else StaticValue.of(x) for x in leaves))


def captured(*names: str, read_inputs_of: tuple[str, ...] = ()) -> tuple[Residual, EvaluationGraph]:
    model, x = residual(), draw(3, 4)
    sites = [Site.parse(name) for name in names]
    inputs = [Site.parse(name) for name in read_inputs_of]
    return model, capture(model, signature(x, at(x, 1)), sites, inputs)


def test_the_graph_computes_what_the_denoiser_does() -> None:
    model, graph = captured("a", "delta(b)", "norm")
    x = draw(3, 4)
    with torch.no_grad():
        assert same_bits(run(graph, x, at(x, 1)), [model(x, at(x, 1))])
    check(graph, {Fact.SITES_MARKED})


def test_each_site_is_marked_with_its_port_and_inputs_only_where_wanted() -> None:
    _, graph = captured("a", "delta(b)", "norm", read_inputs_of=("norm",))
    marks = {(mark.site, mark.port) for mark in site_marks(graph.graph)}
    wanted = {("a", 0), ("delta(b)", 0), ("delta(b)", INPUT_PORT), ("norm", 0), ("norm", INPUT_PORT)}
    assert marks == wanted


def test_weights_are_referenced_and_the_denoiser_is_left_as_it_was() -> None:
    model, graph = captured("a")
    weights = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    assert weights == {f"denoiser.{name}" for name, _ in model.named_parameters()}
    assert graph.root.get_parameter("denoiser.a.weight") is model.a.weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not list(graph.root.buffers())


def test_a_capture_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured("a")


def test_static_values_are_told_apart_by_type_and_sign() -> None:
    x = draw(3, 4)
    values = [0, 0.0, -0.0, False, None, "0"]
    assert len({signature(x, at(x, 1), value) for value in values}) == len(values)
    assert len({signature(x, at(x, 1), float("nan")), signature(x, at(x, 1), float("nan"))}) == 1
    assert signature(x, y=1.5).unflatten([x]) == ((x,), {"y": 1.5})


def test_signatures_differ_by_shape_strides_dtype_and_keywords() -> None:
    x = draw(4, 4)
    forms = [signature(x), signature(x.t()), signature(x.double()), signature(x[:3]), signature(x=x), signature(x, x)]
    assert len(set(forms)) == len(forms)
    assert signature(x) == signature(x + 1)


def test_non_tensor_results_are_kept_beside_the_graph() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"x": x + 1, "n": 3, "none": None}

    graph = capture(Mixed(), signature(draw(2)), [])
    assert [leaf for leaf in graph.out_leaves if not isinstance(leaf, Tensor)] == [3, None]
    assert len(run(graph, draw(2))) == 1


@pytest.mark.parametrize("training", [False, True])
def test_dropout_at_rate_zero_is_no_draw(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0 if training else 0.5)).train(training)
    graph = capture(model, signature(draw(3, 4)), [])
    with torch.no_grad():
        assert same_bits(run(graph, draw(3, 4)), [model(draw(3, 4))])
