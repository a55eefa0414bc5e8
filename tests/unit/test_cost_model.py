"""What a schedule will save, before it is compiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from l2c_compile import CacheSchedule, CompiledSampler, L2CError, l2c_compile
from l2c_compile.analyses.cost import NodeTimes, bytes_moved
from l2c_compile.analyses.prediction import Prediction
from l2c_compile.cli.main import app

WIDE, DIM = 256, 4


class Uneven(nn.Module):
    """Nearly all of the work is in one of two sublayers."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy = nn.Sequential(nn.Linear(DIM, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, DIM))
        self.light = nn.Linear(DIM, DIM)

    def forward(self, x_BD: Tensor, t_B: Tensor) -> Tensor:
        x_BD = x_BD + self.heavy(x_BD) * t_B[:, None]
        result: Tensor = x_BD + self.light(x_BD)
        return result


def loop(denoiser: Callable[..., Tensor], noise: Tensor) -> Tensor:
    x = noise
    for i in range(4):
        x = x - 0.1 * denoiser(x, torch.full((x.shape[0],), float(4 - i), device=x.device))
    return x


def sampler(rows: dict[str, list[int]], device: str = "cpu") -> CompiledSampler:
    torch.manual_seed(0)
    return l2c_compile(Uneven().eval().to(device), CacheSchedule.from_table(rows), loop)


def predicted(rows: dict[str, list[int]], device: str = "cpu") -> Prediction:
    return sampler(rows, device).predict(torch.zeros(64, DIM, device=device))


def test_a_schedule_that_skips_the_work_is_predicted_to_save_time() -> None:
    prediction = predicted({"heavy": [1, 0, 0, 0]})
    assert prediction.time_ratio is not None
    # A quarter of the heavy work is left; the rest is the loop's own.
    assert 0.2 < prediction.time_ratio < 0.8
    assert 0.25 < prediction.multiply_adds_kept < 0.27
    assert prediction.bytes_moved_kept is not None
    assert prediction.bytes_moved_kept < 0.5
    assert prediction.cache_bytes == 64 * DIM * 4
    assert prediction.warning is None
    assert "x" in str(prediction)


def test_a_schedule_that_reuses_nothing_is_warned_about() -> None:
    prediction = predicted({"heavy": [1, 1, 1, 1]})
    assert prediction.multiply_adds_kept == prediction.bytes_moved_kept == prediction.time_ratio == 1.0
    assert prediction.warning is not None
    assert "reuses nothing" in str(prediction)


def test_a_schedule_that_skips_next_to_nothing_is_warned_about() -> None:
    prediction = predicted({"light": [1, 0, 1, 1]}, "meta")
    assert prediction.warning is not None
    assert "no gain is to be expected" in prediction.warning


def test_without_memory_for_weights_work_is_counted_and_no_time_measured() -> None:
    prediction = predicted({"heavy": [1, 0, 0, 0]}, "meta")
    assert prediction.seconds is prediction.time_ratio is prediction.bytes_moved_kept is None
    assert prediction.multiply_adds_kept == predicted({"heavy": [1, 0, 0, 0]}).multiply_adds_kept
    assert "time" not in str(prediction)


def test_predicting_compiles_nothing() -> None:
    cached = sampler({"heavy": [1, 0, 0, 0]})
    cached.predict(torch.zeros(2, DIM))
    with pytest.raises(L2CError):
        _ = cached.graph_module


def test_a_form_is_measured_once_whatever_its_numbers() -> None:
    cached = sampler({"heavy": [1, 1, 1, 1]})
    nodes = cached.capture(torch.zeros(2, DIM)).graph.graph.nodes
    times = NodeTimes(torch.device("cpu"), rounds=1)
    times.measure(nodes)
    heavy = [node for node in nodes if "linear" in node.name]
    assert len(heavy) == 16
    # From 4 to 256, from 256 to 256, back to 4, and the light one.
    assert len({times.of(node) for node in heavy}) == 4
    assert times.total(nodes) >= times.total(heavy) > 0
    with pytest.raises(KeyError):
        NodeTimes(torch.device("cpu")).of(heavy[0])


def test_a_view_moves_no_bytes_and_a_product_reads_its_weight() -> None:
    nodes = sampler({"heavy": [1] * 4}).capture(torch.zeros(2, DIM)).graph.graph.nodes
    middle = next(node for node in nodes if "linear" in node.name and node.meta["val"].shape == (2, WIDE))
    assert bytes_moved(middle) == 4 * (2 * DIM + DIM * WIDE + WIDE + 2 * WIDE)
    assert all(bytes_moved(node) == 0 for node in nodes if "unsqueeze" in node.name or node.op != "call_function")


def written(tmp_path: Path, rows: dict[str, list[int]]) -> str:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table(rows).save(path)
    assert json.loads(path.read_text())
    return str(path)


def test_l2c_predict_prices_a_file_on_the_digits_model(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file])
    assert result.exit_code == 0, result.output
    assert "digits, ddim, 2 evaluations" in result.output
    assert "of the time without caching" in result.output


def test_l2c_predict_counts_on_a_published_size(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file, "--model", "dit-s/8"])
    assert result.exit_code == 0, result.output
    assert "multiply-adds" in result.output
    assert "time, eager" not in result.output


@pytest.mark.parametrize(
    ("options", "message"), [(["--model", "dit-xxl/2"], "no model is called"), (["--steps", "7"], "2 evaluations")]
)
def test_l2c_predict_says_what_does_not_fit(tmp_path: Path, options: list[str], message: str) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file, *options])
    assert isinstance(result.exception, L2CError)
    assert message in str(result.exception)
