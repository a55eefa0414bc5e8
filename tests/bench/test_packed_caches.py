"""The bench of packed caches, with one sample of each digit and four evaluations."""

from __future__ import annotations

from rich.progress import Progress

from bench.speed.packed_caches import run


def test_it_says_how_far_off_packed_caches_are_and_how_small() -> None:
    rows = run(["--per-class", "1", "--evaluations", "4"], Progress(disable=True))
    found = {(row.metric, row.conditions["plan"], row.conditions["caches"]): row.value for row in rows}
    for plan in ("bitwise", "rounding"):
        for cache_format in ("fp8", "int8"):
            assert 0 < found["relative_l2", plan, cache_format] < 0.2
            assert found["pixel_error", plan, cache_format] < found["pixel_error_max", plan, cache_format]
            assert found["mean_KiB", plan, cache_format] < found["mean_KiB", plan, "none"]
        assert 0 <= found["drawn_as_asked", plan, "none"] <= 10
    # Rows of 96 float32 are 384 bytes, or 100 packed.
    assert found["peak_KiB", "bitwise", "int8"] * 384 == found["peak_KiB", "bitwise", "none"] * 100
