"""Loop graphs of a tiny DiT, and the projections of its conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile import CacheSchedule
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import BITWISE
from tests.tiny import draw, tiny_dit, unrolled

aten = torch.ops.aten
DIM = 16


INPUTS = (draw(2, 4, 4, 4), torch.tensor([1, 3]))


# The two sublayers of a DiT block project their modulation, 6 times DIM columns, from timestep and label.
ROWS = {
    "blocks.0.attn": [1, 0, 1, 0],
    "blocks.0.mlp": [1, 1, 1, 0],
    "blocks.1.attn": [1, 1, 1, 0],
    "blocks.1.mlp": [1, 0, 1, 0],
}


def loop_graph(rows: dict[str, list[int]]) -> LoopGraph:
    schedule = CacheSchedule.from_table(rows)
    noise, labels = INPUTS
    graph = unrolled(tiny_dit(), schedule, steps_of_dit(schedule.num_evaluations), noise, {"y": labels})
    BITWISE.run(graph)
    return graph


def steps_of_dit(count: int):  # type: ignore[no-untyped-def]  # noqa: ANN201
    def loop(denoiser, noise, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        x = noise
        for i in range(count):
            x = x - 0.1 * denoiser(x, torch.full((len(x),), count - i), y)[:, :4]
        return x

    return loop


def projections(graph: LoopGraph) -> list[tuple[int, int]]:
    """Return (rows, columns) of every projection of the conditioning vector that is made, in order."""
    shapes = [n.meta["val"].shape for n in graph.graph.find_nodes(op="call_function", target=aten.linear.default)]
    return [(s[0], s[1]) for s in shapes if len(s) == 2]


def close(a: Tensor, b: Tensor) -> bool:
    # A product of another shape may sum its 16 terms in another order; four evaluations of two blocks pass that on.
    return torch.allclose(a, b, rtol=0, atol=64 * torch.finfo(a.dtype).eps * float(b.abs().max()))
