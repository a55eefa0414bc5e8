"""The Python of README.md runs, and what it shows exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.root import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_PICTURE_BYTES = 200_000


def test_the_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 7
    names: dict[str, object] = {"__name__": "readme"}
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"README.md example {number}", "exec"), names)


def test_the_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
        assert (ROOT / picture).stat().st_size < MAX_PICTURE_BYTES


def test_the_readme_is_ascii() -> None:
    assert README.isascii()
