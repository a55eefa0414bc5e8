"""Routers: thresholds, validation, immutability, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.schedules.router import FORMAT, Router
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

SITES = (Site("a"), Site("b"))


def router(scores: Tensor | None = None, **changes: object) -> Router:
    fields: dict[str, object] = {
        "scores": torch.tensor([[0.0, 0.0], [0.05, 0.5], [0.3, 0.3], [0.1, 0.9]]) if scores is None else scores,
        "sites": SITES,
        "cacheable": (3, 1),
        "threshold": 0.1,
        **changes,
    }
    return Router(**fields)  # type: ignore[arg-type]


def test_a_site_is_computed_above_the_threshold_or_where_reuse_is_not_allowed() -> None:
    # The score 0.1 is not above 0.1.
    assert router().schedule() == CacheSchedule.from_table({"a": [1, 0, 1, 0], "b": [1, 1, 1, 1]}, cacheable=[1, 3])
    assert router().schedule(0.5).row("b") == [1, 0, 1, 1]
    assert router().schedule(0.5).info["threshold"] == 0.5
    assert router().schedule().cacheable == {1, 3}


def test_a_router_without_cacheable_evaluations_computes_everything() -> None:
    assert router(cacheable=()).schedule().computed_share() == 1.0


def test_branches_and_loop_go_into_the_schedule() -> None:
    made = router(cacheable=(2, 3), branches=2, loop={"name": "dpm"}, threshold=0.5).schedule()
    assert made.branches == 2
    assert made.loop == {"name": "dpm"}
    reuse = made.reuse(3, "a")
    assert reuse is not None
    assert reuse.sources == (1,)


def test_reuse_before_any_computation_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="site a is reused at evaluation 0"):
        router(cacheable=(0,)).schedule()


def test_scores_are_a_copy_without_gradient() -> None:
    scores = torch.full((2, 2), 0.5, requires_grad=True)
    made = router(scores, cacheable=(1,))
    with torch.no_grad():
        scores.zero_()
    assert not made.scores.requires_grad
    assert made.scores.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(4, 3)}, "2 sites"),
        ({"scores": torch.zeros(4)}, "2 sites"),
        ({"scores": torch.zeros(0, 2)}, "entries"),
        ({"scores": torch.zeros(4, 2, dtype=torch.float64)}, "float32"),
        ({"scores": [[0.0, 0.0]]}, "float32 tensor, got a list"),
        ({"scores": torch.tensor([[0.5, float("nan")]])}, "site b at evaluation 0 wants a score in [0, 1], got nan"),
        ({"scores": torch.tensor([[0.5, 0.5], [2.0, 0.5]])}, "site a at evaluation 1"),
        ({"scores": torch.tensor([[-0.5, 0.5]])}, "sigmoid"),
        ({"sites": (Site("a"), Site("a"))}, "twice"),
        ({"cacheable": (4,)}, "evaluation 4; the router has 0..3"),
        ({"cacheable": (1, 1)}, "twice"),
        ({"threshold": 1.5}, "[0, 1]"),
        ({"threshold": float("nan")}, "[0, 1]"),
        ({"threshold": "0.1"}, "[0, 1]"),
        ({"branches": 0}, "branches"),
    ],
)
def test_parts_that_do_not_fit_are_an_error(changes: Mapping[str, object], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        router(**changes)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_threshold_outside_the_scores_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="threshold"):
        router().schedule(-0.1)


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    made = router(branches=2, loop={"name": "ddim", "steps": [3, 2]}, info={"by": "hand"})
    made.save(path)
    again = Router.load(path)
    assert again == made
    assert hash(again) == hash(made)
    assert again.info == {"by": "hand"}
    assert again != router()
    assert list(tmp_path.iterdir()) == [path]


def document(**changes: object) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": 1,
        "orientation": "execution",
        "sites": ["a", "b"],
        "cacheable": [1],
        "threshold": 0.1,
        "branches": 1,
        "loop": None,
        "info": {},
        **changes,
    }


def write(path: Path, metadata: Mapping[str, object] | None, tensors: Mapping[str, Tensor]) -> None:
    text = None if metadata is None else {"l2c_compile": json.dumps(metadata)}
    safetensors.torch.save_file(dict(tensors), path, text)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": "1"},
        {"orientation": "clean"},
        {"sites": "ab"},
        {"sites": ["a", 1]},
        {"sites": ["a@b", "c"]},
        {"sites": ["a"]},
        {"cacheable": ["1"]},
        {"cacheable": [7]},
        {"threshold": None},
        {"threshold": 7},
        {"branches": 1.0},
        {"loop": []},
        {"info": None},
        {"extra": 1},
    ],
)
def test_malformed_metadata_is_refused(changes: Mapping[str, object], tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    write(path, document(), {"scores": torch.zeros(2, 2)})
    Router.load(path)
    write(path, document(**changes), {"scores": torch.zeros(2, 2)})
    with pytest.raises(FileFormatError):
        Router.load(path)


def test_a_newer_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    write(path, document(version=2, novelty=True), {"scores": torch.zeros(2, 2)})
    with pytest.raises(FileFormatError, match="of version 2, this l2c_compile reads up to 1"):
        Router.load(path)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    for metadata, tensors in (
        (None, {"scores": torch.zeros(2, 2)}),
        (document(), {"logits": torch.zeros(2, 2)}),
        (document(), {"scores": torch.zeros(2, 2), "more": torch.zeros(1)}),
        (document(), {"scores": torch.zeros(2, 3)}),
        (document(), {"scores": torch.full((2, 2), float("nan"))}),
        (document(), {"scores": torch.zeros(2, 2, dtype=torch.float16)}),
    ):
        write(path, metadata, tensors)
        with pytest.raises(FileFormatError):
            Router.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    router().save(path)
    data = path.read_bytes()
    for length in (0, 4, 8, 20, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError):
            Router.load(path)
    path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    with pytest.raises(FileFormatError):
        Router.load(path)
