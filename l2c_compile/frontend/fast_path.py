"""Let attention take, in an export, the fused operator that it takes in eager mode.

Without gradients and outside of training ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call one
operator, which rounds otherwise than those that it stands for. They do not while torch traces or a mode is on, so that
a capture would be off by rounding. Where a module inside a layer has hooks, as a site has, torch runs that layer
operator by operator, in eager mode too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.overrides import TorchFunctionMode

from l2c_compile.errors import CaptureError


@contextmanager
def fast_path_as_in_eager_torch(denoiser: nn.Module) -> Iterator[None]:
    """Let the attention of a denoiser take torch's fast path where it takes it in eager mode, under ``no_grad``.

    Raises:
        CaptureError: if torch's encoder or decoder would look into a mask.
    """
    thread = threading.get_ident()
    has_torch_function, is_tracing = torch.overrides.has_torch_function, activation._is_make_fx_tracing

    def is_of_a_subclass(args: Iterable[Any]) -> bool:
        if threading.get_ident() != thread:
            return bool(has_torch_function(args))
        return any(map(_has_torch_function, args))

    with ExitStack() as undo:
        for path, module in denoiser.named_modules():
            for kind, names in _STACKS.items():
                if isinstance(module, kind):
                    hook = _check_masks(path, *names)
                    undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.callback(setattr, torch.overrides, "has_torch_function", has_torch_function)
        torch.overrides.has_torch_function = is_of_a_subclass
        undo.callback(setattr, activation, "_is_make_fx_tracing", is_tracing)
        activation._is_make_fx_tracing = lambda: threading.get_ident() != thread and is_tracing()  # type: ignore[no-untyped-call]
        undo.enter_context(_WeightsAsInEagerTorch())
        yield


def _has_torch_function(value: object) -> bool:
    """Return whether a tensor is of a subclass that torch asks first, whatever modes are on."""
    asked = getattr(getattr(type(value), "__torch_function__", None), "__func__", None)
    return asked not in (None, Tensor.__dict__["__torch_function__"].__func__)


class _WeightsAsInEagerTorch(TorchFunctionMode):
    """A mode in which attention returns None for the weights that it is not asked for, as it does in eager mode."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        result = func(*args, **(kwargs or {}))
        if func is torch._native_multi_head_attention and not args[_NEED_WEIGHTS]:
            return result[0], None
        return result


_NEED_WEIGHTS = 10
"""The position of ``need_weights`` among the arguments of the operator."""


_STACKS: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.TransformerEncoder: ("mask", "is_causal"),
    nn.TransformerDecoder: ("tgt_mask", "tgt_is_causal"),
}
"""The modules that look into a mask, with the names of the mask and of the argument that spares them that."""


def _check_masks(path: str, mask: str, is_causal: str) -> Callable[..., None]:
    """Return a hook that raises where a module would do this or that as the values of a mask are."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        what = f"module '{path}', a {type(module).__name__},"
        if given.get(mask) is not None and given.get(is_causal) is None:
            raise CaptureError(
                f"{what} looks into its {mask} whether that is causal, and a capture has no values; call it with"
                f" {is_causal}=True or False"
            )
        leaves_out = given.get("src_key_padding_mask") is not None and given.get(mask) is None
        if leaves_out and given["src"].dim() == 3 and _takes_nested_tensors(module):
            raise CaptureError(
                f"{what} leaves out the tokens that src_key_padding_mask names, and a capture has no values; set its"
                " use_nested_tensor to False, which computes them all"
            )

    return hook


def _takes_nested_tensors(module: Any) -> bool:  # noqa: ANN401 - an encoder
    enabled = torch.backends.mha.get_fastpath_enabled() and getattr(module, "use_nested_tensor", False)
    return bool(enabled and not module.layers[0].training)
