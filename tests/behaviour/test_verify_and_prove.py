"""``sampler.verify`` and ``sampler.prove``."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.loops import DDIM
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.fuse_cached_residuals import FuseCachedResiduals
from tests.tiny import at, draw, residual, set_passes, steps, tiny_dit

TABLE = {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]}


def spoiled() -> CompiledSampler:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0, 0], "b": [1, 1, 0]}), steps(3))
    sampler.capture(draw(3, 4))
    assert sampler._latest is not None
    value = next(n for n in sampler._latest.graph.graph.nodes if (0, "a", 0) in n.meta.get("sites", ()))
    reader = next(user for user in value.users if user.meta["evaluation"] == 1)
    with sampler._latest.graph.graph.inserting_before(reader):
        twice = sampler._latest.graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
    twice.meta = {"val": value.meta["val"], "evaluation": 1}
    reader.replace_input_with(value, twice)
    sampler._latest.run.recompile()  # type: ignore[attr-defined]
    return sampler


def test_the_report_of_a_wrong_graph_has_every_site_that_differs() -> None:
    report = spoiled().verify(draw(3, 4))
    assert not report.holds
    assert not report.bitwise
    assert [(d.evaluation, d.site) for d in report.differences] == [(1, "b")]
    assert report.first_difference is report.differences[0]
    assert report.first_difference.relative_error > 0
    (finding,) = [f for f in report.proof.findings if f.check == "values"]
    assert finding.evaluation == 1
    assert "site 'a' of evaluation 0" in finding.message
    assert "not proven" in str(report)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["proof"]["findings"][0]["check"] == "values"
    assert document["differences"][0]["site"] == "b"


def test_the_graph_that_is_proven_is_the_one_that_runs() -> None:
    proof = spoiled().prove(draw(3, 4))
    assert not proof.holds
    assert {finding.check for finding in proof.findings} >= {"values"}


def test_a_report_is_json_whatever_the_numbers_are() -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    report = sampler.verify(torch.full((3, 4), float("nan")))
    assert report.holds
    report = replace(report, bitwise=False, max_error=math.inf, relative_error=math.inf)
    assert not report.holds
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (document["holds"], document["max_error"]) == (False, None)


@pytest.mark.parametrize("cache_format", [None, "int8"])
def test_kernels_and_packed_caches_are_named_and_what_is_before_them_is_proven(
    cache_format: Any,  # noqa: ANN401 - a literal
) -> None:
    sampler = l2c_compile(
        tiny_dit(), CacheSchedule.from_table(TABLE), DDIM(2), numerics="rounding", caches=cache_format
    )
    fused = FuseCachedResiduals(devices=frozenset({"cpu"}))
    passes = sampler.options.passes
    fusing = tuple(fused if each.name == fused.name else each for each in passes.passes)
    set_passes(sampler, Pipeline(fusing, passes.assumes))
    noise, y = draw(1, 4, 4, 4), torch.tensor([1])
    report = sampler.verify(noise, y=y)
    names = (fused.name,) if cache_format is None else (fused.name, "pack-caches")
    assert report.proof.not_covered == names
    assert report.holds, str(report.proof)
    assert f"structure proven up to rounding, before {' and '.join(names)}:" in str(report.proof)
    plain = l2c_compile(tiny_dit(), CacheSchedule.from_table(TABLE), DDIM(2), numerics="rounding")
    assert plain.prove(noise, y=y).not_covered == ()


def test_prove_samples_nothing() -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    proof = sampler.prove(draw(3, 4))
    assert proof.holds
    assert sampler._latest is None


def test_a_trace_is_taken_once_and_by_a_copy_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, noise = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2)), draw(2, 4)
    traced: list[str] = []
    sampler._progress = lambda what: traced.append(what) if what == "trace the loop" else None
    assert sampler.verify(noise).holds
    assert sampler.prove(noise).holds
    assert len(traced) == 1
    assert copy.copy(sampler).prove(noise).holds
    assert len(traced) == 2
    sampler.predict(noise)
    assert len(traced) == 3


def test_a_weight_that_the_loop_reads_may_be_assigned_anew() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(2):
            x = (x - denoiser(x, at(x, i))) @ denoiser.a.weight
        return x

    model, noise = residual(), draw(2, 4)
    sampler = l2c_compile(model, CacheSchedule.from_table({"a": [1, 0]}), loop)
    sampler(noise)
    model.a.weight = nn.Parameter(model.a.weight * 2)
    report = sampler.verify(noise)
    assert report.holds, str(report)
