"""What a loop means under a schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.checking.expected import port_suffix
from l2c_compile.checking.values import Value
from tests.tiny import at
from tests.traced_loops import traced

ALL = {(e, site, 0) for e in range(3) for site in ("a", "b")}


def draws_once(denoiser: object, noise: Tensor) -> Tensor:
    x = noise + torch.randn_like(noise)
    for i in range(3):
        x = x - denoiser(x, at(x, i))  # type: ignore[operator]
    return x


def test_each_site_holds_a_value_after_each_evaluation_computed_or_read() -> None:
    expected = traced().expected()
    assert expected.held.keys() == ALL
    assert expected.reads.keys() == {(1, "a", 0), (2, "b", 0)}
    assert expected.computed.keys() == ALL - expected.reads.keys()
    assert expected.held[1, "a", 0] is expected.held[0, "a", 0]
    assert expected.held[2, "a", 0] is not expected.held[0, "a", 0]
    assert expected.names[expected.held[0, "a", 0]] == "site 'a' of evaluation 0"


def test_another_schedule_means_another_result() -> None:
    one = traced()
    other = traced({"a": [1, 1, 1], "b": [1, 1, 1]})
    other.table, other.model = one.table, one.model
    other.trace = one.trace
    assert one.expected().results[0] is one.expected().results[0]
    assert one.expected().results[0] is not other.expected().results[0]


def test_what_changes_of_a_site_is_a_value_by_itself() -> None:
    expected = traced({"delta(a)": [1, 0, 1]}).expected()
    read = expected.reads[1, "delta(a)", 0]
    # The input of evaluation 1 and the change of evaluation 0.
    assert read.target is torch.ops.aten.add.Tensor
    assert expected.held[1, "delta(a)", -1] in read.operands()


def test_every_draw_is_one_of_its_own() -> None:
    assert len(traced(loop=draws_once).expected().draws) == 1
    assert traced().expected().draws == []


def test_all_that_the_results_are_made_from_is_met() -> None:
    expected = traced().expected()
    (result,) = expected.results
    assert isinstance(result, Value)
    assert result in expected.met
    assert all(operand in expected.met for operand in result.operands())
    assert max(expected.made.values()) >= 1


def test_only_later_results_of_a_site_are_numbered() -> None:
    assert [port_suffix(port) for port in (0, 1)] == ["", " (result 1)"]
