"""What documents of ours begin with, and the errors of what they describe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from l2c_compile.errors import FileFormatError, KernelError, ScheduleError
from l2c_compile.files.documents import check_header, honoured, parse_json, write_atomically

KEYS = frozenset({"format", "version", "orientation", "rows"})
GOOD = {"format": "l2c_compile.thing", "version": 2, "orientation": "execution", "rows": []}


def check(document: dict[str, object]) -> None:
    check_header(document, "thing", "l2c_compile.thing", 3, KEYS, frozenset({"info"}))


def test_a_good_header_passes() -> None:
    check(GOOD)
    check({**GOOD, "version": 1})
    check({**GOOD, "version": 3, "info": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "a thing wants format 'l2c_compile.thing', got 'other'"),
        ({"format": None}, "a thing wants format"),
        ({"version": "1"}, "a thing wants a version number, got '1'"),
        ({"version": True}, "a thing wants a version number, got True"),
        ({"version": 0}, "a thing wants a version number, got 0"),
        # A later version may have other keys.
        ({"version": 4, "novelty": 1}, "the thing is of version 4, this l2c_compile reads up to 3; update l2c_compile"),
        ({"novelty": 1}, r"the thing has unknown keys \['novelty'\]"),
        ({"orientation": "clean"}, "orientation wants 'execution', got 'clean'"),
    ],
)
def test_a_header_that_is_not_right_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        check({**GOOD, **changes})


@pytest.mark.parametrize("key", ["orientation", "rows"])
def test_a_key_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(FileFormatError, match=rf"the thing lacks \['{key}'\]"):
        check({name: value for name, value in GOOD.items() if name != key})


def test_a_file_may_say_its_format_elsewhere() -> None:
    check_header({"version": 1}, "thing", None, 1, {"version"})


@pytest.mark.parametrize("error", [ScheduleError("too long"), KernelError("too long"), TypeError("too long")])
def test_errors_of_what_a_file_describes_are_errors_of_the_file(error: Exception) -> None:
    message = "the file describes a thing that cannot be honoured: too long"
    with pytest.raises(FileFormatError, match=message), honoured("thing"):
        raise error


def test_errors_of_the_file_and_of_others_stay_as_they_are() -> None:
    for error in (FileFormatError("damaged"), OSError("no disk")):
        with pytest.raises(type(error), match=r"^(damaged|no disk)$"), honoured("thing"):
            raise error


def test_a_document_beyond_the_bound_is_not_parsed() -> None:
    with pytest.raises(FileFormatError, match="at most 3 bytes, got 4"):
        parse_json("{}  ", max_bytes=3)


class TestWritten:
    def test_a_link_stays_and_what_it_leads_to_is_replaced(self, tmp_path: Path) -> None:
        link, target = tmp_path / "link", tmp_path / "target"
        link.symlink_to(target)
        write_atomically(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"

    def test_what_is_no_regular_file_is_left_alone(self, tmp_path: Path) -> None:
        pipe, device, folder = (tmp_path / name for name in ("pipe", "device", "folder"))
        os.mkfifo(pipe)
        device.symlink_to(os.devnull)
        folder.mkdir()
        for path in (pipe, device, folder):
            with pytest.raises(OSError, match=r"Not a regular file: .* cannot be written"):
                write_atomically(path, b"new")
        assert pipe.is_fifo()
        assert Path(os.devnull).is_char_device()

    def test_a_link_that_leads_back_to_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(OSError, match="cannot be written"):
            write_atomically(tmp_path / "a", b"new")
