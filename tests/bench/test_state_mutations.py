"""Python state that a capture freezes, or that changes after it: each call is refused, or right."""

from __future__ import annotations

import pytest
from torch.utils._pytree import tree_leaves

from bench.trust.bits import same_bits
from bench.trust.programs.python.source import World
from bench.trust.state_mutations import STALE, STATE_MUTATIONS, caught_by

QUICK = ("counter", "step of the denoiser", "number attribute", "hook added", "step of a fused optimizer")


@pytest.mark.parametrize("name", QUICK)
def test_some_state_that_is_frozen_or_stale_is_caught(name: str) -> None:
    what, _ = caught_by(STATE_MUTATIONS[name])
    assert what


@pytest.mark.slow(reason="each mutation is one more sampler; `python -m bench mutations` has them all, too")
@pytest.mark.parametrize("name", [name for name in STATE_MUTATIONS if name not in QUICK])
def test_state_that_is_frozen_or_stale_is_caught(name: str) -> None:
    what, _ = caught_by(STATE_MUTATIONS[name])
    assert what


@pytest.mark.parametrize("name", STALE)
def test_what_changes_after_the_capture_changes_the_result(name: str) -> None:
    program = STALE[name].program
    results = []
    with World(program.source) as world:
        for event in program.history[:-1]:
            if "change" in event:
                world.change(event["change"], program.features)
            else:
                results.append(tree_leaves(program.run_eagerly(world, event)))
    before, after = results
    assert not same_bits(after, before)


def test_there_are_enough_of_them() -> None:
    assert len(STATE_MUTATIONS) >= 20
    assert len({mutation.program.to_json() for mutation in STATE_MUTATIONS.values()}) == len(STATE_MUTATIONS)
