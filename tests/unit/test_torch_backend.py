"""torch.compile(sample, backend="l2c") against the eager oracle, and which options it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l2c_compile.torch_backend as backend_module
from l2c_compile import CacheSchedule, Router, Site, run_reference
from l2c_compile.loops import DDIM, BuiltInLoop, DPMSolver, FlowEuler, Guidance
from l2c_compile.models import DiT
from l2c_compile.torch_backend import l2c
from tests.dynamo_loops import TWO, Toy, fails, toy_loop
from tests.root import ROOT

STEPS = ((900, 0.95, -0.3), (500, 0.9, -0.2), (100, 0.8, -0.1))


Loop = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=2, hidden_size=8, depth=2, num_heads=2, num_classes=3)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


def plain_loop(denoiser: nn.Module, noise: Tensor, y: Tensor) -> Tensor:
    x = noise
    for t, keep, change in STEPS:
        x = keep * x + change * denoiser(x, torch.full((x.shape[0],), t), y)[:, :2]
    return x


def guided_loop(denoiser: nn.Module, noise: Tensor, y: Tensor) -> Tensor:
    """Unbatched guidance and a random draw: two evaluations a step."""
    x, null = noise, torch.full_like(y, 3)
    for t, keep, change in STEPS[:2]:
        t_B = torch.full((x.shape[0],), t)
        cond, uncond = denoiser(x, t_B, y)[:, :2], denoiser(x, t_B, null)[:, :2]
        x = keep * x + change * (uncond + 2.0 * (cond - uncond)) + 0.1 * torch.randn_like(x)
    return x


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 2, 4, 4), torch.arange(batch) % 3


def compiled(loop: Loop, denoiser: nn.Module, router: object, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    def sample(noise: Tensor, y: Tensor) -> Tensor:
        return loop(denoiser, noise, y)

    given: dict[str, Any] = {"router": router, "backend": "eager", **options}
    function: Callable[[Tensor, Tensor], Tensor] = torch.compile(sample, backend=l2c, options=given, fullgraph=True)
    return function


def check_equals_reference(loop: Loop, denoiser: nn.Module, schedule: CacheSchedule, batch: int = 2) -> None:
    noise, y = inputs(batch)
    torch.manual_seed(7)
    wanted = run_reference(denoiser, loop, schedule, noise, {"y": y})
    with torch.no_grad():
        torch.manual_seed(7)
        got = compiled(loop, denoiser, schedule)(noise, y)
        torch.manual_seed(7)
        uncached = loop(denoiser, noise, y)
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert torch.equal(wanted, uncached) == (not schedule.reuses)


@pytest.mark.parametrize(
    "loop",
    [
        DDIM(steps=4, guidance=Guidance(scale=2.0, null={"y": 3}, channels=2)),
        DDIM(steps=4),
        DPMSolver(evaluations=4),
        FlowEuler(steps=4),
    ],
    ids=["ddim guided", "ddim", "dpm_solver", "flow_euler"],
)
@pytest.mark.parametrize(
    "numerics",
    ["bitwise", pytest.param("rounding", marks=pytest.mark.slow(reason="the loops differ before the passes"))],
)
def test_the_loops_of_the_package(loop: BuiltInLoop, numerics: str) -> None:
    torch.manual_seed(0)
    model = DiT(
        input_size=4, patch_size=2, in_channels=2, hidden_size=8, depth=2, num_heads=2, num_classes=3, learn_sigma=False
    )
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    model.eval().requires_grad_(False)
    schedule = CacheSchedule.from_table({"blocks.*.attn": [1, 0, 1, 0], "blocks.*.mlp": [1, 1, 0, 1]})
    noise, y = inputs()
    wanted = run_reference(model, loop, schedule, noise, {"y": y})
    assert isinstance(wanted, Tensor)

    def sample(noise: Tensor, y: Tensor) -> Tensor:
        return loop(model, noise, y=y)

    options: Any = {"router": schedule, "backend": "eager", "numerics": numerics}
    with torch.no_grad():
        got = torch.compile(sample, backend=l2c, options=options, fullgraph=True)(noise, y)
    if numerics == "bitwise":
        assert torch.equal(got, wanted)
    else:
        # The same sums in another order: 4 evaluations of 2 blocks of width 8.
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=256 * torch.finfo(got.dtype).eps * float(wanted.abs().max())
        )


@pytest.mark.parametrize(
    ("loop", "table", "branches"),
    [
        (plain_loop, {"blocks.0.attn": [1, 0, 0], "blocks.1.mlp": [1, 1, 0]}, 1),
        (plain_loop, {"blocks.*.attn": [1, 0, 1], "blocks.1": [1, 1, 0]}, 1),
        (plain_loop, {"delta(blocks.0..blocks.1)": [1, 0, 0]}, 1),
        (guided_loop, {"blocks.0.attn": [1, 1, 0, 0], "blocks.1.mlp": [1, 1, 1, 0]}, 2),
    ],
    ids=["sublayers", "pattern", "change-of-a-run", "unbatched-guidance"],
)
def test_a_function_with_a_schedule_equals_the_reference_bit_for_bit(
    loop: Loop, table: dict[str, list[int]], branches: int, dit: DiT
) -> None:
    schedule = CacheSchedule.from_table(table, branches=branches).resolve([p for p, _ in dit.named_modules()])
    check_equals_reference(loop, dit, schedule)


def test_reuse_removes_the_work(dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def keep(graph: Any, *rest: object, **options: object) -> Any:  # noqa: ANN401
        graphs.append(graph)
        return graph.module()

    monkeypatch.setattr(backend_module, "lower_to_backend", keep)
    noise, y = inputs()
    for row in ([1, 1, 1], [1, 0, 0]):
        with torch.no_grad():
            compiled(plain_loop, dit, CacheSchedule.from_table({"blocks.0.attn": row}))(noise, y)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert [len(g.graph.find_nodes(op="call_function", target=attention)) for g in graphs] == [6, 4]
    assert [g.num_noise for g in graphs] == [1, 1]


def test_every_shape_is_compiled_apart_and_new_weights_are_used(dit: DiT) -> None:
    schedule = CacheSchedule.from_table({"blocks.0.attn": [1, 0]})

    def loop(denoiser: nn.Module, noise: Tensor, y: Tensor) -> Tensor:
        x = noise - 0.1 * denoiser(noise, torch.full((noise.shape[0],), 9), y)[:, :2]
        result: Tensor = x - 0.1 * denoiser(x, torch.full((noise.shape[0],), 3), y)[:, :2]
        return result

    sample = compiled(loop, dit, schedule)
    for batch in (1, 3):
        noise, y = inputs(batch)
        with torch.no_grad():
            got = sample(noise, y)
        assert torch.equal(got, run_reference(dit, loop, schedule, noise, {"y": y}))  # type: ignore[arg-type]
    weight = dit.blocks[1].mlp.fc1.weight  # type: ignore[union-attr]
    before = weight.clone()  # type: ignore[operator]
    with torch.no_grad():
        weight.mul_(2.0)  # type: ignore[operator]
        got = sample(noise, y)
        wanted = run_reference(dit, loop, schedule, noise, {"y": y})
        weight.copy_(before)  # type: ignore[operator]
    assert torch.equal(got, wanted)  # type: ignore[arg-type]


def test_inductor_is_the_inner_backend_unless_another_is_given() -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    schedule = CacheSchedule.from_table({"inner": [1, 0]})

    @torch.no_grad()
    def sample(x: Tensor) -> Tensor:
        return toy_loop(model, x)

    x = torch.randn(2, 4)
    options: dict[str, Any] = {"router": schedule}
    got = torch.compile(sample, backend=l2c, options=options)(x)
    # Three additions and two 4-term products an evaluation: a few roundings of values of order 1.
    torch.testing.assert_close(got, run_reference(model, toy_loop, schedule, x, {}), rtol=0, atol=16 * 2**-23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a router"),
        ({"router": 3}, "wants a Router"),
        ({"router": TWO, "threshold": 0.5}, "no scores for a threshold"),
        ({"router": TWO, "treshold": 0.5}, "did you mean 'threshold'"),
        ({"router": TWO, "backend": "inducto"}, "did you mean 'inductor'"),
        ({"router": TWO, "denoiser": "mode"}, "did you mean 'model'"),
        ({"router": CacheSchedule.from_table({"iner": [1, 0]})}, "did you mean|no module that the graph calls"),
        ({"router": CacheSchedule.from_table({"inner@1": [1, 0]})}, "calls module 'inner' 1 times"),
        ({"router": CacheSchedule.from_table({"same": [1, 0]})}, "only returns its input"),
        ({"router": CacheSchedule.from_table({"inner": [1, 0, 0]})}, "3 evaluations.*'model' 2 times.*fullgraph=True"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_an_error(options: dict[str, object], message: str) -> None:
    model = Toy().eval()
    fails(lambda x: toy_loop(model, x), message, **options)


def test_a_router_file_and_grad_mode_inside_the_function(tmp_path: Path) -> None:
    model = Toy().eval()
    router = Router(torch.tensor([[0.9], [0.1]]), (Site("inner"),), cacheable=(1,), threshold=0.5)
    router.save(tmp_path / "router.safetensors")

    @torch.no_grad()
    def sample(x: Tensor) -> Tensor:
        return toy_loop(model, x)

    x = torch.randn(2, 4)
    wanted = run_reference(model, toy_loop, TWO, x, {})
    options: dict[str, Any] = {"router": tmp_path / "router.safetensors", "backend": "eager"}
    assert torch.equal(torch.compile(sample, backend=l2c, options=options)(x), wanted)  # type: ignore[arg-type]


def test_the_entry_point_makes_the_name_known_to_torch(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = tmp_path / "l2c_compile-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: l2c-compile\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items()]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    code = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}; import torch\n"
        "assert 'l2c' in torch._dynamo.list_backends()\n"
        "torch.compile(lambda x: x + 1, backend='l2c')(torch.ones(2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "backend='l2c' raised" in done.stderr
    assert "backend 'l2c' needs a router" in done.stderr
