"""Compile every kernel for GPUs that are not here: registers, spills and shared memory.

Triton compiles for a target it has no driver for. Registers and stack are read from the finished machine code: for
NVIDIA by the ``cuobjdump -res-usage`` that Triton's wheel ships, for AMD from the notes in the assembly. A kernel here
has no arrays, so bytes of stack are spilled registers. AMD's spilled scalar registers go to lanes of vector registers,
not to memory, and are counted apart.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.progress import Progress
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.cases import BenchError
from bench.options import Options
from bench.report import Row
from l2c_compile.kernels._launch import FLOATS, INTERPRETED, PACKED, Argument, Launch, Terms
from l2c_compile.kernels.cached_residual import plan_cached_residual
from l2c_compile.kernels.cached_residual_norm import Norm, plan_norm
from l2c_compile.kernels.packed_cache import plan_pack_cache

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Config:
    """One thing to compile: a kernel and what decides its code."""

    kernel: str
    """The stem of the kernel's file."""
    dim: int
    """The number of channels."""
    terms: int = 0
    """The number of terms."""
    batch: int = 16
    """The number of samples, of 256 tokens each."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype of the stream, and of the caches unless they are packed."""
    form: str = "gated"
    """``gated``: one gate (B, D) a term; ``full``: scale, shift and weight too; ``packed``: gated, caches in bytes."""
    norm: str = "layer"
    """The norm of cached_residual_norm."""
    packed: torch.dtype = torch.float8_e4m3fn
    """The dtype of a packed cache."""

    def conditions(self) -> dict[str, str | int]:
        """Return the conditions of its rows."""
        named: dict[str, str | int] = {"kernel": self.kernel, "dim": self.dim, "dtype": _word(self.dtype)}
        if self.kernel == "pack_cache":
            return {**named, "packed": _word(self.packed)}
        named |= {"batch": self.batch, "terms": self.terms, "form": self.form}
        if self.form == "packed":
            named["packed"] = _word(self.packed)
        return {**named, "norm": self.norm} if self.kernel == "cached_residual_norm" else named

    def launch(self, target: GPUTarget) -> Launch:
        """Return the launch, over tensors without memory."""
        x = _meta((self.batch, 256, self.dim), self.dtype)
        if self.kernel == "pack_cache":
            q = _meta(x.shape, self.packed)
            return plan_pack_cache(x, q, _meta(x.shape[:-1], torch.float32))[0]
        terms = self._terms(target)
        if self.kernel == "cached_residual":
            return plan_cached_residual(x, terms, torch.empty_like(x))[0]
        shift, scale = self._projection().chunk(6, dim=1)[:2]
        norm = Norm(self.norm, 1e-6, _meta((self.dim,), torch.float32), None, scale, shift)
        return plan_norm(x, terms, norm, torch.empty_like(x), torch.empty_like(x))[0]

    def _terms(self, target: GPUTarget) -> Terms:
        dtype = self.dtype
        token_scales: list[Tensor] = []
        if self.form == "packed":
            # Where a device cannot convert fp8 the kernels read bytes; see _launch.py.
            converts = self.packed == torch.int8 or (target.backend == "cuda" and target.arch >= 89)
            dtype = self.packed if converts else torch.uint8
            token_scales = [_meta((self.batch, 256), torch.float32)] * self.terms
        caches = [_meta((self.batch, 256, self.dim), dtype)] * self.terms
        gates = [self._projection().chunk(6, dim=1)[2]] * self.terms
        if self.form != "full":
            return Terms(caches, gates, token_scales=token_scales)
        channels = [_meta((self.dim,), torch.float32)] * self.terms
        return Terms(caches, gates, channels, channels, [0.5] * self.terms)

    def _projection(self) -> Tensor:
        return _meta((self.batch, 6 * self.dim), self.dtype)


