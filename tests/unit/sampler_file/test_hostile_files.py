"""Files that are damaged or hostile are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from l2c_compile import CompiledSampler, load
from l2c_compile.errors import (
    FileFormatError,
)
from tests.saved_samplers import (
    GRAPH,
    MANIFEST,
    compiled,
    equal,
    flat,
    inputs,
    rewritten,
)


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


@pytest.fixture(scope="module")
def saved(sampler: CompiledSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny.pt2"
    noise, y = inputs()
    sampler.save(path, noise, y=y, scale=0.5)
    return path


def refused(path: Path, match: str | None = None) -> None:
    start = time.process_time()
    with pytest.raises(FileFormatError, match=match):
        load(path)
    assert time.process_time() - start < 1


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


class TestHostileFiles:
    def test_a_truncated_file_is_refused(self, saved: Path, tmp_path: Path) -> None:
        content = saved.read_bytes()
        path = tmp_path / "x.pt2"
        for length in [0, 1, 21, 22, 100, *range(1000, len(content), len(content) // 20), len(content) - 1]:
            path.write_bytes(content[:length])
            refused(path)
        path.write_bytes(content + b"more")
        refused(path, "followed by other data")

    def test_a_flipped_bit_is_found_or_changes_nothing(
        self, sampler: CompiledSampler, saved: Path, tmp_path: Path
    ) -> None:
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

    def test_a_zip_bomb_is_refused(self, saved: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.pt2"
        rewritten(
            saved, path, extra={"archive/data/weights/weight_999": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED
        )
        refused(path, "is compressed")

    def test_a_huge_claimed_size_is_refused(self, saved: Path, tmp_path: Path) -> None:
        content = bytearray(saved.read_bytes())
        # Compressed and uncompressed size of the first entry of the directory.
        start = content.index(b"PK\1\2")
        content[start + 20 : start + 28] = b"\xf0\xff\xff\x7f" * 2
        (tmp_path / "x.pt2").write_bytes(content)
        refused(tmp_path / "x.pt2", "claims more bytes")

    def test_two_records_of_one_name_are_refused(self, saved: Path, tmp_path: Path) -> None:
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
    def test_a_record_that_would_run_is_refused_and_not_run(self, saved: Path, tmp_path: Path, name: str) -> None:
        payload = torch_pickle(Payload(tmp_path / "executed"))
        path = rewritten(
            saved, tmp_path / "x.pt2", {f"archive/{name}": lambda _: payload}, {f"archive/{name}": payload}
        )
        refused(path)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("make", [pickle.dumps, torch_pickle])
    def test_a_pickle_is_refused_and_not_run(self, tmp_path: Path, make: Callable[[object], bytes]) -> None:
        path = tmp_path / "x.pt2"
        path.write_bytes(make(Payload(tmp_path / "executed")))
        refused(path)
        assert not (tmp_path / "executed").exists()

    def test_torchs_own_archive_without_our_manifest_is_refused(self, tmp_path: Path) -> None:
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "x.pt2")
        refused(tmp_path / "x.pt2")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"op": "aten::from_file", "args": [{"str": "/etc/passwd"}]}, "touches files"),
            ({"op": "aten::save", "args": ["%0", {"str": "x"}]}, "touches files"),
            ({"op": "aten::add_.Tensor", "args": ["%0", "%0"]}, "writes into an argument"),
            ({"op": "aten::item", "args": ["%0"]}, "returns something else"),
            ({"op": "torch.os.system", "args": [{"str": "true"}]}, "wants an operator"),
            ({"op": "higher_order::cond", "args": []}, "wants an operator"),
            ({"op": "aten::__class__", "args": []}, "does not have"),
            ({"op": "aten::no_such_thing", "args": []}, "does not have"),
            ({"op": "aten::neg", "args": ["%0"], "kwargs": {"x): pass  #": 1}}, "does not have"),
            ({"op": "aten::neg", "args": ["%99999999"]}, "no earlier line"),
            ({"op": "aten::neg", "args": ["0"]}, "no earlier line"),
            ({"op": "aten::neg", "args": [3]}, "does not take"),
            ({"op": "aten::neg", "args": ["%0", "%0", "%0"]}, "does not have"),
            ({"op": "aten::neg", "args": "%0"}, "wants a list"),
            ({"op": "aten::neg", "args": ["%0"], "evaluation": 3}, "evaluation below 3"),
            ({"op": "aten::neg", "args": ["%0"], "path": "a\nimport os"}, "module path"),
            ({"op": "aten::neg", "args": ["%0"], "more": 1}, "wants args, op"),
            ({"op": "aten::matmul", "args": ["%0", "%0"]}, "does not take"),
            ({"op": "aten::zeros", "args": [[2**62, 2**62]]}, "does not take"),
            ({"op": "aten::zeros", "args": [[2**80]]}, "no known form"),
            ({"op": "aten::sum", "args": ["%0"], "kwargs": {"dtype": {"dtype": "Tensor"}}}, "no known form"),
            ({"op": "aten::unbind.int", "args": ["%0", 7]}, "does not take"),
            ({"op": "aten::chunk", "args": ["%0", 2**40]}, "pieces"),
            ({"op": "getitem", "args": ["%0", {"str": "__class__"}]}, "wants getitem"),
            ({"op": "getitem", "args": ["%0", 9]}, "does not take"),
            ({"op": "aten::stack", "args": [["%0"] * 20_000]}, "no known form"),
            ({"op": "aten::neg", "args": [[[[[[[[[[[["%0"]]]]]]]]]]]]}, "no known form"),
            ({"output": ["%0"]}, "after the result"),
            ({"call": 1}, "wants an input"),
            ({}, "wants an input"),
            ([1], "wants an object"),
        ],
    )
    def test_a_hostile_line_is_refused(self, saved: Path, tmp_path: Path, line: object, message: str) -> None:
        def insert(graph: bytes) -> bytes:
            # The line's result is returned as well: what nobody uses is refused for that alone.
            *lines, last = map(json.loads, graph.splitlines())
            last["output"].append(f"%{len(lines)}")
            return b"".join(json.dumps(each).encode() + b"\n" for each in (*lines, line, last))

        refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), message)

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
    def test_a_hostile_tensor_is_refused(
        self, saved: Path, tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        def edit(graph: bytes) -> bytes:
            lines = [json.loads(line) for line in graph.splitlines()]
            tensor = next(line for line in lines if line.get("tensor", "").endswith("inner.weight"))
            tensor.update(change)
            return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

        refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: edit}), message)

    def test_pieces_without_end_are_refused(self, saved: Path, tmp_path: Path) -> None:
        def insert(graph: bytes) -> bytes:
            *lines, last = map(json.loads, graph.splitlines())
            bomb = [
                {"op": "aten::zeros", "args": [[2**40]]},
                {"op": "aten::unbind.int", "args": [f"%{len(lines)}"]},
            ]
            last["output"].append(f"%{len(lines) + 1}")
            return b"".join(json.dumps(each).encode() + b"\n" for each in (*lines, *bomb, last))

        refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), "pieces")

    def test_dead_nodes_and_marks_are_refused(self, saved: Path, tmp_path: Path) -> None:
        def insert(graph: bytes) -> bytes:
            lines = graph.splitlines(keepends=True)
            return b"".join([*lines[:-1], b'{"op":"aten::neg","args":["%0"]}\n', lines[-1]])

        refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), "has no user")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "l2c_compile.router"}, "wants format"),
            ({"version": 2}, "update l2c_compile"),
            ({"version": "1"}, "version number"),
            ({"surprise": 1}, "unknown keys"),
            ({"summary": {}}, "summary wants"),
            ({"passes": "all"}, "passes wants a list"),
            ({"noise": {"value": "%0"}}, "no earlier line"),
            ({"noise": {"pickle": "x"}}, "wants a tensor or a value"),
            ({"conditions": {}}, "inputs where the manifest names"),
            ({"result": {"leaf": 0}}, "each output of the graph once"),
            ({"sha256": {}}, "wants the sha256"),
        ],
    )
    def test_a_hostile_manifest_is_refused(
        self, saved: Path, tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        edit = {MANIFEST: lambda content: json.dumps({**json.loads(content), **change}).encode()}
        refused(rewritten(saved, tmp_path / "x.pt2", edit), message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"format": NaN}', "finite"),
            (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested"),
            (b"[" * 5_000_000, "at most"),
            (b"\x80\x04.", "not valid JSON"),
        ],
    )
    def test_malformed_json_is_refused(self, saved: Path, tmp_path: Path, content: bytes, message: str) -> None:
        refused(rewritten(saved, tmp_path / "x.pt2", {MANIFEST: lambda _: content}), message)

    def test_a_deep_tree_is_refused(self, saved: Path, tmp_path: Path) -> None:
        tree: object = {"value": 1}
        for _ in range(100):
            tree = {"list": [tree]}
        edit = {MANIFEST: lambda content: json.dumps({**json.loads(content), "noise": tree}).encode()}
        refused(rewritten(saved, tmp_path / "x.pt2", edit), "deep")
