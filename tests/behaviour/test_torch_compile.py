"""A compiled sampler inside ``torch.compile(sampler, backend=..., fullgraph=True)``."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.models import DiT

QUICK = ("eager", "aot_eager", "aot_ts", "inductor", "l2c")
RARE = pytest.mark.slow(reason="torch has some twenty backends, most of them for debugging it")
BACKENDS = [
    pytest.param(name, marks=() if name in QUICK else RARE) for name in torch._dynamo.list_backends(exclude_tags=())
]
# Roundings of values of order 1 where a backend fuses or reorders: two evaluations of a few operations each.
TOLERANCE = 16 * 2**-23


class Toy(nn.Module):
    """As little as a schedule and constant folding can work on."""

    def __init__(self) -> None:
        super().__init__()
        self.times = nn.Linear(1, 4)
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.outer(x + self.inner(x) + self.times(t) * y)
        return result


def toy_loop(denoiser: nn.Module, noise: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    x = noise
    for t in (0.9, 0.4):
        x = x - 0.1 * scale * denoiser(x, torch.full((1, 1), t), y)
    return x


def dit_loop(denoiser: nn.Module, noise: Tensor, y: Tensor) -> Tensor:
    x = noise
    for t in (900, 400):
        x = x - 0.1 * denoiser(x, torch.full((x.shape[0],), t), y)[:, :2]
    return x


def toy_sampler(backend: str = "eager") -> CompiledSampler:
    torch.manual_seed(0)
    return l2c_compile(Toy().eval(), CacheSchedule.from_table({"inner": [1, 0]}), toy_loop, backend=backend)


def toy_inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4), torch.randn(batch, 1)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.pgo.reset_code_state()  # else floats of other tests make those of this one dynamic
    yield
    # reset() trips over what is collected while it runs.
    gc.collect()
    torch._dynamo.reset()


def skip_unless_it_runs(backend: str) -> None:
    """Skip a backend that cannot compile one linear layer here."""
    try:
        torch.compile(nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    except Exception as error:
        assert backend not in ("eager", "aot_eager", "inductor"), f"torch's own backend {backend} does not run"
        pytest.skip(f"{backend} cannot compile a linear layer here: {' '.join(str(error).split())[:300]}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_takes_a_sampler_without_a_graph_break(backend: str) -> None:
    skip_unless_it_runs(backend)
    sampler = toy_sampler()
    noise, y = toy_inputs()
    wanted = sampler(noise, y=y)
    got = torch.compile(sampler, backend=backend, fullgraph=True)(noise, y=y)
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_explain_finds_one_graph_and_no_break(backend: str) -> None:
    sampler = toy_sampler(backend)
    noise, y = toy_inputs()
    sampler.capture(noise, y=y)
    explained = torch._dynamo.explain(sampler)(noise, y=y)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_transformer_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=2, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    sampler = l2c_compile(model.eval(), CacheSchedule.from_table({"blocks.0.attn": [1, 0]}), dit_loop)
    noise, y = torch.randn(2, 2, 4, 4), torch.tensor([0, 2])
    wanted = sampler(noise, y=y)
    assert torch.equal(torch.compile(sampler, backend="aot_eager", fullgraph=True)(noise, y=y), wanted)


def test_each_captured_form_is_found_again() -> None:
    sampler = toy_sampler()
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    for batch, scale in ((2, 1.0), (3, 1.0), (2, 0.0), (2, -0.0), (2, 2.0)):
        noise, y = toy_inputs(batch)
        wanted = sampler(noise, y=y, scale=scale)
        assert torch.equal(compiled(noise, y=y, scale=scale), wanted)


def test_a_form_that_was_not_captured_is_an_error() -> None:
    sampler = toy_sampler()
    noise, y = toy_inputs()
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call sampler\.capture\(noise, \*\*conditions\)"):
        compiled(noise, y=y)
    sampler.capture(noise, y=y)
    assert torch.equal(compiled(noise, y=y), sampler(noise, y=y))


def test_stale_constants_are_found_when_it_is_traced_and_refreshed_ones_are_used() -> None:
    sampler = toy_sampler()
    noise, y = toy_inputs()
    before = sampler(noise, y=y)
    compiled = torch.compile(sampler, backend="eager", fullgraph=True)
    with torch.no_grad():
        sampler.model.times.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    with pytest.raises(Exception, match=r"call refresh\(\)"):
        compiled(noise, y=y)
    sampler.refresh()
    got = compiled(noise, y=y)
    assert torch.equal(got, sampler(noise, y=y))
    assert not torch.equal(got, before)
