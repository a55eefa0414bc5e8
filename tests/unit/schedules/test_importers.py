"""Importers: the published files, their orientation, and files that mean harm."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.schedules.importers import (
    import_harmonica,
    import_invardiff,
    import_l2c_dit,
    import_l2c_uvit,
    import_smoothcache,
    load_schedule_file,
)
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

Shared = Callable[[str], Path]
DIT_PATHS = [f"blocks.{i}{part}" for i in range(28) for part in ("", ".attn", ".mlp")]


def logits(num_rows: int, num_entries: int) -> dict[str, object]:
    """Return router logits that are all negative, so that everything that may be reused is."""
    return {f"{row}.prob": torch.full((num_entries,), -5.0 - row) for row in range(num_rows)}


@pytest.mark.parametrize(
    ("name", "computed", "total", "percent"),
    [("l2c_DDIM20_router.pt", 312, 560, 44.29), ("l2c_DDIM50_router.pt", 736, 1400, 47.43)],
)
def test_published_dit_routers_remove_what_the_paper_says(
    shared: Shared, name: str, computed: int, total: int, percent: float
) -> None:
    schedule = import_l2c_dit(shared(f"routers/{name}")).schedule()
    assert schedule.computed_in_cacheable() == (computed, total)
    assert round(100 * schedule.removed_share(), 2) == percent
    assert all(entry.sources == (e - 1,) for (e, _), entry in schedule.reuses.items())
    assert schedule.resolve(DIT_PATHS) is schedule


@pytest.mark.parametrize(
    ("name", "computed", "total", "percent"),
    [("l2c_dpm20_router.pth", 189, 522, 63.79), ("l2c_dpm50_router.pth", 88, 1392, 93.68)],
)
def test_published_uvit_routers_remove_what_the_paper_says(
    shared: Shared, name: str, computed: int, total: int, percent: float
) -> None:
    path = shared(f"routers/{name}")
    one_branch = import_l2c_uvit(path, branches=1).schedule()
    assert one_branch.computed_in_cacheable() == (computed, total)
    schedule = import_l2c_uvit(path).schedule()
    assert schedule.computed_in_cacheable() == (2 * computed, 2 * total)
    assert round(100 * schedule.removed_share(), 2) == percent
    # The midpoint evaluation before, of the same guidance branch.
    assert all(entry.sources == (e - 2,) for (e, _), entry in schedule.reuses.items())
    assert all(schedule.row(site)[0::2] == schedule.row(site)[1::2] == one_branch.row(site) for site in schedule.sites)


@pytest.mark.parametrize(("threshold", "mismatches"), [(0.1, 0), (0.5, 62)])
def test_the_smoothcache_copy_of_a_router_agrees_entry_for_entry(
    shared: Shared, threshold: float, mismatches: int
) -> None:
    router = import_l2c_dit(shared("routers/l2c_DDIM50_router.pt"), threshold=threshold).schedule()
    copied = import_smoothcache(shared("routers/smoothcache_50-N-2-l2c.json"))
    assert set(router.sites) == set(copied.sites)
    pairs = [pair for site in router.sites for pair in zip(router.row(site), copied.row(site), strict=True)]
    assert len(pairs) == 2800
    assert sum(ours != theirs for ours, theirs in pairs) == mismatches


@pytest.mark.parametrize(
    ("name", "computed"), [("smoothcache_50-N-2-fora.json", 26), ("smoothcache_50-N-3-threshold-0.18.json", 24)]
)
def test_published_smoothcache_schedules_compute_what_they_say(shared: Shared, name: str, computed: int) -> None:
    schedule = load_schedule_file(shared(f"routers/{name}"))
    assert isinstance(schedule, CacheSchedule)
    assert [sum(schedule.row(site)) for site in schedule.sites] == [computed, computed]
    resolved = schedule.resolve(DIT_PATHS)
    assert len(resolved.sites) == 56
    assert resolved.computed_share() == computed / 50


def test_the_published_invardiff_books_reuse_what_they_say(shared: Shared) -> None:
    schedule = import_invardiff(shared("routers/invardiff_dit_50_fast.json"))
    stack = Site("blocks.0", "blocks.27")

    def reused_share(sites: list[Site]) -> float:
        return 1 - sum(sum(schedule.row(site)) for site in sites) / (50 * len(sites))

    assert reused_share([stack]) == pytest.approx(0.6)
    assert round(100 * reused_share([site for site in schedule.sites if site.path.endswith("attn")]), 1) == 66.1
    assert round(100 * reused_share([site for site in schedule.sites if site.path.endswith("mlp")]), 1) == 66.4
    # Execution order: the first evaluations warm up, and what follows a reused stack is computed in full.
    assert schedule.row(stack)[:3] == [1, 1, 0]
    for e in range(49):
        if not schedule.computes(e, stack) and schedule.computes(e + 1, stack):
            assert schedule.computed_per_evaluation()[e + 1] == 57


def test_every_published_file_is_recognised(shared: Shared) -> None:
    kinds = {
        "l2c_DDIM20_router.pt": (Router, 20),
        "l2c_dpm20_router.pth": (Router, 40),
        "smoothcache_50-N-2-l2c.json": (CacheSchedule, 50),
        "invardiff_dit_50_fast.json": (CacheSchedule, 50),
    }
    for name, (kind, num_evaluations) in kinds.items():
        content = load_schedule_file(shared(f"routers/{name}"), num_evaluations=num_evaluations)
        assert isinstance(content, kind)


def test_the_routers_of_the_golden_records_import(shared: Shared) -> None:
    dit = torch.load(shared("golden/dit.pt"), weights_only=True)
    router = import_l2c_dit(dit["routers"], threshold=dit["threshold"])
    assert (router.num_evaluations, len(router.sites)) == (dit["steps"], 2 * dit["config"]["depth"])
    uvit = torch.load(shared("golden/uvit.pt"), weights_only=True)
    router = import_l2c_uvit(uvit["routers"], threshold=uvit["threshold"])
    assert (router.num_evaluations, len(router.sites)) == (2 * uvit["nfe"], 2 * (uvit["config"]["depth"] + 1))


def test_dit_rows_count_from_the_clean_end_and_odd_ones_are_full() -> None:
    router = import_l2c_dit(logits(4, 4))
    # Row 0 is evaluation 3, row 2 is evaluation 1.
    expected = torch.tensor([1.0, torch.sigmoid(torch.tensor(-7.0)), 1.0, torch.sigmoid(torch.tensor(-5.0))])
    assert torch.equal(router.scores, expected[:, None].expand(4, 4))
    assert router.cacheable == (1, 3)
    assert list(map(str, router.sites)) == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]


def test_harmonica_may_reuse_at_every_evaluation_but_the_first() -> None:
    schedule = import_harmonica({"routers": logits(4, 2)}).schedule()
    assert schedule.cacheable == {1, 2, 3}
    assert schedule.row("blocks.0.attn") == [1, 0, 0, 0]
    entry = schedule.reuse(3, "blocks.0.attn")
    assert entry is not None
    assert entry.sources == (0,)


def test_uvit_rows_are_solver_steps_and_blocks_are_in_call_order() -> None:
    router = import_l2c_uvit(logits(6, 10), branches=2)
    assert router.num_evaluations == 12
    # Solver steps 1 and 2 start at network evaluations 2 and 4.
    assert router.cacheable == (4, 5, 8, 9)
    assert router.scores[[4, 8], 0].tolist() == torch.sigmoid(torch.tensor([-6.0, -7.0])).tolist()
    assert list(map(str, router.sites))[::2] == [
        f"{block}.attn" for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")
    ]


def test_smoothcache_keys_become_sites_by_a_template() -> None:
    schedule = import_smoothcache({"attn": [1, 0], "attn-7": [1, 1]}, site="transformer_blocks.{block}.{kind}1")
    assert list(map(str, schedule.sites)) == ["transformer_blocks.*.attn1", "transformer_blocks.7.attn1"]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"routers": 3},
        {"routers": {}},
        {"1.prob": torch.zeros(4)},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4), "3.prob": torch.zeros(4)},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(2)},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4), "2.prob": torch.zeros(4)},
        {"0.prob": torch.zeros(3), "1.prob": torch.zeros(3)},
        {"0.prob": torch.zeros(4), "1.prob": torch.full((4,), float("nan"))},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4, dtype=torch.int64)},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4).to_sparse()},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4, device="meta")},
        {"0.prob": torch.zeros(4), "1.prob": [0.0] * 4},
        {"0.prob": torch.zeros(4), "1.prob": torch.zeros(1).expand(10**12)},
    ],
)
def test_logits_of_another_form_are_refused(state: dict[str, object]) -> None:
    with pytest.raises(FileFormatError):
        import_l2c_dit(state)
    with pytest.raises(FileFormatError):
        import_l2c_uvit(state)


@pytest.mark.parametrize(
    "document",
    [
        {"attn": [1, 2]},
        {"attn": [1, 0.0]},
        {"attn": 1},
        {"attn": [1, 0], "mlp": [1]},
        {"attn": [0, 1]},
        {"a@b": [1, 0]},
        {"7": [1, 0]},
        {},
    ],
)
def test_smoothcache_files_of_another_form_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(FileFormatError):
        import_smoothcache(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"step_cache_book": []},
        {"step_cache_book": [False, 2]},
        {"step_cache_book": [True, False]},
        {"msa_cache_book": [[False]]},
        {"msa_cache_book": [[False], [False, False]]},
        {"mlp_cache_book": [[False, False], [False, False]]},
        {"mlp_cache_book": 3},
    ],
)
def test_invardiff_files_of_another_form_are_refused(changes: dict[str, object]) -> None:
    books: dict[str, object] = {
        "step_cache_book": [False, True],
        "msa_cache_book": [[False], [False]],
        "mlp_cache_book": [[False], [True]],
    }
    import_invardiff(books)
    with pytest.raises(FileFormatError):
        import_invardiff({**books, **changes})


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_our_own_files_are_recognised(tmp_path: Path) -> None:
    router = import_l2c_dit(logits(4, 4))
    router.save(tmp_path / "router")
    assert load_schedule_file(tmp_path / "router") == router
    router.schedule().save(tmp_path / "schedule")
    assert load_schedule_file(tmp_path / "schedule") == router.schedule()


def test_options_are_honoured_or_refused(tmp_path: Path) -> None:
    pickled = save(tmp_path / "router.pt", {"routers": logits(4, 6), "args": argparse.Namespace(model="DiT-S/2")})
    read = load_schedule_file(pickled, threshold=0.5, loop={"name": "ddim"})
    assert isinstance(read, Router)
    assert (read.threshold, read.loop, read.info["model"]) == (0.5, {"name": "ddim"}, "DiT-S/2")
    harmonica = load_schedule_file(pickled, family="harmonica")
    assert isinstance(harmonica, Router)
    assert harmonica.cacheable == (1, 2, 3)
    with pytest.raises(ScheduleError, match="4 evaluations, the loop has 5"):
        load_schedule_file(pickled, num_evaluations=5)
    with pytest.raises(ScheduleError, match="family"):
        load_schedule_file(pickled, family="unet")  # type: ignore[arg-type]
    schedule = tmp_path / "schedule.json"
    CacheSchedule.all_compute(3).save(schedule)
    with pytest.raises(ScheduleError, match="already is a schedule"):
        load_schedule_file(schedule, threshold=0.5)
    with pytest.raises(ScheduleError, match="this file is none"):
        load_schedule_file(schedule, family="dit")


def test_a_bare_state_dict_is_of_uvit_unless_told(tmp_path: Path) -> None:
    path = save(tmp_path / "router.pth", OrderedDict(logits(4, 6)))
    assert load_schedule_file(path).num_evaluations == 8
    assert load_schedule_file(path, family="dit").num_evaluations == 4


class Harm:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "router.pt", {"routers": logits(4, 4), "args": Harm(marker)})
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle of this test does no harm, so the test shows nothing"
    marker.rmdir()
    for read in (load_schedule_file, import_l2c_dit, import_l2c_uvit, import_harmonica):
        with pytest.raises(FileFormatError, match=rf"wants to import {os.name}\.mkdir"):
            read(path)
    assert not marker.exists()


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "router.pt"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="bytes"):
        load_schedule_file(path)
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="bytes"):
        load_schedule_file(path)


def test_pickles_of_something_else_are_refused(tmp_path: Path) -> None:
    for content in (3, [1, 2], torch.zeros(3), {"model": torch.zeros(3)}, {1: 2}):
        with pytest.raises(FileFormatError):
            load_schedule_file(save(tmp_path / "router.pt", content))


def test_files_of_no_known_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old_torch, plain = io.BytesIO(), pickle.dumps({"routers": 3})
    torch.save(logits(4, 4), old_torch, _use_new_zipfile_serialization=False)
    for data in (
        b"",
        b"\x00",
        b"PK",
        b"text",
        b"{}",
        b'{"a": 1}',
        b"[]",
        old_torch.getvalue(),
        plain,
        b"\x10" + b"\x00" * 7 + b"{" * 30,
    ):
        path.write_bytes(data)
        with pytest.raises(FileFormatError):
            load_schedule_file(path)


def test_scores_do_not_depend_on_the_file_staying(tmp_path: Path) -> None:
    path = save(tmp_path / "router.pt", logits(4, 4))
    router = import_l2c_dit(path)
    before: Tensor = router.scores.clone()
    path.write_bytes(b"\x00" * path.stat().st_size)
    assert torch.equal(router.scores, before)


def test_a_json_file_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"model": "DiT"}))
    with pytest.raises(FileFormatError, match=r"its keys: \['model'\]"):
        load_schedule_file(path)
