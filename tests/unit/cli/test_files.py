"""What commands read, and where they may write."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import torch

from l2c_compile import CacheSchedule
from l2c_compile.cli.files import OutputError, is_sampler, output_path, read_profile, read_schedule
from l2c_compile.errors import FileFormatError
from tests.command_line import l2c
from tests.saved_samplers import compiled, inputs
from tests.small_profiles import one_site


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampler") / "s.pt2"
    noise, y = inputs()
    compiled().save(path, noise, y=y, scale=0.5)
    return path


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    one_site(1.0, 2.0, 3.0, 4.0).save(path)
    return path


def refused(path: Path, ending: str = ".json", *, force: bool = True, reads: Path | None = None) -> str:
    with pytest.raises(OutputError) as raised:
        output_path(path, ending, force=force, reads=reads)
    return str(raised.value)


class TestOutputPath:
    def test_a_new_file_is_written_where_it_was_asked(self, tmp_path: Path) -> None:
        assert output_path(tmp_path / "S.JSON", ".json", force=False) == tmp_path / "S.JSON"
        assert output_path(Path("s.json"), ".json", force=False) == Path("s.json")

    @pytest.mark.parametrize("name", ["s.png", "s", ".json", "s.json.gz", "."])
    def test_the_ending_is_that_of_what_is_written(self, name: str, tmp_path: Path) -> None:
        assert "wants to end in .json" in refused(tmp_path / name)

    @pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
    @pytest.mark.parametrize("is_link", [False, True])
    def test_only_regular_files_are_written(self, kind: str, is_link: bool, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        if kind == "device" and not is_link:
            pytest.skip("only root makes devices")
        with socket.socket(socket.AF_UNIX) as bound:
            real = tmp_path / "real" if is_link else path
            if kind == "pipe":
                os.mkfifo(real)
            elif kind == "folder":
                real.mkdir()
            elif kind == "device":
                real = Path(os.devnull)
            else:
                bound.bind(os.path.relpath(real))
            if is_link:
                path.symlink_to(real)
            assert "is no regular file" in refused(path)

    def test_what_exists_is_overwritten_only_with_force(self, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        path.write_text("old")
        assert "exists already; overwrite it with --force" in refused(path, force=False)
        assert output_path(path, ".json", force=True) == path

    def test_a_link_stays_one(self, tmp_path: Path) -> None:
        link, target = tmp_path / "s.json", tmp_path / "elsewhere"
        link.symlink_to(target)
        assert output_path(link, ".json", force=False) == target
        target.write_text("old")
        assert "exists already" in refused(link, force=False)

    def test_what_is_read_is_not_overwritten(self, tmp_path: Path) -> None:
        path, link = tmp_path / "s.json", tmp_path / "link.json"
        path.write_text("old")
        link.symlink_to(path)
        os.link(path, tmp_path / "hard.json")
        for same in (path, link, tmp_path / "hard.json"):
            assert "is what is read" in refused(same, reads=path)

    def test_a_folder_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        assert re.search(r"the folder .*no does not exist", refused(tmp_path / "no" / "s.json"))


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        (("inspect", "IN", "--png", "OUT"), ".png"),
        (("eval", "IN", "--json", "OUT"), ".json"),
        (("verify", "IN", "--json", "OUT"), ".json"),
        (("profile", "--out", "OUT"), ".safetensors"),
        (("profile", "--out", "free.safetensors", "--png", "OUT"), ".png"),
        (("learn", "--budget", 0.5, "--out", "OUT"), ".safetensors"),
        (("learn", "--budget", 0.5, "--out", "free.safetensors", "--png", "OUT"), ".png"),
        (("schedule", "uniform", "--evaluations", 4, "--interval", 2, "--out", "OUT"), ".json"),
        (("schedule", "random", "--profile", "IN", "--budget", 0.5, "--out", "OUT"), ".json"),
    ],
)
def test_every_command_asks_before_it_works(arguments: tuple[object, ...], ending: str, tmp_path: Path) -> None:
    given, out, wrong = tmp_path / "in.json", tmp_path / f"out{ending}", tmp_path / "out.txt"
    CacheSchedule.from_table({"blocks.0.attn": [1, 0]}).save(given)
    out.write_text("precious")
    for path, message in ((out, "exists already"), (wrong, f"wants to end in {ending}, ")):
        done = l2c(*({"IN": given, "OUT": path}.get(str(each), each) for each in arguments))
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    assert out.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == sorted((given, out))


@pytest.mark.parametrize("arguments", [("eval", "--json"), ("verify", "--json")])
def test_a_command_never_overwrites_what_it_reads(arguments: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.from_table({"blocks.0.attn": [1, 0]}).save(path)
    command, option = arguments
    done = l2c(command, path, option, path, "--force")
    assert done.code == 2
    assert "is what is read" in done.err


@pytest.mark.parametrize("command", ["inspect", "predict", "eval", "verify"])
def test_of_another_file_of_ours_it_is_said_what_it_is_and_who_takes_it(
    command: str, sampler: Path, profile: Path
) -> None:
    done = l2c(command, profile)
    assert done.code == 2
    assert "is a profile, no schedule or router; `l2c schedule METHOD --profile" in done.err
    if command != "verify":
        done = l2c(command, sampler)
        assert done.code == 2
        assert "is a saved sampler, no schedule or router; `l2c verify` takes it" in done.err


@pytest.mark.parametrize("command", ["inspect", "predict", "eval", "verify"])
def test_a_pipe_is_not_waited_for(command: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = l2c(command, tmp_path / "pipe")
    assert done.code == 2
    assert "is no regular file" in done.err


def test_a_sampler_is_known_by_what_it_holds(sampler: Path, tmp_path: Path) -> None:
    assert is_sampler(sampler)
    torch.save({"routers": {}}, tmp_path / "s.pt2")
    assert not is_sampler(tmp_path / "s.pt2")
    (tmp_path / "s.pt2").write_text("neither")
    assert not is_sampler(tmp_path / "s.pt2")
    with pytest.raises(FileFormatError, match="no known form"):
        read_schedule(tmp_path / "s.pt2")


def test_a_link_that_leads_back_to_itself_and_a_file_for_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    (tmp_path / "file").touch()
    assert "is a link that leads back to itself" in refused(tmp_path / "a.json")
    assert "does not exist or cannot be written to" in refused(tmp_path / "file" / "s.json")


def test_what_is_no_profile_is_said_to_be_what_it_is(sampler: Path, tmp_path: Path) -> None:
    schedule = tmp_path / "s.json"
    CacheSchedule.from_table({"a": [1, 0]}).save(schedule)
    (tmp_path / "text").write_text("text")
    for path, what in (
        (sampler, "is a saved sampler"),
        (schedule, "is a schedule or router"),
        (tmp_path / "text", "is no profile"),
    ):
        with pytest.raises(FileFormatError, match=rf"{what}.*`l2c profile --out FILE` makes one"):
            read_profile(path)