CONFIGS: tuple[Config, ...] = (
    *(Config("cached_residual", dim, terms) for dim in (1152, 4096) for terms in (1, 8, 56)),
    *(Config("cached_residual", dim, 12, dtype=dtype) for dim in (1152, 4096) for dtype in FLOATS),
    *(Config("cached_residual", dim, 12, form="full") for dim in (1152, 4096)),
    *(Config("cached_residual", dim, 12, form="packed", packed=packed) for dim in (1152, 4096) for packed in PACKED),
    # One sample: the smaller tile. 1000: no power of two in the width.
    *(Config("cached_residual", dim, 12, batch=1) for dim in (1152, 4096)),
    *(Config("cached_residual", dim, 12) for dim in (1000, 5120, 8192)),
    *(
        Config("cached_residual_norm", dim, terms, norm=norm)
        for dim in (1152, 4096)
        for terms in (0, 1, 56)
        for norm in ("layer", "rms")
    ),
    *(Config("cached_residual_norm", dim, 12, batch=batch) for dim in (1152, 4096) for batch in (2, 64)),
    *(Config("cached_residual_norm", dim, 12, dtype=torch.float32) for dim in (1152, 4096)),
    *(Config("cached_residual_norm", dim, 12, form="full") for dim in (1152, 4096)),
    *(
        Config("cached_residual_norm", dim, 12, form="packed", packed=packed)
        for dim in (1152, 4096)
        for packed in PACKED
    ),
    *(Config("cached_residual_norm", dim, 12) for dim in (1, 64, 1000, 5120, 8192)),
    *(Config("pack_cache", dim, packed=packed) for dim in (1152, 4096, 8192) for packed in PACKED),
)
"""The configs that ``python -m bench kernel-compile`` compiles, for each target."""


@dataclass(frozen=True)
class Usage:
    """The registers and the memory that a compiled kernel takes."""

    registers: int
    """Registers a thread; vector registers on AMD."""
    spill_bytes: int
    """Bytes of stack a thread."""
    spilled_scalars: int
    """The number of AMD's scalar registers that are in lanes of vector registers."""
    shared_bytes: int
    """Bytes of shared memory a program."""


def compile_for(launch: Launch, target: GPUTarget) -> Usage:
    """Compile a launch for a target and return what it takes.

    Raises:
        BenchError: if Triton interprets, or its wheel has no cuobjdump.
    """
    if INTERPRETED:
        raise BenchError("kernels are interpreted, not compiled, with TRITON_INTERPRET=1; unset it")
    compiled = triton.compile(source(launch), target=target, options={"num_warps": launch.num_warps})
    shared_bytes = int(compiled.metadata.shared)
    if target.backend == "hip":
        found = dict(re.findall(r"\.(\w+): +(\d+)$", compiled.asm["amdgcn"], re.MULTILINE))
        return Usage(
            registers=int(found["vgpr_count"]),
            spill_bytes=int(found["private_segment_fixed_size"]),
            spilled_scalars=int(found["sgpr_spill_count"]),
            shared_bytes=shared_bytes,
        )
    report = _resource_usage(compiled.asm["cubin"])
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return Usage(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), 0, shared_bytes)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Compile every config for every target."""
    Options("kernel-compile").read(args)
    task = progress.add_task("kernels compiled", total=len(CONFIGS) * len(TARGETS))
    rows = []
    for config in CONFIGS:
        for name, target in TARGETS.items():
            usage = compile_for(config.launch(target), target)
            conditions = {"target": name, **config.conditions()}
            rows += [
                Row("registers", usage.registers, "", conditions),
                Row("spill_bytes", usage.spill_bytes, "B", conditions),
                Row("shared_bytes", usage.shared_bytes, "B", conditions),
            ]
            if target.backend == "hip":
                rows.append(Row("spilled_scalars", usage.spilled_scalars, "", conditions))
            progress.advance(task)
    return rows


def source(launch: Launch) -> ASTSource:
    """Return what Triton's launcher would compile: None and 1 are constants, multiples of 16 are known as such."""
    signature: dict[str, object] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(value: Argument, path: tuple[int, ...]) -> object:
        if isinstance(value, tuple):
            return tuple(type_of(entry, (*path, index)) for index, entry in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return "i32" if value < 2**31 else "i64"

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of(value, (index,))
    return ASTSource(launch.kernel, signature, constants, attributes)


def _resource_usage(cubin: bytes) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        raise BenchError(f"kernel-compile wants the cuobjdump of Triton's wheel, got a Triton without {cuobjdump.name}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(cuobjdump), "-res-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
