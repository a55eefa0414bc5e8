"""``python -m bench trace-time`` on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from bench.cases import BenchError
from bench.speed.trace_time import build, repeated, run
from l2c_compile.models import DiT
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.sites import Site


def small_router() -> Router:
    scores = torch.tensor([[0.9, 0.9], [0.9, 0.0]])
    return Router(scores, (Site("blocks.0.attn"), Site("blocks.0.mlp")), cacheable=(1,), threshold=0.5)


def test_repeated_rows_keep_the_share_of_what_is_reused() -> None:
    schedule = repeated(small_router(), 6).schedule()
    assert schedule.row("blocks.0.attn") == [1, 1, 1, 1, 1, 1]
    assert schedule.row("blocks.0.mlp") == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_rows_are_repeated_whole(number: int) -> None:
    with pytest.raises(BenchError, match="multiples of the router's 2"):
        repeated(small_router(), number)


def test_the_stages_are_the_whole_and_the_passes_follow_each_other() -> None:
    with torch.device("meta"):
        model = DiT(input_size=32, patch_size=16, hidden_size=8, depth=1, num_heads=1, num_classes=1000)
    done = build(model.eval(), small_router().schedule())
    assert list(done.stages_s) == ["capture", "trace", "simplify", "unroll", "passes", "graph module"]
    assert all(seconds > 0 for seconds in done.stages_s.values())
    assert done.total_s == pytest.approx(sum(done.stages_s.values()) - done.stages_s["graph module"])
    assert all(a.nodes_after == b.nodes_before for a, b in zip(done.passes, done.passes[1:], strict=False))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--router", "absent.pt"], "there is no absent.pt; name it with --router FILE"),
        (["--rounds", "0"], "--rounds wants at least 1, got 0"),
        (["--weights", "heavy"], "--weights: invalid choice"),
        (["surprise"], "does not know surprise"),
    ],
)
def test_a_wrong_argument_says_what_is_wanted(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match=message), Progress(disable=True) as progress:
        run(args, progress)
