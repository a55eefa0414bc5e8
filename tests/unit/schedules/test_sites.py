"""Sites: text form, runs, patterns, and which contains which."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.sites import Site, as_site

TEXTS = {
    "blocks.3.attn": Site("blocks.3.attn"),
    "blocks.0..blocks.27": Site("blocks.0", "blocks.27"),
    "delta(blocks.0..blocks.27)": Site("blocks.0", "blocks.27", "delta"),
    "blocks.3.attn@1": Site("blocks.3.attn", call=1),
    "delta(blocks.3@1)": Site("blocks.3", kind="delta", call=1),
    "delta(blocks.0..blocks.3@2)": Site("blocks.0", "blocks.3", "delta", 2),
    "0..5": Site("0", "5"),
    "blocks.*.attn": Site("blocks.*.attn"),
    "*_blocks.1*": Site("*_blocks.1*"),
    "blocks.conv 1": Site("blocks.conv 1"),
    "delta(blocks.conv(3x3).0@1)": Site("blocks.conv(3x3).0", kind="delta", call=1),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_site_are_inverse(text: str) -> None:
    assert Site.parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text
    assert as_site(text) == as_site(TEXTS[text]) == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "blocks..attn",
        ".blocks",
        "blocks.",
        "blocks.0..",
        "blocks.0..blocks.1..blocks.2",
        "delta(blocks.0",
        "blocks.0)",
        "delta(delta(blocks.0))",
        "blocks.0@",
        "blocks.0@-1",
        "blocks.0@1@2",
        "blocks\t0",
        " blocks",
        "blocks(0",
        "delta(delta(0))",
        "blocks.3..blocks.1",
        "blocks.0..layers.3",
        "blocks.a..blocks.b",
        "blocks.00..blocks.03",
        "blocks.*..blocks.3",
        "blocks.0..blocks.*",
        "blocks.0..blocks.999999999",
        "blocks.**",
        "blocks.\ud800",
        "a" * 5000,
    ],
)
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Site.parse(text)


def test_a_run_of_one_module_is_that_module() -> None:
    assert Site("blocks.3", "blocks.3") == Site("blocks.3")


def test_a_run_names_its_modules_in_order() -> None:
    assert Site("blocks.9", "blocks.11").modules() == ("blocks.9", "blocks.10", "blocks.11")
    assert Site("0", "1").modules() == ("0", "1")
    assert Site("blocks.3.attn").modules() == ("blocks.3.attn",)
    assert Site("blocks.9", "blocks.11").num_modules == 3


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("blocks.3", "blocks.3.attn"),
        ("blocks.0..blocks.27", "blocks.3"),
        ("blocks.0..blocks.27", "blocks.3.attn.qkv"),
        ("blocks.0..blocks.27", "blocks.3.layers.0..blocks.3.layers.2"),
        ("blocks.0..blocks.27", "blocks.1..blocks.27"),
        ("blocks.0..blocks.27", "delta(blocks.1..blocks.27)"),
        ("delta(blocks.0..blocks.27)", "blocks.0"),
        ("blocks.3", "blocks.3.attn@1"),
        ("0", "0.0"),
    ],
)
def test_a_whole_covers_its_parts_and_not_the_reverse(whole: str, part: str) -> None:
    assert as_site(whole).covers(as_site(part))
    assert not as_site(part).covers(as_site(whole))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("blocks.3", "blocks.3"),
        ("blocks.3", "delta(blocks.3)"),
        ("blocks.0..blocks.3", "blocks.2..blocks.5"),
        ("blocks.3", "blocks.30"),
        ("blocks.3", "blocks.3@1"),
        ("blocks.0..blocks.3", "blocks.1@1"),
        ("blocks.3.attn", "blocks.3.mlp"),
        ("blocks.0..blocks.3", "blocks.4"),
        ("blocks.0..blocks.3", "layers.1"),
    ],
)
def test_what_is_not_nested_covers_neither_way(one: str, other: str) -> None:
    for a, b in ((as_site(one), as_site(other)), (as_site(other), as_site(one))):
        assert not a.covers(b)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("blocks.*.attn", "blocks.3.attn", True),
        ("blocks.*.attn", "blocks.3.mlp", False),
        ("blocks.*.attn", "blocks.3.x.attn", False),
        ("blocks.*", "blocks.3.attn", False),
        ("*_blocks.*.attn", "in_blocks.3.attn", True),
        ("*_blocks.0", "mid_block", False),
        ("blocks.1*", "blocks.12", True),
        ("a*a", "a", False),
        ("blocks.3", "blocks.3", True),
    ],
)
def test_a_star_stands_for_a_component_or_part_of_one(pattern: str, path: str, matches: bool) -> None:
    assert as_site(pattern).matches(path) is matches


def test_sites_sort_in_natural_order() -> None:
    texts = ["blocks.0..blocks.27", "blocks.0", "blocks.2.attn", "blocks.10.attn", "blocks.10.attn@1"]
    assert [str(site) for site in sorted(map(as_site, reversed(texts)))] == texts
    assert as_site("blocks.2") <= as_site("blocks.2") < as_site("blocks.10") >= as_site("blocks.10") > as_site("0")
