"""What a file may call: the list holds what compiled samplers call, and nothing that crashed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile, load
from l2c_compile.errors import SaveError
from l2c_compile.sampler_file.allowed_operators import ALLOWED, initialised, name_of, operator_named, why_refused
from tests.root import ROOT
from tests.saved_samplers import refused, with_lines

aten = torch.ops.aten

CRASHED = (
    {"op": "aten::max_pool2d_with_indices_backward", "args": ["%0", "%0", [2, 2], [2, 2], [0, 0], [1, 1], False, "%1"]},
    {"op": "aten::max_pool3d_with_indices_backward", "args": ["%0", "%0", [2], [2], [0], [1], False, "%1"]},
    {"op": "aten::adaptive_max_pool2d_backward", "args": ["%0", "%0", "%1"]},
    {"op": "aten::segment_reduce", "args": ["%0", {"str": "sum"}], "kwargs": {"lengths": "%1", "unsafe": True}},
    {"op": "aten::_segment_reduce_backward", "args": ["%0", "%0", "%0", {"str": "sum"}], "kwargs": {"lengths": "%1"}},
    {"op": "aten::_convert_indices_from_coo_to_csr", "args": ["%1", 2**40]},
    {"op": "aten::_reshape_alias", "args": ["%0", [2**30], [1]]},
    {"op": "aten::empty_strided", "args": [[4], [1]]},
    {"op": "aten::to.prim_dtype", "args": ["%0", -1]},
    {"op": "aten::sum", "args": ["%0"], "kwargs": {"dtype": -1}},
    {"op": "aten::rand", "args": [[4]], "kwargs": {"dtype": 77}},
    {"op": "aten::clone", "args": ["%0"], "kwargs": {"memory_format": -1}},
    {"op": "aten::special_chebyshev_polynomial_t.n_scalar", "args": ["%0", 2**60]},
    {"op": "aten::div.Scalar_mode", "args": ["%1", -1], "kwargs": {"rounding_mode": {"str": "trunc"}}},
)
"""Calls that ended the process, returned its memory or did not return, when the file was loaded or called."""


def test_what_crashed_is_refused(saved: Path, tmp_path: Path) -> None:
    # In a process of its own, because a call that is let through ends it.
    paths = [str(with_lines(saved, tmp_path / f"{n}.pt2", line)) for n, line in enumerate(CRASHED)]
    code = """
import sys, torch, l2c_compile
from l2c_compile.errors import FileFormatError
for path in sys.argv[1:]:
    try:
        l2c_compile.load(path)(torch.zeros(2, 6), y=torch.zeros(2, dtype=torch.int64), scale=0.5)
    except FileFormatError as error:
        print("refused", error)
    else:
        print("ran", path)
"""
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * len(CRASHED), done.stdout


def test_every_name_is_an_operator_that_a_file_may_call() -> None:
    for name in ALLOWED:
        namespace, base = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), base)
        assert any(why_refused(getattr(packet, overload)) is None for overload in packet.overloads()), name


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (aten.add_.Tensor, "writes into an argument"),
        (aten.from_file.default, "touches files"),
        (aten.item.default, "fixed number of tensors"),
        (aten.to.prim_dtype, "any number for a dtype"),
        (aten.embedding_bag.default, "none of the operators"),
        (torch.ops.prims.where.default, "none of the operators"),
        (torch.ops.l2c.site.default, "none of the operators"),
        (len, "no operator of torch"),
    ],
)
def test_the_reason_is_the_first_that_holds(target: object, reason: str) -> None:
    assert reason in str(why_refused(target))


def test_names_are_those_of_torch() -> None:
    assert operator_named("aten::add.Tensor") is aten.add.Tensor
    assert name_of(aten.neg.default) == "aten::neg"
    for name in ("aten::add.nothing", "aten::__class__", "os::system", "aten.add", None, "aten::add.Tensor\n"):
        assert operator_named(name) is None


class Calls(nn.Module):
    """A denoiser that calls one function of a part of it."""

    class Part(nn.Module):
        def __init__(self, function: object) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.function(x)  # type: ignore[operator]
            return result

    def __init__(self, function: object) -> None:
        super().__init__()
        self.part = self.Part(function)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x)
        return result


def saved_calling(path: Path, function: object) -> None:
    sampler = l2c_compile(Calls(function), CacheSchedule.all_compute(1), lambda denoiser, noise: denoiser(noise))
    sampler.save(path, torch.rand(2, 3))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.segment_reduce(x, "sum", lengths=torch.ones(2, dtype=torch.int64)), "aten::segment_reduce"),
        (lambda x: torch.histc(x, 4), "aten::histc"),
        (lambda x: torch.div(x.long(), x.long() + 2, rounding_mode="trunc"), "aten::div.Tensor_mode"),
        (lambda x: torch.searchsorted(x, x, sorter=x.argsort()), "aten::searchsorted.Tensor"),
    ],
)
def test_what_load_would_refuse_is_refused_when_it_is_saved(function: object, name: str, tmp_path: Path) -> None:
    with pytest.raises(
        SaveError, match=rf"{name} in module 'part' in evaluation 0 cannot be.*keep the sampler in Python"
    ):
        saved_calling(tmp_path / "x.pt2", function)
    assert list(tmp_path.iterdir()) == []


def test_memory_without_values_is_read_as_zeros(saved: Path, tmp_path: Path) -> None:
    assert initialised(aten.empty_like.default) is aten.zeros_like.default
    assert initialised(aten.neg.default) is aten.neg.default
    for number, line in enumerate(
        (
            {"op": "aten::empty.memory_format", "args": [[3, 4]], "kwargs": {"dtype": {"dtype": "float32"}}},
            {"op": "aten::empty_like", "args": ["%0"]},
            {"op": "aten::new_empty", "args": ["%0", [5]]},
        )
    ):
        sampler = load(with_lines(saved, tmp_path / f"{number}.pt2", line))
        result = sampler(torch.ones(2, 6), y=torch.zeros(2, dtype=torch.int64), scale=0.5)
        assert not result["added"].any()


def test_memory_without_values_and_with_other_strides_is_refused(saved: Path, tmp_path: Path) -> None:
    line = {"op": "aten::empty.memory_format", "args": [[1, 2, 3, 4]]}
    line["kwargs"] = {"memory_format": {"memory_format": "channels_last"}}  # type: ignore[assignment]
    refused(with_lines(saved, tmp_path / "x.pt2", line), "does not take")


@pytest.mark.parametrize(
    "value", [{"dtype": "quint8"}, {"dtype": "uint4"}, {"layout": "sparse_coo"}, {"memory_format": "none"}]
)
def test_dtypes_and_layouts_that_kernels_believe_are_refused(
    saved: Path, tmp_path: Path, value: dict[str, str]
) -> None:
    line = {"op": "aten::zeros", "args": [[4]], "kwargs": {next(iter(value)): value}}
    refused(with_lines(saved, tmp_path / "x.pt2", line), "no known form")
