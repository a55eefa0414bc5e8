"""Saved samplers run without the model's class; damaged and hostile files are refused, and nothing in them is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import l2c_compile.samplers.loaded_sampler as saved_module
from l2c_compile import CacheSchedule, CompiledSampler, LoadedSampler, l2c_compile, load
from l2c_compile.backends.choice import EAGER
from l2c_compile.errors import (
    BackendError,
    FileFormatError,
    InputFormError,
    L2CError,
    SaveError,
    StaleConstantsError,
)
from l2c_compile.graphs.forms import TensorSpec
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import REGIONS
from l2c_compile.sampler_file.exported_program import compile_ahead_of_time

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "archive/data/extra/l2c_compile/"
MANIFEST, GRAPH = FOLDER + "manifest.json", FOLDER + "graph.jsonl"

Edit = Callable[[bytes], bytes]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        change: Tensor = gate * torch.tanh(self.inner(self.norm(x) * (1 + scale) + shift))
        return x + change


class Tiny(nn.Module):
    """A denoiser with a tied weight, a buffer and a constant that is not finite."""

    def __init__(self, dim: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.labels = nn.Embedding(4, dim)
        blocks = [Block(dim) for _ in range(depth)]
        blocks[1].inner.weight = blocks[0].inner.weight
        self.blocks = nn.ModuleList(blocks)
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([False, True] + [False] * (dim - 2)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t[:, None]) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        return torch.softmax(x.masked_fill(self.mask, float("-inf")), dim=-1)


def noisy_loop(denoiser: nn.Module, noise: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, object]:
    """Sample in 3 evaluations, drawing noise in between."""
    x, trace = noise, []
    for step in range(3):
        t = torch.full((x.shape[0],), 1 - step / 3, dtype=x.dtype)
        x = x - scale * denoiser(x, t, y=y) + 0.1 * torch.randn_like(x)
        trace.append(x)
    return {"latent": x, "trace": (trace[0], trace[1])}


def compiled(numerics: str = "bitwise") -> CompiledSampler:
    torch.manual_seed(0)
    schedule = CacheSchedule.from_table({"blocks.0.inner": [1, 0, 1], "blocks.1": [1, 0, 0]})
    return l2c_compile(Tiny().eval(), schedule, noisy_loop, numerics=numerics)  # type: ignore[arg-type]


def inputs(batch: int = 2, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, dim, generator=generator), torch.arange(batch) % 4


def flat(sampler: nn.Module) -> list[Tensor]:
    """Sample from one seed and return all of the result."""
    noise, y = inputs()
    torch.manual_seed(2)
    result = sampler(noise, y=y, scale=0.5)
    return [result["latent"], *result["trace"]]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


@pytest.fixture(scope="module")
def saved(sampler: CompiledSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tiny.pt2"
    noise, y = inputs()
    sampler.save(path, noise, y=y, scale=0.5)
    return path


def rewritten(
    source: Path,
    target: Path,
    edits: Mapping[str, Edit] | None = None,
    extra: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy an archive with some records edited or added and the hash of the graph put right."""
    records = {}
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            records[name] = (edits or {}).get(name, bytes)(archive.read(name))
    if GRAPH in (edits or {}):
        manifest = json.loads(records[MANIFEST])
        manifest["sha256"]["graph"] = hashlib.sha256(records[GRAPH]).hexdigest()
        records[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in {**records, **(extra or {})}.items():
            archive.writestr(name, content)
    return target


def refused(path: Path, match: str | None = None) -> None:
    start = time.process_time()
    with pytest.raises(FileFormatError, match=match):
        load(path)
    assert time.process_time() - start < 1


class TestRoundTrip:
    def test_a_new_process_without_the_class_gets_the_same_bits(
        self, sampler: CompiledSampler, saved: Path, tmp_path: Path
    ) -> None:
        rounding = compiled("rounding")
        noise, y = inputs()
        rounding.save(tmp_path / "rounding.pt2", noise, y=y, scale=0.5)
        safetensors.torch.save_file({"noise": noise, "y": y}, tmp_path / "inputs.safetensors")
        code = """
import sys, torch, safetensors.torch, l2c_compile
given = safetensors.torch.load_file("inputs.safetensors")
for number, path in enumerate(sys.argv[1:]):
    sampler = l2c_compile.load(path)
    torch.manual_seed(2)
    result = sampler(given["noise"], scale=0.5, y=given["y"])
    assert list(result) == ["latent", "trace"] and type(result["trace"]) is tuple
    tensors = [result["latent"], *result["trace"]]
    safetensors.torch.save_file({str(i): t for i, t in enumerate(tensors)}, f"{number}.safetensors")
assert not any("test_saved" in name for name in sys.modules)
"""
        command = [sys.executable, "-c", code, str(saved), "rounding.pt2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        for number, original in enumerate((sampler, rounding)):
            read = safetensors.torch.load_file(tmp_path / f"{number}.safetensors")
            assert equal([read[str(i)] for i in range(3)], flat(original))

    def test_the_backend_of_the_loaded_sampler_is_free(self, sampler: CompiledSampler, saved: Path) -> None:
        assert equal(flat(load(saved, backend="aot_eager")), flat(sampler))

    def test_the_loaded_graph_has_the_same_regions(
        self, sampler: CompiledSampler, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graphs: list[LoopGraph] = []

        def keep(graph: LoopGraph, *rest: object) -> nn.Module:
            graphs.append(graph)
            return graph.module()

        monkeypatch.setattr(saved_module, "lower_to_backend", keep)
        load(saved, backend="inductor")
        noise, y = inputs()
        graphs.append(sampler.capture(noise, y=y, scale=0.5).graph.copy())
        calls = []
        for graph in graphs:
            REGIONS.run(graph)
            found = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
            calls.append([(node.args[1], node.meta["evaluation"]) for node in found])
        assert calls[0] == calls[1]
        assert len(calls[0]) > 1

    def test_torch_opens_the_file_too(self, sampler: CompiledSampler, saved: Path) -> None:
        module = torch.export.load(saved).module()
        noise, y = inputs()
        torch.manual_seed(2)
        assert equal(list(module(noise, y)), flat(sampler))

    def test_it_says_what_it_is(self, sampler: CompiledSampler, saved: Path) -> None:
        noise, y = inputs()
        sampler.capture(noise, y=y, scale=0.5)
        loaded = load(saved)
        assert loaded.summary() == sampler.summary()
        assert loaded.schedule == sampler.schedule
        assert "Tiny" in repr(loaded)
        assert "condition 'scale': the value 0.5" in repr(loaded)
        assert loaded.versions["torch"] == torch.__version__
        assert "fold-constants" in loaded.passes

    def test_a_tied_weight_is_saved_once(self, saved: Path) -> None:
        names = dict.fromkeys(
            json.loads(line)["record"]
            for line in zipfile.ZipFile(saved).read(GRAPH).splitlines()
            if json.loads(line).get("tensor", "").endswith("inner.weight")
        )
        assert len(names) == 1

    def test_equal_samplers_are_equal_files(self, sampler: CompiledSampler, saved: Path, tmp_path: Path) -> None:
        noise, y = inputs()
        sampler.save(tmp_path / "again.pt2", noise, y=y, scale=0.5)
        assert (tmp_path / "again.pt2").read_bytes() == saved.read_bytes()

    def test_other_strides_are_copied(self, saved: Path, sampler: CompiledSampler) -> None:
        noise, y = inputs()
        torch.manual_seed(2)
        result = load(saved)(noise.T.contiguous().T, y=y, scale=0.5)
        assert torch.equal(result["latent"], flat(sampler)[0])

    def test_a_device_of_the_file_can_be_mapped(self, saved: Path, tmp_path: Path, sampler: CompiledSampler) -> None:
        elsewhere = {name: lambda content: content.replace(b'"cpu"', b'"cuda:7"') for name in (GRAPH, MANIFEST)}
        path = rewritten(saved, tmp_path / "cuda.pt2", elsewhere)
        assert equal(flat(load(path, map_location="cpu")), flat(sampler))
        assert equal(flat(load(path, map_location={"cuda:7": "cpu"})), flat(sampler))
        with pytest.raises(BackendError, match="saved on cuda:7"):
            load(path)


class TestInputs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"noise": torch.zeros(3, 6)}, r"noise was saved as float32 \[2, 6\] on cpu, got float32 \[3, 6\]"),
            ({"noise": torch.zeros(2, 6, dtype=torch.float64)}, "got float64"),
            ({"noise": (torch.zeros(2, 6),)}, "give the same containers"),
            ({"scale": 1}, "condition 'scale' was saved as the value 0.5, got the value 1"),
            ({"scale": torch.tensor(0.5)}, "got float32"),
            ({"y": 3}, "condition 'y' was saved as int64"),
            ({"z": 3}, "saved with conditions 'y', 'scale', got 'y', 'scale', 'z'"),
        ],
    )
    def test_another_form_is_refused_and_named(self, saved: Path, change: dict[str, object], message: str) -> None:
        noise, y = inputs()
        given: dict[str, object] = {"noise": noise, "y": y, "scale": 0.5, **change}
        with pytest.raises(InputFormError, match=message):
            load(saved)(**given)

    def test_an_unknown_backend_is_refused(self, saved: Path) -> None:
        with pytest.raises(BackendError, match="knows no backend"):
            load(saved, backend="inductr")


