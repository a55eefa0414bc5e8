"""What a sampler says about its passes."""

from __future__ import annotations

import json

import pytest
import torch

from l2c_compile import CacheSchedule, CompiledSampler, L2CError, l2c_compile
from l2c_compile.passes.pipeline import LOOP
from tests.dit_loops import INPUTS, ROWS, steps_of_dit
from tests.tiny import tiny_dit


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    sampler = l2c_compile(tiny_dit(), CacheSchedule.from_table(ROWS), steps_of_dit(4), numerics="rounding")
    noise, labels = INPUTS
    with torch.no_grad():
        sampler.capture(noise, y=labels)
    return sampler


def test_every_pass_is_listed_with_what_it_did_and_why_not_more(sampler: CompiledSampler) -> None:
    text = str(sampler.explain())
    lines = [line.rstrip() for line in text.splitlines()]
    (first,) = (line.split() for line in lines if line.startswith("read-reused-sites"))
    assert first[1] == "6"
    prune = next(number for number, line in enumerate(lines) if line.startswith("prune-projections"))
    reasons = [line for line in lines[prune + 1 :] if line.startswith("    ")][:2]
    assert any("left alone: every output is used; the first is blocks.0.adaLN" in line for line in reasons), reasons
    assert "evaluation 0" in text
    assert lines[-1].startswith(f"{len(LOOP.passes)} passes: ")


def test_the_explanation_as_json_has_counts_reasons_and_the_first_of_each(sampler: CompiledSampler) -> None:
    explained = json.loads(json.dumps(sampler.explain().to_dict()))["passes"]
    assert [each["name"] for each in explained] == [each.name for each in LOOP.passes]
    assert all(each["seconds"] >= 0 for each in explained)
    assert [each["nodes_after"] for each in explained[:-1]] == [each["nodes_before"] for each in explained[1:]]
    assert explained[0]["rewrites"] == 6
    (prune,) = (each for each in explained if each["name"] == "prune-projections")
    (left,) = (each for each in prune["left_alone"] if each["reason"] == "is used as a whole")
    assert left["count"] > 1
    assert (left["module"].split(".")[0], left["evaluation"]) == ("blocks", 0)


def test_nothing_is_explained_before_something_is_compiled() -> None:
    with pytest.raises(L2CError, match="nothing is compiled yet"):
        l2c_compile(tiny_dit(), CacheSchedule.from_table(ROWS), steps_of_dit(4)).explain()
