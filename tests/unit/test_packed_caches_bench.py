"""The bench of packed caches, with two samples of each digit."""

from __future__ import annotations

from rich.progress import Progress

from bench.packed_caches import run


def test_it_says_how_far_off_packed_caches_are_and_how_small() -> None:
    rows = run(["--per-class", "1"], Progress(disable=True))
    found = {(row.metric, row.conditions["plan"], row.conditions["caches"]): row.value for row in rows}
    for plan in ("bitwise", "rounding"):
        for cache_format in ("fp8", "int8"):
            assert 0 < found["relative_l2", plan, cache_format] < 0.2
            assert found["pixel_error", plan, cache_format] < found["pixel_error_max", plan, cache_format]
            # Rows of 96 float32 (384 bytes) are 100 bytes each, and one value may be unpacked beside them.
            assert found["peak_KiB", plan, cache_format] < 0.5 * found["peak_KiB", plan, "none"]
        assert 0 <= found["drawn_as_asked", plan, "none"] <= 10
