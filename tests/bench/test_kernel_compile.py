"""The kernels compile for GPUs that are not here, and spill no register."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from bench.speed.kernel_compile import CONFIGS, TARGETS, Config, compile_for
from l2c_compile.kernels._launch import INTERPRETED, PACKED

# A few of CONFIGS, at the two widths: `python -m bench kernel-compile` has them all.
WIDTHS = (1152, 4096)
BOUNDED = [
    *(Config("cached_residual", dim, 12, form="full") for dim in WIDTHS),
    *(Config("cached_residual_norm", dim, 5) for dim in WIDTHS),
    *(
        Config("cached_residual_norm", dim, 5, form="packed", packed=packed)
        for dim, packed in zip(WIDTHS, PACKED, strict=True)
    ),
    *(Config("pack_cache", dim, packed=packed) for dim in WIDTHS for packed in PACKED),
    Config("cached_residual", 1152, 24, batch=2),
    Config("cached_residual", 4096, 12, dtype=torch.float32),
    # A size of 1 is a constant to the compiler, which has no methods.
    Config("cached_residual_norm", 1, 5),
]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("config", "target"),
    # The longest run there is takes as long to compile as four others: for one target.
    [*itertools.product(BOUNDED, TARGETS), (Config("cached_residual", 1152, 56, batch=2), "sm_90")],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.conditions().values())),
)
def test_a_kernel_compiles_for_a_gpu_that_is_not_here_without_spills(config: Config, target: str) -> None:
    usage = compile_for(config.launch(TARGETS[target]), TARGETS[target])
    assert usage.spill_bytes == 0
    assert 0 < usage.registers <= 512
    # What an sm_80 gives a program without being asked.
    assert usage.shared_bytes <= 48 * 1024


def test_every_kernel_is_compiled_at_both_widths() -> None:
    kernels = {"cached_residual", "cached_residual_norm", "pack_cache"}
    for configs in (BOUNDED, CONFIGS):
        assert {(config.kernel, config.dim) for config in configs} >= {
            (name, dim) for name in kernels for dim in WIDTHS
        }


def test_loads_are_vectors_of_16_bytes() -> None:
    """A row of 1152 bfloat16 and a gate that is a chunk of a projection are both read 8 elements at a time."""
    import triton

    from bench.speed.kernel_compile import source

    launch = Config("cached_residual", 1152, 2).launch(TARGETS["sm_90"])
    compiled = triton.compile(source(launch), target=TARGETS["sm_90"], options={"num_warps": launch.num_warps})
    assert set(re.findall(r"ld\.global\S*", compiled.asm["ptx"])) == {"ld.global.v4.b32"}