class TestSave:
    def test_nothing_is_saved_before_anything_is_compiled(self, tmp_path: Path) -> None:
        with pytest.raises(L2CError, match="nothing is compiled"):
            compiled().save(tmp_path / "x.pt2")

    def test_the_suffix_is_asked_for(self, sampler: CompiledSampler, tmp_path: Path) -> None:
        noise, y = inputs()
        with pytest.raises(SaveError, match=r"name it '.*x\.pt2'"):
            sampler.save(tmp_path / "x.pt", noise, y=y, scale=0.5)

    def test_an_interrupted_save_leaves_the_old_file(
        self, sampler: CompiledSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x.pt2"
        path.write_bytes(b"old")

        def fail(*args: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
        noise, y = inputs()
        with pytest.raises(OSError, match="disk full"):
            sampler.save(path, noise, y=y, scale=0.5)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_file_cannot_hold_is_named(self, tmp_path: Path) -> None:
        pair = namedtuple("pair", "latent")

        def loop(denoiser: nn.Module, noise: Tensor, *, y: Tensor, wrap: object = None) -> object:
            latent = denoiser(noise, torch.ones(2), y=y)
            return pair(latent) if wrap == "pair" else latent

        noise, y = inputs()
        sampler = l2c_compile(Tiny().eval(), CacheSchedule.all_compute(1), loop)
        with pytest.raises(SaveError, match="the loop's result is or contains a pair"):
            sampler.save(tmp_path / "x.pt2", noise, y=y, wrap="pair")
        with pytest.raises(SaveError, match="condition 'wrap' is <class 'int'>"):
            sampler.save(tmp_path / "x.pt2", noise, y=y, wrap=int)
        assert list(tmp_path.iterdir()) == []

    def test_an_operator_of_another_library_is_named(self, tmp_path: Path) -> None:
        @torch.library.custom_op("test_saved::double", mutates_args=())
        def double(x: Tensor) -> Tensor:
            return x * 2

        double.register_fake(torch.empty_like)

        class Foreign(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                doubled: Tensor = double(x)
                return doubled

        sampler = l2c_compile(Foreign(), CacheSchedule.all_compute(1), lambda denoiser, noise: denoiser(noise))
        with pytest.raises(SaveError, match=r"test_saved\.double\.default cannot be saved.*another library"):
            sampler.save(tmp_path / "x.pt2", torch.zeros(2))

    def test_an_aot_package_is_written_beside(
        self, sampler: CompiledSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = []

        def package(program: torch.export.ExportedProgram, package_path: str) -> None:
            given.append(program.example_inputs)
            Path(package_path).write_bytes(b"native")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
        noise, y = inputs()
        sampler.save(tmp_path / "x.pt2", noise, y=y, scale=0.5, aot_inductor=True)
        assert (tmp_path / "x.aoti.pt2").read_bytes() == b"native"
        assert [TensorSpec.of(t) for t in given[0][0]] == [TensorSpec.of(t) for t in (noise, y)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.aoti.pt2", "x.pt2"]

    def test_a_graph_of_regions_is_too_much_for_aot_inductor(self, sampler: CompiledSampler, tmp_path: Path) -> None:
        noise, y = inputs()
        graph = sampler.capture(noise, y=y, scale=0.5).graph.copy()
        REGIONS.run(graph)
        with pytest.raises(BackendError, match="load with backend='inductor'"):
            compile_ahead_of_time(graph, tmp_path / "x.pt2")


class TestRefresh:
    def test_a_saved_sampler_follows_weights_that_changed(self, tmp_path: Path) -> None:
        sampler = compiled("rounding")
        before = flat(sampler)
        with torch.no_grad():
            for weight in sampler.model.parameters():
                weight.add_(0.1)
        with pytest.raises(StaleConstantsError, match="changed since"):
            sampler.save(tmp_path / "x.pt2")
        sampler.refresh()
        sampler.save(tmp_path / "x.pt2")
        after = flat(sampler)
        assert equal(flat(load(tmp_path / "x.pt2")), after)
        assert not equal(before, after)

    @pytest.mark.parametrize("numerics", ["bitwise", "rounding"])
    @pytest.mark.parametrize("replace", [False, True])
    def test_each_weight_is_followed_or_found_stale(self, numerics: str, replace: bool) -> None:
        sampler = compiled(numerics)
        noise, y = inputs()
        sampler.capture(noise, y=y, scale=0.5)
        torch.manual_seed(3)
        stale = set()
        for name, weight in list(sampler.model.named_parameters()):
            changed = weight.detach() + torch.randn_like(weight)
            owner, _, attribute = name.rpartition(".")
            if replace:
                setattr(sampler.model.get_submodule(owner), attribute, nn.Parameter(changed))
            else:
                with torch.no_grad():
                    weight.copy_(changed)
            try:
                report = sampler.verify(noise, y=y, scale=0.5)
            except StaleConstantsError:
                stale.add(name)
                sampler.refresh()
                report = sampler.verify(noise, y=y, scale=0.5)
            # Rounding: a few operations in another order, at 3 evaluations of values around 1.
            limit = 0 if numerics == "bitwise" else 100 * torch.finfo(noise.dtype).eps
            assert report.relative_error <= limit, name
        # Only timesteps meet these two before they meet the input.
        assert stale == {"time.weight", "time.bias"}

    def test_a_program_of_weights_that_moved_is_not_saved(self, tmp_path: Path) -> None:
        sampler = compiled()
        noise, y = inputs()
        sampler.capture(noise, y=y, scale=0.5)
        sampler.model.double()
        with pytest.raises(StaleConstantsError, match="give save the inputs"):
            sampler.save(tmp_path / "x.pt2")


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
            ({"surprise": 1}, "wants the keys"),
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


def test_loaded_samplers_are_modules_in_evaluation_mode(saved: Path) -> None:
    loaded = load(saved, backend=EAGER)
    assert isinstance(loaded, LoadedSampler)
    assert not loaded.training
    assert not any(tensor.requires_grad for tensor in loaded.state_dict().values())
