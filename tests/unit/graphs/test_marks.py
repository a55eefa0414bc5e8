"""The marker operators: identities and rules that run, with strides and memory of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule
from l2c_compile.graphs.marks import CACHE_READ, SITE, cache_reads, site_marks, strided_copy, write_into
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from l2c_compile.schedules.rules import HOLD
from tests.tiny import draw, residual, same_bits, steps, unrolled

LAYOUTS = {
    "contiguous": draw(3, 4),
    "transposed": draw(4, 3).t(),
    "expanded": draw(3, 1).expand(3, 4),
    "sliced": draw(3, 8)[:, ::2],
    "scalar": draw(1)[0],
}


@pytest.mark.parametrize("value", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mark_is_an_identity_with_memory_of_its_own(value: Tensor) -> None:
    for copy in (strided_copy(value), SITE(value, "a", 0, 2)):
        assert same_bits(copy, value)
        assert copy.data_ptr() != value.data_ptr()
    torch.library.opcheck(SITE, (value, "a", 0, 2))


def test_what_expanded_dimensions_share_is_written_once() -> None:
    target = torch.zeros(3, 1).expand(3, 4)
    write_into(target, LAYOUTS["expanded"])
    assert torch.equal(target, LAYOUTS["expanded"])


@pytest.mark.parametrize("value", LAYOUTS.values(), ids=LAYOUTS)
def test_a_read_applies_its_rule(value: Tensor) -> None:
    arguments: tuple[Any, ...] = ([value], [], None, "a", 0, 1, [0], json.dumps(HOLD.to_dict()))
    held = CACHE_READ(*arguments)
    assert same_bits(held, value)
    assert held.data_ptr() != value.data_ptr()
    torch.library.opcheck(CACHE_READ, arguments)


def test_marks_and_reads_are_found_in_order_and_by_name() -> None:
    graph = unrolled(residual(), CacheSchedule.from_table({"a": [1, 0], "b": [1, 1]}), steps(2), draw(3, 4))
    assert [(m.site, m.port, m.evaluation) for m in site_marks(graph.graph)] == [
        ("a", 0, 0),
        ("b", 0, 0),
        ("a", 0, 1),
        ("b", 0, 1),
    ]
    assert not cache_reads(graph.graph)
    ReadReusedSites().run(graph)
    (read,) = cache_reads(graph.graph)
    assert (read.site, read.evaluation, list(read.sources), read.rule) == ("a", 1, [0], HOLD)
    (source,) = read.history
    assert source.meta["evaluation"] == 0
