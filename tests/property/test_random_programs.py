"""Random programs: denoisers, loops, schedules and passes that nobody wrote equal the reference once compiled.

A bounded slice, the same draws on every machine; ``python -m bench fuzz`` goes on from here for as long as one likes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from bench.trust.programs.checking import Checker, Mismatch, Outcome, Program, draw_programs, evaluations_of
from bench.trust.programs.denoisers import build_denoiser, draw_denoiser
from bench.trust.programs.shrinking import failure_of, minimise
from l2c_compile.graphs.marks import CacheRead
from l2c_compile.passes import lower_cache_reads, merge_common
from l2c_compile.passes.pipeline import BITWISE, LOOP

_PROGRAMS_PER_DENOISER = 5


@given(st.randoms(use_true_random=False))
@settings(max_examples=max(1, settings().max_examples // 4))
def test_a_random_program_equals_the_reference(rng: random.Random) -> None:
    programs = list(islice(draw_programs(rng), _PROGRAMS_PER_DENOISER))
    checker = Checker(programs[0].denoiser)
    for program in programs:
        checker.check(program)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_program_through_dynamo_equals_the_reference(seed: int) -> None:
    program = next(p for p in draw_programs(random.Random(seed)) if p.entries)
    Checker(program.denoiser).check_through_dynamo(program)


@pytest.mark.slow(reason="six programs go through Dynamo; without Dynamo this is tested quickly")
def test_a_graph_that_reads_the_wrong_value_through_dynamo_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_cache_reads, "_lower", lower_wrongly)
    found = 0
    for seed in range(6):
        program = next(p for p in draw_programs(random.Random(seed)) if p.entries)
        found += failure_of(program, Checker.check_through_dynamo).startswith("Mismatch: through Dynamo")
    assert found >= 2


@pytest.mark.slow(reason="eight programs of four denoisers, only to count")
def test_few_programs_are_refused() -> None:
    refused = []
    for seed in range(4):
        programs = list(islice(draw_programs(random.Random(seed)), 2))
        checker = Checker(programs[0].denoiser)
        refused += [bool(checker.check(program).refused) for program in programs]
    assert sum(refused) <= 1


def test_a_program_comes_back_from_its_line() -> None:
    for program in islice(draw_programs(random.Random(1)), 8):
        again = Program.from_json(program.to_json())
        assert again == program
        assert "\n" not in program.to_json()
        assert again.key == program.key


def test_a_seed_draws_the_same_programs_each_time() -> None:
    first, second = ([p.to_json() for p in draw_programs(random.Random(4))] for _ in range(2))
    assert first == second
    # The schedule that reuses nothing may come more than once.
    assert len(set(first)) > len(first) // 2


def test_a_denoiser_is_its_description() -> None:
    description = draw_denoiser(random.Random(2))
    one, other = (build_denoiser(json.loads(json.dumps(description))) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_sublayer_that_writes_into_an_expanded_stream_is_one_that_torch_runs() -> None:
    assert next(draw_programs(random.Random(200_006))).denoiser["blocks"]


def test_the_draws_cover_what_they_are_for() -> None:
    programs = [program for seed in range(60) for program in draw_programs(random.Random(seed))]
    text = [program.to_json() for program in programs]
    wanted = ("unet", "patches", '"joint": true', '"twice": true', "pair with the input", "bfloat16", "separate")
    for word in (*wanted, "heun", "doubled", "multistep", "ancestral", "delta(", "..", "@1", "test follow input"):
        assert any(word in line for line in text), word
    ages = {entry["evaluation"] - source for p in programs for entry in p.entries for source in entry["sources"]}
    assert ages >= {1, 2, 3, 4}
    assert {name for program in programs for names in program.pipelines for name in names} == {
        each.name for each in LOOP.passes
    }


def wrong_source(node: fx.Node) -> None:
    """Read something else than the site held."""
    with node.graph.inserting_after(node):
        twice = node.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0 + 1e-6))
    twice.meta = dict(node.meta)
    node.replace_all_uses_with(twice)
    twice.update_arg(0, node)


_LOWER: Callable[..., None] = lower_cache_reads._lower


def lower_wrongly(graph: fx.Graph, read: CacheRead) -> None:
    wrong_source(read.node)
    _LOWER(graph, read)


def test_reads_that_are_slightly_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [next(p for p in draw_programs(random.Random(seed)) if p.entries) for seed in range(5)]
    monkeypatch.setattr(lower_cache_reads, "_lower", lower_wrongly)
    found = [program for program in programs if failure_of(program).startswith("Mismatch")]
    # A site may be one that nothing depends on.
    assert len(found) >= 3


def test_a_program_that_fails_is_made_as_small_as_its_failure_allows() -> None:
    program = max(draw_programs(random.Random(0)), key=lambda p: len(p.entries))

    def reuses(checker: Checker, candidate: Program) -> Outcome:
        if candidate.entries:
            raise Mismatch("it reuses")
        return Outcome()

    smaller = minimise(program, check=reuses)
    assert failure_of(smaller, reuses) == "Mismatch: it reuses"
    assert len(smaller.entries) == len(smaller.denoiser["blocks"]) == len(smaller.pipelines) == 1
    assert len(smaller.loop["steps"]) < len(program.loop["steps"])


def test_draws_that_are_merged_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = next(draw_programs(random.Random(3)))
    steps = [{"kind": "ancestral", "t": t, "in_place": False} for t in (2, 1)]
    whole = [[each.name for each in BITWISE.passes]]
    program = replace(drawn, loop={**drawn.loop, "steps": steps, "guidance": "none"}, entries=[], pipelines=whole)
    program = replace(program, num_evaluations=evaluations_of(program))
    assert failure_of(program) == ""
    monkeypatch.setattr(merge_common, "draws_random_numbers", lambda node: False)
    assert failure_of(program).startswith("Mismatch")
