"""The orders that the compiler runs."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.passes import pipeline as orders
from l2c_compile.passes.base import Numerics, Pass, Pipeline
from l2c_compile.passes.pipeline import BITWISE, CACHE_FORMATS, KERNELS, LOOP, REGIONS, with_packed_caches
from tests.root import ROOT

PIPELINES = {name: each for name, each in vars(orders).items() if isinstance(each, Pipeline)}
PASSES = {each for pipeline in PIPELINES.values() for each in pipeline.passes}


def test_every_pass_has_its_file_and_a_place_in_an_order() -> None:
    packing = with_packed_caches(LOOP, "int8").passes[-1]
    used: set[Pass] = {*PASSES, packing}
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"base", "pipeline"}
    assert {type(each).__module__.rpartition(".")[2] for each in used} == files
    assert {each.name.replace("-", "_") for each in used} == files


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_needs_what_a_later_pass_gives(name: str) -> None:
    pipeline = PIPELINES[name]
    assert Pipeline(pipeline.passes, pipeline.assumes) == pipeline


def test_what_runs_on_the_finished_graph_assumes_no_more_than_it_is() -> None:
    for finished in (LOOP, BITWISE, *(with_packed_caches(LOOP, each) for each in CACHE_FORMATS)):
        assert KERNELS.assumes <= finished.facts
        assert REGIONS.assumes <= finished.facts


def test_the_bitwise_order_is_the_whole_one_without_what_rounds() -> None:
    assert {each.numerics for each in BITWISE.passes} == {Numerics.BITWISE}
    assert [each for each in LOOP.passes if each.numerics is Numerics.BITWISE] == list(BITWISE.passes)
    assert not LOOP.is_bitwise


@pytest.mark.parametrize(("word", "dtype"), CACHE_FORMATS.items())
def test_caches_are_packed_last(word: str, dtype: torch.dtype) -> None:
    packed = with_packed_caches(BITWISE, word)
    assert packed.passes[:-1] == BITWISE.passes
    assert (packed.passes[-1].name, packed.passes[-1].numerics) == ("pack-caches", Numerics.APPROXIMATE)
    assert dtype in vars(packed.passes[-1]).values()
