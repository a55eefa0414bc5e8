"""``python -m bench quality``: who is compared with whom, and what is kept between calls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from bench.cases import BenchError
from bench.digits import compare as quality
from bench.digits.compare import Contender, Judged, contenders, not_beaten
from l2c_compile import CacheSchedule, Router, Site
from l2c_compile.finders import Profile
from l2c_compile.loops import DDIM
from l2c_compile.models.named import DIGITS, NamedModel, named_model
from l2c_compile.quality.judge import Verdict
from l2c_compile.quality.measures import Estimate, Quality

STEPS = 4
SITES = tuple(Site.parse(f"blocks.{i}.{name}") for i in range(8) for name in ("attn", "mlp"))


@pytest.fixture(scope="module")
def digits() -> tuple[NamedModel, Profile]:
    known = named_model(DIGITS)
    return known, quality._profile(known, known.loop(STEPS), 1, lambda: None)


def options(**changes: Any) -> argparse.Namespace:  # noqa: ANN401
    parsed = quality._options([])
    return argparse.Namespace(**{**vars(parsed), "budgets": [0.7], "seeds": 2, **changes})


def save_router(folder: Path, name: str, known: NamedModel, steps: int = STEPS) -> None:
    """Write a router that reuses attention in every second evaluation."""
    scores = torch.ones(steps, len(SITES))
    scores[1::2, ::2] = 0.0
    Router(scores, SITES, tuple(range(1, steps, 2)), 0.5, loop=known.loop(steps).to_dict()).save(folder / name)


def test_others_have_at_least_the_work_of_the_router(tmp_path: Path, digits: tuple[NamedModel, Profile]) -> None:
    known, profile = digits
    save_router(tmp_path, f"l2c-{STEPS}-70.safetensors", known)
    plan, absent = contenders(known, profile, options(routers=tmp_path))
    assert absent == [f"rollout-{STEPS}-70.safetensors"]
    (learned,) = (each for each in plan if each.method == "L2C (learned)")
    least = profile.work.kept(learned.schedule)
    in_pairs = [each for each in plan if each.setting == "pairs"]
    assert {each.method for each in in_pairs} == {
        *("L2C (learned)", "SmoothCache", "Block Caching", "InvarDiff", "MagCache", "random", "fewer steps", "FORA")
    }
    for each in in_pairs:
        assert all(e % 2 for e, _ in each.schedule.reuses)
        if each.method not in ("FORA", "fewer steps"):
            assert least <= profile.work.kept(each.schedule) < least + 0.03
    free = {each.method for each in plan if each.setting == "free"}
    assert free == {
        *(
            "SmoothCache",
            "SmoothCache by site",
            "Block Caching",
            "InvarDiff",
            "MagCache",
            "random",
            "fewer steps",
            "FORA",
        )
    }
    assert [each.loop.num_evaluations for each in plan if each.method == "fewer steps"] == [4, 3]


def test_methods_may_be_left_out(digits: tuple[NamedModel, Profile]) -> None:
    plan, absent = contenders(*digits, options(without=["random", "SmoothCache by site"]))
    assert not {"random", "SmoothCache by site"} & {each.method for each in plan}
    assert absent == [f"l2c-{STEPS}-70.safetensors", f"rollout-{STEPS}-70.safetensors"]


def test_a_router_of_another_loop_is_refused(tmp_path: Path, digits: tuple[NamedModel, Profile]) -> None:
    known, profile = digits
    router_path = tmp_path / f"l2c-{STEPS}-70.safetensors"
    Router(torch.ones(STEPS, 1), ("blocks.0.attn",), (1,), 0.5, loop=DDIM(steps=STEPS).to_dict()).save(router_path)  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="was learned for another loop than"):
        contenders(known, profile, options(routers=tmp_path))


def judged(method: str, kept: float, error: float) -> Judged:
    contender = Contender(20, "pairs", method, CacheSchedule.all_compute(20), DDIM(steps=20))
    return Judged(contender, kept, {"relative_l2": Estimate(error, error, error)})


def test_each_method_is_met_at_its_least_work_that_is_not_below_the_router_s() -> None:
    learned = judged("L2C (learned)", 0.6, 0.02)
    others = [
        judged("cheaper", 0.59, 0.001),
        judged("worse here", 0.61, 0.03),
        judged("worse here", 0.9, 0.001),
        judged("better", 0.6, 0.019),
        judged("equal", 0.6, 0.02),
        judged("random", 0.601, 0.03),
        judged("random", 0.603, 0.018),
    ]
    assert not_beaten(learned, others, "relative_l2") == ["better", "equal", "random"]


def test_a_run_judges_draws_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: tuple[NamedModel, Profile]
) -> None:
    asked: list[CacheSchedule] = []

    class FakeJudge:
        """Calls samples worse the more is reused, without sampling."""

        multiply_adds = 100

        def __init__(self, known: NamedModel, loop: DDIM, *, num_samples: int, batch: int, reference: object) -> None:
            self.reference = torch.ones(num_samples, 1, 8, 8)
            self.had_reference = reference is not None

        def judge(self, schedule: CacheSchedule, loop: DDIM) -> Verdict:
            asked.append(schedule)
            lost = 1.5 - schedule.computed_share()
            one, error = Estimate(1.0, 1.0, 1.0), Estimate(lost, lost / 2, 2 * lost)
            return Verdict(Quality(70, one, None, error, error, error, None, None), one, 50, 0.5)

    monkeypatch.setattr(quality, "Judge", FakeJudge)
    known, profile = digits
    monkeypatch.setattr(quality, "_profile", lambda *args, **kwargs: profile)
    (tmp_path / "routers").mkdir()
    save_router(tmp_path / "routers", f"l2c-{STEPS}-70.safetensors", known)
    arguments = ["--steps", str(STEPS), "--budgets", "0.7", "--samples", "70", "--seeds", "1", "--runs", "1"]
    for name in ("keep", "routers"):
        arguments += [f"--{name}", str(tmp_path / name)]
    pictures = ["--png", str(tmp_path / "q.png"), "--table", str(tmp_path / "q.md")]
    with Progress(disable=True) as progress:
        rows = quality.run([*arguments, *pictures], progress)
        num_asked = len(asked)
        again = quality.run(arguments, progress)
    assert len(asked) == num_asked
    assert again == rows
    assert {row.metric for row in rows} == {
        *("psnr_db", "relative_l1", "relative_l2", "frechet", "as_asked"),
        *("absent_router", "methods_not_beaten"),
    }
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "q.md").read_text().splitlines()
    assert lines[0].startswith("| steps | setting | kept | method | psnr_db |")
    assert sum("L2C (learned)" in line for line in lines) == 1
