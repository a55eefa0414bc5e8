"""Follow the memory of the tensors that a loop makes itself.

A tensor that depends on the schedule only is an ordinary tensor with values, and what is computed from it is not
recorded. That includes what takes no more than the form of the latent, such as ``timesteps.to(x)`` and
``torch.zeros_like(x)``. Once the loop writes something without values into such a tensor,

    out = torch.empty(2, *x.shape);  first = out[0];  out[0] = x

its memory has no values any more: from then on every tensor in this memory, views that were made before included,
stands for a part of one recorded tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.array_operands import with_tensors
from l2c_compile.frontend.loop_tensor import LoopTensor, Recorder, loop_tensors_in, made_from
from l2c_compile.graphs.forms import TensorForm

RANDOM_FUNCTIONS = frozenset(
    {torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.poisson}
    | {torch.multinomial, torch.randn_like, torch.rand_like, torch.randint_like}
)
IN_PLACE_DRAWS = frozenset(
    {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "geometric_", "log_normal_"}
)
_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift"}
    | {"irshift", "setitem"}
)
_OF_THE_FORM_OF_THE_FIRST = frozenset(
    {"new_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
    | {"zeros_like", "ones_like", "full_like", "empty_like"}
)
_IN_THE_FORM_OF_ANOTHER = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
_FACTORIES = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"})
_GIVES_MEMORY_AWAY = frozenset(
    {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "share_memory_"}
)
_TAKES_MEMORY = frozenset({"as_tensor", "asarray"})


class LoopRecorder(Recorder, Protocol):
    """A recorder that knows the weights of its denoiser and whether it captures it at the moment."""

    capturing: bool

    def weight_in(self, tensor: Tensor) -> str | None:
        """Return the path of the weight whose memory a tensor shares, or None."""

    def uses_fake(self, tensor: Tensor) -> LoopTraceError:
        """Return the error for a tensor of a capture that the loop uses."""


@dataclass(frozen=True)
class _Recorded:
    """Memory without values: the recorded tensor that stands for all of it."""

    tensor: LoopTensor
    form: TensorForm


@dataclass(frozen=True)
class _Factory:
    """The call that made a tensor of the latent's form, and the version that the tensor had then."""

    result: Tensor
    version: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LoopMemory(TorchFunctionMode):
    """A mode around a loop that is traced, in which tensors turn into recorded ones when they lose their values."""

    def __init__(self, recorder: LoopRecorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._made: dict[int, tuple[StorageWeakRef, TensorForm | None]] = {}
        self._recorded: dict[int, _Recorded] = {}
        self._factories: dict[int, _Factory] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        kwargs = kwargs or {}
        if self.recorder.capturing:
            return func(*args, **kwargs)
        # What this mode itself asks of tensors is not the loop's to record.
        with DisableTorchFunction():
            others = self._others(func, args, kwargs)
            if others:
                args, kwargs = tree_map(lambda leaf: others.get(id(leaf), (leaf, leaf))[1], (args, kwargs))
            made_by = func, args, kwargs
            args, kwargs = self._by_form_only(func, args, kwargs) or (args, kwargs)
        if loop_tensors_in(args):
            func, args = with_tensors(func, args)
        result = func(*args, **kwargs)
        with DisableTorchFunction():
            if others:
                before = {id(other): leaf for leaf, other in others.values()}
                result = tree_map(lambda leaf: before.get(id(leaf), leaf), result)
            self._note_made(*made_by, result)
        return result

    def _others(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[int, tuple[Tensor, LoopTensor]]:
        """Return, by identity, the arguments that stand for recorded tensors by now, with these tensors."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is not LoopTensor and _is_tensor(leaf)]
        for leaf in given:
            if isinstance(leaf, FakeTensor):
                raise self.recorder.uses_fake(leaf)
        if name_of(func) in _GIVES_MEMORY_AWAY and given:
            self._made.pop(memory_of(given[0]), None)
        if writes_in_place(func, kwargs):
            self._record_written(func, args, kwargs)
        return {id(leaf): (leaf, now) for leaf in given if (now := self.now(leaf)) is not leaf}

    def now(self, value: Any) -> Any:  # noqa: ANN401 - the value
        """Return what a value is by now: a recorded tensor for one in memory that has lost its values."""
        recorded = self._recorded.get(memory_of(value)) if self._recorded else None
        if recorded is None:
            return value
        form = TensorForm.of(value)
        if form.dtype != recorded.form.dtype or value.is_conj() or value.is_neg():
            raise self.recorder.untraceable(
                f"writes a value made from {made_from([recorded.tensor])} into memory that it also has as {form}",
                "make views of another dtype, and conjugates, after the write",
            )
        if form == recorded.form and value.storage_offset() == 0:
            return recorded.tensor
        place = (form.shape, form.stride, value.storage_offset())
        return self.recorder.call(torch.as_strided, (recorded.tensor, *place), {})

    def factory_of(self, tensor: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
        """Return the call on the latent's form that made a tensor, if nothing was written into it since."""
        found = self._factories.get(id(tensor))
        return None if found is None or _version(tensor) != found.version else (found.func, found.args, found.kwargs)

    def _record_written(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the memory that a call writes into, if what it writes has no values."""
        sources = loop_tensors_in(tree_map(self.now, (args, kwargs)))
        if not sources and func not in RANDOM_FUNCTIONS and name_of(func) not in IN_PLACE_DRAWS:
            return
        what = f"writes a value made from {made_from(sources)}" if sources else "draws random numbers"
        for tensor in tree_leaves(written_by(args, kwargs)):
            memory = memory_of(tensor)
            if not memory or memory in self._recorded:
                continue
            weight = self.recorder.weight_in(tensor)
            if weight is not None:
                raise self.recorder.untraceable(
                    f"{what} into the denoiser's weight or buffer '{weight}'", "clone it first and write into the clone"
                )
            if memory not in self._made:
                raise self.recorder.untraceable(
                    f"{what} into a tensor that was made before the loop ran, or that shares its memory with numpy",
                    "clone it in the loop first and write into the clone",
                )
            self._recorded[memory] = self._record(tensor, self._made[memory][1])

    def _record(self, tensor: Tensor, form: TensorForm | None) -> _Recorded:
        memory = tensor.untyped_storage()
        count = len(memory) // tensor.element_size()
        if form is None or form.dtype != tensor.dtype or math.prod(form.shape) != count:
            form = TensorForm((count,), (1,), tensor.dtype, tensor.device)
        whole = torch.empty(0, dtype=form.dtype, device=form.device).set_(memory, 0, form.shape, form.stride)
        octets = torch.empty(0, dtype=torch.uint8, device=form.device).set_(memory, 0, (len(memory),), (1,))
        if whole.is_contiguous() and not octets.any():
            recorded = self.recorder.call(torch.zeros, (form.shape,), {"dtype": form.dtype, "device": form.device})
        else:
            recorded = self.recorder.call(torch.clone, (whole,), {})
        assert isinstance(recorded, LoopTensor)
        return _Recorded(recorded, form)

    def _by_form_only(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return arguments that all have values, if the result needs no more than the form of those that have none."""
        data = data_of(func, args, kwargs)
        if loop_tensors_in(data) or not loop_tensors_in((args, kwargs)):
            return None
        # What is made of a weight is recorded, because it has to follow when the weight changes.
        if any(self.recorder.weight_in(leaf) for leaf in tree_leaves(data) if _is_tensor(leaf)):
            return None
        return tree_map(  # type: ignore[no-any-return]
            lambda leaf: TensorForm.of(leaf.fake).empty() if isinstance(leaf, LoopTensor) else leaf, (args, kwargs)
        )

    def _note_made(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        name = name_of(func)
        # What an attribute gives was there before, and other libraries may hold what torch took from them.
        if name == "__get__" or (name in _TAKES_MEMORY and not isinstance(args[0], (int, float, list, tuple))):
            return
        given = {memory_of(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(result):
            memory = memory_of(leaf)
            if not memory or memory in given:
                continue
            if name in _UNINITIALISED:
                # What nobody wrote may hold anything, and a program must not depend on what it held here.
                leaf.zero_()
            form = TensorForm.of(leaf)
            fills = form.of_copy() == form and leaf.numel() * leaf.element_size() == len(leaf.untyped_storage())
            # The reference keeps the identity from being given to other memory.
            kept = StorageWeakRef(leaf.untyped_storage())  # type: ignore[no-untyped-call]
            self._made[memory] = kept, form if fills else None
            if loop_tensors_in((args, kwargs)) and name in _FACTORIES:
                self._factories[id(leaf)] = _Factory(leaf, _version(leaf), func, args, kwargs)


def name_of(func: Callable[..., object]) -> str:
    """Return the name of a function of torch, without its overload."""
    return str(getattr(func, "_opname", None) or getattr(func, "__name__", ""))


def data_of(func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Return those arguments of a call whose values the result depends on; of the others it takes the form."""
    name = name_of(func)
    if name in _IN_THE_FORM_OF_ANOTHER:
        return args[:1]
    if name in _OF_THE_FORM_OF_THE_FIRST:
        return args[1:], {key: value for key, value in kwargs.items() if key != "input"}
    return args, kwargs


def writes_in_place(func: Callable[..., object], kwargs: Mapping[str, object]) -> bool:
    """Return whether a call writes into a tensor that it is given."""
    name = name_of(func)
    in_place = name.strip("_") in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return in_place or name == "__set__" or kwargs.get("out") is not None


def written_by(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Return what a call that writes in place writes into."""
    return kwargs["out"] if kwargs.get("out") is not None else next(iter([*args, *kwargs.values()]))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def memory_of(value: object) -> int:
    """Return the identity of the memory of a tensor that has some, and 0 for anything else."""
    if not isinstance(value, Tensor) or isinstance(value, LoopTensor) or value.layout != torch.strided:
        return 0
    if is_functorch_wrapped_tensor(value):
        return 0
    return int(value.untyped_storage()._cdata)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
