"""Hold compiled loops against the eager loop with hooks: each dtype, passes that change no bit and passes that round.

Options: ``--model dit-xl`` (four blocks of DiT-XL/2's width) ``--depth 4`` ``--width N`` ``--steps 4`` ``--batch 2``
``--schedule every-second`` ``--device cpu`` ``--dtypes float32 bfloat16 float16`` ``--backend inductor`` and
``--sides``: ``bitwise`` and ``rounding`` run eagerly with these passes, ``compiled`` through the backend. TF32 is off.

``relative_error`` is max |ours - reference| / max |reference|, ``over_allowed`` the same over 64 units of the dtype an
evaluation: sums of products in another order in every block, half of what ``l2c demo`` allows for packed weights, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.progress import Progress

from bench.options import Options
from bench.report import Condition, Row
from bench.workloads import MODELS, relative_error, without_tf32, workload

_SIDES: Mapping[str, Mapping[str, str]] = {
    "bitwise": {"backend": "eager", "numerics": "bitwise"},
    "rounding": {"backend": "eager", "numerics": "rounding"},
    "compiled": {"numerics": "rounding"},
}
_UNITS = 64


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the error of each dtype and side, and its ratio to what is allowed."""
    parser = Options("equality")
    parser.add_argument("--model", default="dit-xl", choices=[name for name in MODELS if name != "uvit"])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(_SIDES), choices=_SIDES)
    parser.add_device("cpu", "cuda")
    parser.add_loop(schedule="every-second", dtypes=True)
    options = parser.read(args)
    task = progress.add_task("equality", total=len(options.dtypes) * len(options.sides))
    rows: list[Row] = []
    for dtype in options.dtypes:
        work = workload(options.model, options, dtype=dtype)
        allowed = _UNITS * torch.finfo(work.noise.dtype).eps * work.loop.num_evaluations
        for side in options.sides:
            with without_tf32():
                sampler = work.sampler(work.schedule, **_SIDES[side])
                error = relative_error(work.sample(sampler), work.sample_with_hooks())
            where: dict[str, Condition] = {**work.conditions, "backend": options.backend, **_SIDES[side]}
            rows.append(Row("relative_error", error, "", where, device=options.device))
            rows.append(Row("over_allowed", error / allowed, "", where, device=options.device))
            progress.advance(task)
    return rows
