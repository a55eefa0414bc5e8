"""Graphs corrupted on purpose: the structural proof catches every one, and takes no right graph for wrong."""

from __future__ import annotations

from functools import cache

import pytest

from bench.trust.mutations import MUTATIONS, PIPELINES, NotApplicable, Outcome, Subject, dit, outcome

# What only shows where sites' values are still read one by one, and what only passes that round make.
NEEDS_SITES = 25
NEEDS_ROUNDING = 6

SUBJECTS = {make.__name__: make for make, _ in MUTATIONS}
EACH = [
    (pipeline, make.__name__, name) for pipeline in PIPELINES for make, mutations in MUTATIONS for name in mutations
]


@cache
def subject(make: str, pipeline: str) -> Subject:
    return SUBJECTS[make](pipeline)


@cache
def judged(make: str, pipeline: str, name: str) -> Outcome | None:
    (mutations,) = [each for maker, each in MUTATIONS if maker.__name__ == make]
    try:
        return outcome(subject(make, pipeline), mutations[name])
    except NotApplicable:
        return None


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("make", SUBJECTS)
def test_the_right_graph_is_proven(make: str, pipeline: str) -> None:
    right = subject(make, pipeline)
    proof = right.prove(right.graph)
    assert proof.holds, str(proof)


@pytest.mark.parametrize(("pipeline", "make", "name"), EACH, ids="-".join)
def test_a_corrupted_graph_is_caught(pipeline: str, make: str, name: str) -> None:
    result = judged(make, pipeline, name)
    if result is None:
        pytest.skip("this graph has nothing to corrupt in this way")
    assert result.structure, f"max error {result.max_error:.3g}"
    assert result.message


def test_hardly_a_mutation_is_skipped() -> None:
    applied = {(p, name): judged(make, p, name) is not None for p, make, name in EACH}
    for _, name in applied:
        assert any(applied[pipeline, name] for pipeline in PIPELINES), name
    counts = {pipeline: sum(on for (p, _), on in applied.items() if p == pipeline) for pipeline in PIPELINES}
    total = len(applied) // 2
    assert counts["bitwise"] >= total - NEEDS_ROUNDING
    assert counts["rounding"] >= total - NEEDS_SITES


def test_numbers_alone_miss_some_of_them() -> None:
    """What a comparison on one random input cannot see: wasted work, memory, notes, and errors below its tolerance."""
    results = {name: judged(make, pipeline, name) for pipeline, make, name in EACH if pipeline == "bitwise"}
    missed = {name for name, result in results.items() if result is not None and not result.numeric}
    assert missed >= {
        "skipped site computed for nobody",
        "value computed again for its reader",
        "evaluation repeated for nobody",
        "gate off by one unit in the last place",
        "read off by one unit in the last place",
        "loop coefficient changed by 1e-9",
        "note of another site",
        "freed early",
        "freed late",
        "one slot for all",
    }


def test_the_message_says_what_is_read_and_what_should_be() -> None:
    result = judged("dit", "bitwise", "wrong source: the evaluation before")
    assert result is not None
    assert result.structure == "values"
    assert "of evaluation 2 in 'blocks.0'" in result.message
    assert "computes mul.Tensor of site 'blocks.0.attn' of evaluation 0" in result.message
    assert "where the loop has site 'blocks.0.attn' of evaluation 1" in result.message


def test_each_proof_judges_its_own_graph_only() -> None:
    """Two builds of one subject are two graphs of one loop: the skeleton of one proves the other."""
    one, other = subject("dit", "bitwise"), dit("bitwise")
    assert other.prove(one.graph.copy()).findings  # other weights: they count by identity
    assert one.prove(one.graph.copy()).holds
