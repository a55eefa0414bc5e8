"""One evaluation as a functional graph that knows its sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_flatten

from l2c_compile import CacheSchedule, L2CError, l2c_compile, run_reference
from l2c_compile.errors import CaptureError, PassFailed, UnknownSiteError, VerificationError
from l2c_compile.frontend.capture import capture
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.forms import CallSignature, StaticValue, TensorForm
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, site_marks
from l2c_compile.schedules.sites import Site
from tests.tiny import Residual, at, check_equals_reference, draw, residual, run, same_bits, seeded, steps


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


class Calling(nn.Module):
    """A denoiser whose output is what a function makes of it and of its inputs."""

    def __init__(self, function: Callable[..., Tensor], part: nn.Module | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.part = part
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(self, self.a(x), t)


def refused(model: nn.Module, *sites: str) -> str:
    sampler = l2c_compile(seeded(model), CacheSchedule.all_compute(2, sites), steps(2))
    with pytest.raises(L2CError) as raised:
        sampler(draw(3, 4))
    assert not isinstance(raised.value, PassFailed)
    return str(raised.value)


class TestWhatUsersGive:
    def test_branches_and_loops_of_torch_are_refused(self) -> None:
        model = Calling(lambda _, y, t: torch.cond(t.sum() > 3, torch.sin, torch.cos, (y,)))
        assert "Calling calls cond in its own forward" in refused(model)

    def test_values_read_into_python_are_refused(self) -> None:
        assert "reads a value of a tensor into Python (aten.item" in refused(
            Calling(lambda _, y, t: y * t.max().item())
        )
        assert "reads a value of a tensor" in refused(Calling(lambda _, y, t: y * (y > 0).nonzero().shape[0]))

    @pytest.mark.parametrize("function", [torch.quantile, torch.nanquantile])
    def test_a_quantile_is_captured(self, function: Callable[..., Tensor]) -> None:
        model = seeded(Calling(lambda _, y, t: y / function(y.abs(), 0.9, dim=1, keepdim=True)))
        check_equals_reference(model, CacheSchedule.from_table({"a": [1, 0]}), steps(2), draw(3, 4))

    def test_a_result_whose_size_depends_on_values_is_captured_and_not_proven(self) -> None:
        sampler = l2c_compile(
            seeded(Calling(lambda _, y, t: y + y[y > 0].sum())), CacheSchedule.from_table({"a": [1, 0]}), steps(2)
        )
        wanted = run_reference(sampler.model, steps(2), sampler.schedule, draw(3, 4), {})
        assert same_bits(sampler(draw(3, 4)), wanted)
        with pytest.raises(VerificationError, match="whose size depends on values, which no proof follows"):
            sampler.verify(draw(3, 4))

    def test_a_weight_that_holds_several_tensors_is_refused(self) -> None:
        model = Calling(lambda _, y, t: y)
        message = "weight 'a.weight' of Calling is a TwoTensor, which is no plain tensor"
        model.eval()
        pair: Any = TwoTensor
        model.a.weight = nn.Parameter(pair(torch.ones(4, 4), torch.ones(4, 4)))
        with pytest.raises(CaptureError, match=message):
            l2c_compile(model, CacheSchedule.all_compute(2), steps(2))(draw(3, 4))

    def test_scripted_modules_are_refused_and_traced_ones_are_captured(self) -> None:
        part = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        scripted = Calling(lambda self, y, t: self.part(y), torch.jit.script(part))
        assert "module 'part' is made by torch.jit" in refused(scripted)
        jit: Any = torch.jit
        traced = Calling(lambda self, y, t: self.part(y), jit.trace(part, draw(3, 4)))
        check_equals_reference(traced.eval(), CacheSchedule.from_table({"a": [1, 0]}), steps(2), draw(3, 4))
        for model in (scripted, traced):
            with pytest.raises(UnknownSiteError, match="site 'part': module 'part' is TorchScript"):
                l2c_compile(model, CacheSchedule.from_table({"part": [1, 0]}), steps(2))
            with pytest.raises(UnknownSiteError, match="site 'part': the module is TorchScript"):
                run_reference(model, steps(2), CacheSchedule.from_table({"part": [1, 0]}), draw(3, 4), {})

    def test_a_site_under_inference_mode_is_refused(self) -> None:
        def inferred(self: Calling, y: Tensor, t: Tensor) -> Tensor:
            with torch.inference_mode():
                assert self.part is not None
                return torch.as_tensor(self.part(y))

        assert "site 'part': its value is made under torch.inference_mode" in refused(
            Calling(inferred, nn.Linear(4, 4)), "part"
        )

    def test_another_name_of_a_shared_module_is_said_to_be_one(self) -> None:
        model = Calling(lambda self, y, t: self.part(y))
        model.part = model.a
        with pytest.raises(UnknownSiteError, match="site 'part': module 'part' is module 'a' under another name"):
            l2c_compile(model, CacheSchedule.all_compute(2, ["part"]), steps(2))

    def test_a_run_is_not_cut_where_its_first_module_is_not_called(self) -> None:
        model = Calling(lambda self, y, t: self.part[1](y), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        assert "'part.1' is called without a call of 'part.0' before it" in refused(model, "delta(part.0..part.1)")

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_a_recurrent_layer_draws_only_where_it_drops(self, kind: type[nn.Module]) -> None:
        dropping = kind(4, 4, num_layers=2, dropout=0.5)
        assert "draws random numbers" in refused(Training(dropping))
        for part in (kind(4, 4), kind(4, 4, num_layers=2), nn.Dropout(0.0)):
            model = seeded(Training(part))
            check_equals_reference(model, CacheSchedule.from_table({"a": [1, 0]}), steps(2), draw(3, 4))


class Training(Calling):
    """A denoiser with a part that stays in training mode."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(_first_result, part)

    def train(self, mode: bool = True) -> Training:
        super().train(mode)
        assert self.part is not None
        self.part.train()
        return self


def _first_result(self: Calling, y: Tensor, t: Tensor) -> Tensor:
    assert self.part is not None
    result = self.part(y)
    return torch.as_tensor(result[0] if isinstance(result, tuple) else result)
