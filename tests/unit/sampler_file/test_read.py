"""Archives that are damaged or hostile are refused, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from l2c_compile import CompiledSampler, load
from l2c_compile.errors import FileFormatError
from tests.saved_samplers import GRAPH, equal, flat, refused, rewritten


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


def torch_pickle(payload: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / "x.pt2"
    for length in [0, 1, 21, 22, 100, *range(1000, len(content), len(content) // 20), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content + b"more")
    refused(path, "followed by other data")


def test_a_flipped_bit_is_found_or_changes_nothing(sampler: CompiledSampler, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    wanted = flat(sampler)
    draw = random.Random(0)
    path = tmp_path / "x.pt2"
    num_refused = 0
    # Most of the file is torch's own form, which is not read: half of the flips go where it matters.
    ours = content.index(b"l2c_compile/manifest.json")
    for attempt in range(60):
        place = draw.randrange(ours if attempt % 2 else 0, len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load(path)
        except FileFormatError:
            num_refused += 1
        else:
            assert equal(flat(loaded), wanted), place
    assert num_refused > 20


def test_a_zip_bomb_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    rewritten(saved, path, extra={"archive/data/weights/weight_999": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed")


def test_a_huge_claimed_size_is_refused(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    # Compressed and uncompressed size of the first entry of the directory.
    start = content.index(b"PK\1\2")
    content[start + 20 : start + 28] = b"\xf0\xff\xff\x7f" * 2
    (tmp_path / "x.pt2").write_bytes(content)
    refused(tmp_path / "x.pt2", "claims more bytes")


def test_two_records_of_one_name_are_refused(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path / "x.pt2")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(GRAPH, b"{}")
    refused(path, "two records")


@pytest.mark.parametrize(
    "name",
    [
        "data/sample_inputs/model.pt",
        "data/weights/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/model.so",
        "data/extra/../../x",
        "code/model.py",
    ],
)
def test_a_record_that_would_run_is_refused_and_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    payload = torch_pickle(Payload(tmp_path / "executed"))
    path = rewritten(saved, tmp_path / "x.pt2", {f"archive/{name}": lambda _: payload}, {f"archive/{name}": payload})
    refused(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("make", [pickle.dumps, torch_pickle])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, make: Callable[[object], bytes]) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(make(Payload(tmp_path / "executed")))
    refused(path)
    assert not (tmp_path / "executed").exists()


def test_torchs_own_archive_without_our_manifest_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "x.pt2")
    refused(tmp_path / "x.pt2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "bytes, more than"),
        ({"dtype": "evil"}, "wants a dtype"),
        ({"shape": [2**40, 6]}, "bytes, more than"),
        ({"shape": [-1, 6]}, "of counts"),
        ({"shape": [2**62, 2**62], "stride": [0, 0]}, "of counts"),
        ({"stride": [6]}, "of equal length"),
        ({"offset": 10**6}, "bytes, more than"),
        ({"sha256": "0" * 64}, "damaged"),
        ({"record": "models/model.json"}, "no storage"),
        ({"record": "data/weights/weight_77"}, "no record"),
        ({"device": "evil"}, "torch does not know"),
    ],
)
def test_a_hostile_tensor_is_refused(saved: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    def edit(graph: bytes) -> bytes:
        lines = [json.loads(line) for line in graph.splitlines()]
        tensor = next(line for line in lines if line.get("tensor", "").endswith("inner.weight"))
        tensor.update(change)
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: edit}), message)
