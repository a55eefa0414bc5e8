"""What is saved is loaded again, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import l2c_compile.samplers.loaded_sampler as saved_module
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, load
from l2c_compile.errors import BackendError, OperandError
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import REGIONS
from tests.command_line import l2c
from tests.root import ROOT
from tests.saved_samplers import (
    GRAPH,
    MANIFEST,
    compiled,
    equal,
    flat,
    inputs,
    rewritten,
    saved_in,
    with_lines,
)


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


@pytest.fixture(scope="module")
def saved(sampler: CompiledSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_in(tmp_path_factory.mktemp("saved"), sampler)


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
        assert vars(loaded.summary()).items() <= vars(sampler.summary()).items()
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

    def test_a_product_that_torch_folds_by_gradients_is_the_same(self, tmp_path: Path) -> None:
        # Torch multiplies a transposed input with a weight in another order where the weight requires a gradient.
        class Mixer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6)
                self.frozen.requires_grad_(False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                rows: torch.Tensor = self.frozen(self.mix(x.transpose(1, 2)))
                return rows.transpose(1, 2)

        torch.manual_seed(0)
        mixer = Mixer()
        original = l2c_compile(mixer, CacheSchedule.all_compute(1), lambda denoiser, noise: denoiser(noise))
        noise = torch.randn(2, 6, 5)
        original.save(tmp_path / "x.pt2", noise)
        loaded = load(tmp_path / "x.pt2")
        assert torch.equal(loaded(noise), original(noise))
        with torch.no_grad():
            assert torch.equal(loaded(noise), mixer(noise))
        assert [weight.requires_grad for weight in loaded.parameters()] == [True, True]

    def test_a_file_of_version_1_is_read(self, saved: Path, tmp_path: Path, sampler: CompiledSampler) -> None:
        older = {
            GRAPH: lambda content: content.replace(b',"requires_grad":true', b""),
            MANIFEST: lambda content: content.replace(b'"version": 2', b'"version": 1'),
        }
        loaded = load(rewritten(saved, tmp_path / "old.pt2", older))
        assert not list(loaded.parameters())
        assert equal(flat(loaded), flat(sampler))


class TestOperands:
    def test_a_label_out_of_range_names_the_operator(self, saved: Path) -> None:
        noise, y = inputs()
        match = r"aten::embedding in module 'labels' in evaluation 0 does not take.*index out of range.*give conditions"
        with pytest.raises(OperandError, match=match):
            load(saved)(noise, y=y + 9, scale=0.5)

    def test_random_numbers_are_left_as_they_were_by_the_search_for_the_operator(self, saved: Path) -> None:
        loaded = load(saved)
        noise, y = inputs()
        state = torch.get_rng_state()
        with pytest.raises(OperandError):
            loaded(noise, y=y + 9, scale=0.5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(loaded(noise, y=y, scale=0.5)["latent"].isfinite().all(), torch.tensor(True))


def test_the_commands_refuse_a_forged_file_in_one_line(saved: Path, tmp_path: Path) -> None:
    line = {"op": "aten::adaptive_max_pool2d_backward", "args": ["%0", "%0", "%1"]}
    forged = with_lines(saved, tmp_path / "forged.pt2", line)
    for command in ("verify", "inspect"):
        done = l2c(command, forged)
        assert done.code == 2
        assert "Traceback" not in done.out + done.err
