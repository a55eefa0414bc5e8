"""Keep ``torch.export`` from losing track of tensors that share memory.

Export turns writes in place into values. In some places eager torch returns the memory that it was given, and export
makes something else of it, so that the capture would be another model than the one that runs, or would fail:

dropout that drops nothing   is kept as an operator with a result of its own, for users who train what they exported.
                             In ``h = dropout(x); h += 1; return x + h`` the write would no longer reach x.
expand to the same shape     is undone as ``x + (written - x)``, which rounds. As a plain view it is undone exactly.
x.data                       is not followed by export; a write into it has crashed torch 2.13. Outside training it
                             equals x.detach().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _functional_dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[Any, Any]:  # noqa: A002, ANN401
    return input, training


def _dropout(input: Any, p: float, train: bool | None) -> tuple[Any, Any]:  # noqa: A002, ANN401
    return input, train


_DROPOUTS: dict[object, Callable[..., tuple[Any, Any]]] = {
    torch.nn.functional.dropout: _functional_dropout,
    torch.dropout: _dropout,
    torch.ops.aten.dropout: _dropout,
    torch.ops.aten.dropout.default: _dropout,
}
"""The ways to call dropout, each with a function that returns the call's input and whether it drops elements."""

_EXPANDS = frozenset({Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to})

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class AliasesAsInEagerTorch(TorchFunctionMode):
    """A mode, entered around an export, in which these calls return the memory that eager torch returns."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            given, drops = _DROPOUTS[func](*args, **kwargs)
            if drops is False:
                return given
        if func == _DATA:
            return args[0].detach()
        result = func(*args, **kwargs)
        if func in _EXPANDS and args and result.shape == args[0].shape:
            return args[0].view(result.shape)
        return result
