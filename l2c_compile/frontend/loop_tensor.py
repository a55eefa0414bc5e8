"""Tensors of a loop that is traced, and where their values will come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.array_operands import computed_by_numpy

LATENT = "the latent"
"""The origin of what is made from the noise or from what the denoiser returned."""

RANDOM = "random numbers"
"""The origin of what the loop draws."""


WEIGHTS = "the denoiser's weights"
"""The origin of what is computed from a weight or a buffer of the denoiser, which may change between calls."""


class Recorder(Protocol):
    """Records what a loop does to its tensors."""

    def call(self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Record one call of torch and return its result."""

    def untraceable(self, what: str, instead: str) -> LoopTraceError:
        """Return the error for something that a static program cannot do."""


class LoopTensor(Tensor):
    """A tensor of the loop that knows its shape, strides, dtype and device, but not its values.

    It is a subclass, so that torch itself takes it for a tensor everywhere, and every operation on it arrives in one
    place.
    """

    tracer: Recorder
    node: Node
    fake: Tensor
    """The fake tensor that torch returns here: the right form, without values."""
    origins: set[str]
    """What the values are made from; views of one memory have one set."""

    @staticmethod
    def wrap(tracer: Recorder, node: Node, fake: Tensor, origins: set[str]) -> LoopTensor:
        """Return the tensor that ``node`` stands for."""
        self: LoopTensor = Tensor._make_wrapper_subclass(
            LoopTensor, fake.shape, fake.stride(), dtype=fake.dtype, layout=fake.layout, device=fake.device
        )
        self.tracer, self.node, self.fake, self.origins = tracer, node, fake, origins
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return loop_tensors_in((args, kwargs))[0].tracer.call(func, tuple(args), dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # What does not pass torch's Python functions, such as torch.func.vmap and scripted code, arrives here.
        with DisableTorchFunction():
            return loop_tensors_in((args, kwargs))[0].tracer.call(func, tuple(args), dict(kwargs or {}))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: object, **options: object) -> object:
        """Return what a function of numpy, which also computes ``tensor * array``, gives."""
        result = computed_by_numpy(ufunc, operands) if method == "__call__" and not options else NotImplemented
        if result is NotImplemented:
            given = loop_tensors_in(operands)
            what = f"gives the values of {made_from(given)} to numpy ({ufunc.__name__})"
            raise given[0].tracer.untraceable(what, "compute with torch; torch.from_numpy takes arrays")
        return result

    def __copy__(self) -> LoopTensor:
        return self

    def __hash__(self) -> int:
        return id(self)


def loop_tensors_in(tree: object) -> list[LoopTensor]:
    """Return the loop tensors of a nested container, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, LoopTensor)]


def made_from(tensors: Iterable[LoopTensor]) -> str:
    """Return the words for what tensors are made from: "the latent and condition 'mask'"."""
    origins = {origin for tensor in tensors for origin in tensor.origins}
    return " and ".join(sorted(origins, key=lambda origin: (origin != LATENT, not origin.startswith("cond"), origin)))


def without_values(tensors: Iterable[LoopTensor]) -> str:
    """Return why tensors have no values while the loop is unrolled, and what to do instead of reading them."""
    origins = {origin for tensor in tensors for origin in tensor.origins}
    if LATENT in origins:
        return (
            "the latent has no values while the loop is unrolled: use torch.where, clamp or another tensor operation,"
            " or compute it from the timesteps"
        )
    if origins == {RANDOM}:
        return (
            "the loop draws others in each call: use torch.where, or draw before and give a Python value as condition"
        )
    if origins == {WEIGHTS}:
        return "weights may change between calls: use torch.where, or give the number as a condition"
    return (
        "a tensor that is a condition has no values while the loop is unrolled: use torch.where, or give the condition"
        " as Python numbers (a tuple), of which torch.tensor makes a constant"
    )
