"""Unroll a sampling loop by running its Python once, with the denoiser as a leaf.

This takes two steps. ``LoopTracer`` runs the loop on tensors (``LoopTensor``) that know shape, dtype and device but no
values. A computation that depends only on the sampler's schedule (timesteps, coefficients, indices) is ordinary Python
on ordinary tensors and is not recorded; every operation on the latent becomes a node. ``_lower`` then turns the
recorded torch calls into functional ATen, so that a loop may write in place.

The result is a ``LoopSkeleton``: the loop's own arithmetic as ONE graph in which the denoiser does not occur. The
outputs of evaluation e are inputs of that graph and its arguments are outputs of it; ``unroll`` connects the two.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from l2c_compile.errors import CaptureError, L2CError, LoopTraceError
from l2c_compile.frontend.array_operands import INDEXING
from l2c_compile.frontend.autocast import check_no_autocast, is_autocast_on
from l2c_compile.frontend.compiled_parts import run_eagerly
from l2c_compile.frontend.loop_memory import (
    IN_PLACE_DRAWS,
    RANDOM_FUNCTIONS,
    LoopMemory,
    data_of,
    memory_of,
    name_of,
    writes_in_place,
    written_by,
)
from l2c_compile.frontend.loop_result import check_holds_no_tensors, consumed
from l2c_compile.frontend.loop_tensor import (
    LATENT,
    RANDOM,
    WEIGHTS,
    LoopTensor,
    loop_tensors_in,
    made_from,
    without_values,
)
from l2c_compile.frontend.overlap import overlaps_in_part
from l2c_compile.frontend.stand_in import Loop, StandIn
from l2c_compile.graphs.forms import CallSignature, StaticValue, TensorForm, overlaps_of, repeats_of, tensors_in
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.skeleton import EvaluationCall, LoopSkeleton
from l2c_compile.state.random_state import GeneratorStates, random_state_kept, seed_unlike_any_loop


def trace_loop(
    loop: Loop,
    denoiser: nn.Module,
    noise: object,
    conditions: Mapping[str, object],
    capture_call: Callable[[CallSignature], EvaluationGraph],
) -> LoopSkeleton:
    """Run ``loop`` once on tensors without values and return what it does around the denoiser.

    Args:
        loop: the sampler, called as ``loop(denoiser, noise, **conditions)``.
        denoiser: the module that the loop calls; it is not run.
        noise: a tensor or a nested container of tensors.
        conditions: the keyword arguments of the loop; tensors in them become inputs, anything else is static.
        capture_call: a function that returns the evaluation graph for one form of call; it is asked once for each call.

    Raises:
        LoopTraceError: if the loop branches on latent values, reads them into Python, or does what cannot be recorded.
    """
    check_no_autocast()
    tracer = LoopTracer(denoiser, capture_call)
    with run_eagerly():
        recorded = tracer.unroll(loop, noise, conditions)
        tracer.close()
    return _lower(recorded, tracer)


# The methods and functions that need values, by name, with the words for what the loop does there.
_WANTS_VALUES: Mapping[str, str] = {
    **dict.fromkeys(
        ("item", "tolist", "numpy", "data_ptr", "untyped_storage", "storage", "__dlpack__", "__reduce_ex__", "cdata"),
        "reads the values of {origins} into Python ({name})",
    ),
    **dict.fromkeys(
        ("__float__", "__int__", "__index__", "__complex__"),
        "turns a value made from {origins} into a Python number ({name})",
    ),
    "__array__": "gives the values of {origins} to numpy ({name})",
    **dict.fromkeys(("__bool__", "__contains__", "is_nonzero"), "branches on a value made from {origins} ({name})"),
    **dict.fromkeys(("backward", "grad", "register_hook"), "differentiates ({name})"),
    **dict.fromkeys(("set_", "resize_as_", "swap_"), "exchanges the memory of a tensor made from {origins} ({name})"),
}

_NO_GRADIENTS = "a sampler computes no gradients: differentiate outside of the loop"

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

_ABOUT_GRADIENTS = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__, Tensor.retain_grad})  # type: ignore[attr-defined]
"""The functions that change no value, since a sampler computes no gradients."""

_ARGUMENTS = (
    *(int, float, complex, str, type(None), slice, range, tuple, list, dict, type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


class LoopTracer(fx.proxy.TracerBase):
    """Records what a loop does to its latent, with each call of the denoiser as one node."""

    def __init__(self, denoiser: nn.Module, capture_call: Callable[[CallSignature], EvaluationGraph]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.capture_call = capture_call
        self.graph = fx.Graph()
        self.calls: list[EvaluationCall] = []
        self.num_inputs = 0
        self.constants: dict[str, Tensor] = {}
        self.num_noise = 0
        self.out_spec: TreeSpec | None = None
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.capturing = False
        self.stand_in = StandIn(denoiser, self.evaluate, self._refuse_copy)
        self.memory = LoopMemory(self)
        self._recorder = _RandomDrawRecorder(self)
        self.weight_paths = {id(weight): path for path, weight in _named_weights(denoiser)}
        self._weight_memory = {memory_of(weight): path for path, weight in _named_weights(denoiser)}
        self._snapshots: dict[object, tuple[str, Tensor]] = {}
        self.read: dict[int, Tensor] = {}
        """The weights whose values the loop read itself, by identity."""
        self._thread = threading.get_ident()
        self._is_closed = False
        self._refusal: L2CError | None = None
        self._shared_inputs: set[int] = set()
        self.num_draws = 0
        """How many draws of random numbers were recorded."""

    def unroll(self, loop: Loop, noise: object, conditions: Mapping[str, object]) -> fx.Graph:
        """Run ``loop`` and return the recorded graph of torch calls."""
        tensors = tensors_in((noise, dict(conditions)))
        overlapping = {position for pair in overlaps_of(tensors) for position in pair}
        noise = self._make_inputs(noise, LATENT)
        self.num_noise = self.num_inputs
        conditions = {name: self._make_inputs(given, f"condition '{name}'") for name, given in conditions.items()}
        given, structure = tree_flatten((noise, conditions))
        inputs = loop_tensors_in(given)
        self._shared_inputs = {memory_of(each.fake) for i, each in enumerate(inputs) if i in overlapping}
        recorder = self._recorder
        with random_state_kept(), _generator_guarded(self), torch.no_grad(), self.stand_in, recorder, self.memory:
            seed_unlike_any_loop()
            states = GeneratorStates()
            result = self._run(loop, noise, conditions)
            touched = states.moved()
        if self._refusal is not None:
            # The loop caught it and went on, another way than it will with values.
            raise self._refusal
        if not self.calls:
            raise LoopTraceError(
                "the loop never calls the denoiser it is given, or only the forward of its class; call the first"
                " argument of the loop: denoiser(x, ...)"
            )
        if touched:
            raise LoopTraceError(
                f"the loop seeds the random number generator of {touched[0]}, or draws from it what cannot be recorded;"
                " draw with torch.randn or randn_like, and seed before calling the sampler"
            )
        left, structure_left = tree_flatten((noise, conditions))
        if structure != structure_left or any(a is not b for a, b in zip(given, left, strict=True)):
            raise LoopTraceError(
                "the loop changes a list or a dict that it is given as an argument, which a static graph would not;"
                " copy it first, or let the loop return it"
            )
        leaves, self.out_spec = tree_flatten(result)
        self.graph.output([self._result(leaf) for leaf in leaves])
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise LoopTraceError("the loop returns no tensor; return the latent, or tuples, lists or dicts of tensors")
        return self.graph

    def close(self) -> None:
        """Refuse all that is done from now on with tensors that the loop left behind."""
        self._is_closed = True

    def _uses_kept_tensor(self) -> LoopTraceError:
        return self.untraceable(
            "uses a tensor that was kept when a loop was traced before", "keep no tensor beyond the call of a loop"
        )

    def _run(self, loop: Loop, noise: object, conditions: Mapping[str, Any]) -> object:
        try:
            return consumed(loop(self.denoiser, noise, **conditions))
        except Exception as error:
            if self._refusal is not None and error is not self._refusal:
                # Code between the loop and its user made another error of it.
                raise self._refusal from error
            stored = sorted({path for call in self.calls for path in call.graph.stored})
            if not stored or not isinstance(error, (LookupError, TypeError, AttributeError)):
                raise
            raise LoopTraceError(
                f"the loop fails while it is traced ({type(error).__name__}: {error!s:.100}); it may look for what the"
                f" denoiser stored during its call in '{stored[0]}', which is put back after each capture; let forward"
                " return it"
            ) from error

    @property
    def is_in_loop(self) -> bool:
        """Whether it is the loop that runs now, not a capture and not another thread."""
        return not self.capturing and threading.get_ident() == self._thread

    def untraceable(self, what: str, instead: str) -> LoopTraceError:
        """Return the error for something that the loop does at this moment and that a static program cannot do.

        The first one is also kept, and raised when the loop returns, so that a loop which catches it does not pass.
        """
        done = len(self.calls)
        after = f"after {done} evaluation{'s' * (done != 1)}"
        error = LoopTraceError(f"the loop {what} at {_caller()}, {after}; {instead}")
        self._refusal = self._refusal or error
        return error

    def call(self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Record one call of torch and return its result: loop tensors, or values that are already known."""
        name = name_of(func)
        self.num_draws += func in RANDOM_FUNCTIONS or name in IN_PLACE_DRAWS
        given = loop_tensors_in((args, kwargs))
        if name in ("__repr__", "__format__"):
            return "LoopTensor(without values)"
        self._check_allowed(func, given)
        if name == "__iter__":
            return iter(self.call(Tensor.unbind, args, kwargs))  # type: ignore[call-overload]
        if name == "__deepcopy__":
            return self.call(Tensor.clone, args[:1], {})
        if func in RANDOM_FUNCTIONS and isinstance(kwargs.get("out"), LoopTensor):
            return self._draw_into(func, args, kwargs)
        in_place = writes_in_place(func, kwargs)
        if in_place:
            self._check_no_overlap(name, args, kwargs)
        result = self._on_fakes(func, args, kwargs)
        if func in _ABOUT_GRADIENTS:
            return args[0]
        leaves, spec = tree_flatten(result)
        if not in_place and not any(isinstance(leaf, Tensor) for leaf in leaves):
            # Shapes, dtypes and the like are known without the values.
            return result
        if self._is_closed:
            raise self._uses_kept_tensor()
        node = self.graph.call_function(func, self.create_arg(args), self.create_arg(kwargs))  # type: ignore[arg-type]
        node.meta["caller"] = _caller()
        origins = self._origins(func, args, kwargs)
        if in_place:
            for written in loop_tensors_in(written_by(args, kwargs)):
                written.origins.update(origins)
        of_memory = {memory_of(each.fake): each.origins for each in given}
        results = {id(each.fake): each for each in given}
        wrapped: list[object] = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) not in results:
                own = node if spec.is_leaf() else self.graph.call_function(_leaf_of, (node, position))
                results[id(leaf)] = LoopTensor.wrap(self, own, leaf, of_memory.get(memory_of(leaf), set(origins)))
            wrapped.append(results.get(id(leaf), leaf))
        return tree_unflatten(wrapped, spec)

    def _draw_into(self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        # Torch cannot make a functional operator of a draw into something.
        out = kwargs.pop("out")
        assert isinstance(out, LoopTensor)
        drawn: Any = self.call(func, args, {"dtype": out.fake.dtype, "device": out.fake.device, **kwargs})
        if drawn.shape != out.shape:
            raise self.untraceable("draws random numbers into a tensor of another shape (out=)", "leave out= away")
        return self.call(Tensor.copy_, (out, drawn), {})

    def _check_no_overlap(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for each in loop_tensors_in(written_by(args, kwargs)):
            if memory_of(each.fake) in self._shared_inputs:
                raise self.untraceable(
                    f"writes into {made_from([each])}, which shares its memory with another input ({name})",
                    "clone one of the two before the sampler is called, or write into a clone",
                )
        written = [each.fake for each in loop_tensors_in(written_by(args, kwargs))]
        read = [each.fake for each in loop_tensors_in((args[1:], {**kwargs, "out": None}))]
        if name == "__setitem__" and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[1])):
            with self.fake_mode:
                written = [each[args[1]] for each in written]
        if any(overlaps_in_part(each, read) for each in written):
            raise self.untraceable(
                f"writes a part of a tensor into an overlapping part of it ({name})", "clone what is read first"
            )

    def _check_allowed(self, func: Callable[..., object], given: Sequence[LoopTensor]) -> None:
        """Raise for a call that wants values, or that is not made by the loop while it is traced."""
        if any(each.tracer is not self for each in given):
            raise self._uses_kept_tensor()
        if threading.get_ident() != self._thread:
            raise self.untraceable("computes in another thread", "compute in the thread that runs the loop")
        self._reject_autocast()
        name = name_of(func)
        if name in _WANTS_VALUES:
            what = _WANTS_VALUES[name].format(origins=made_from(given), name=name)
            instead = _NO_GRADIENTS if what.startswith("diff") else without_values(given)
            raise self.untraceable(what, instead)
        if isinstance(func, HigherOrderOperator):
            raise self.untraceable(
                f"calls torch.{name}, whose branches are functions of values made from {made_from(given)}",
                "use torch.where, or a Python if or for over what does not depend on tensors that the sampler is given",
            )

    def _origins(self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> set[str]:
        """Return what the values of a call's result are made from."""
        data = data_of(func, args, kwargs)
        origins = {origin for each in loop_tensors_in(data) for origin in each.origins}
        if func in RANDOM_FUNCTIONS or name_of(func) in IN_PLACE_DRAWS:
            origins.add(RANDOM)
        if any(isinstance(leaf, Tensor) and self.weight_in(leaf) for leaf in tree_leaves(data)):
            origins.add(WEIGHTS)
        return origins

    def weight_in(self, tensor: Tensor) -> str | None:
        """Return the path of the weight whose memory a tensor shares, or None."""
        memory = memory_of(tensor)
        path = self._weight_memory.get(memory) if memory else None
        return None if path is None else path.removeprefix("denoiser.")

    def uses_fake(self, tensor: Tensor) -> LoopTraceError:
        """Return the error for a tensor of a capture that the loop uses."""
        return self.untraceable(
            "uses a tensor that the denoiser, or a hook in it, has stored during its call",
            "let the denoiser's forward return it",
        )

    def check_no_weight_is_written(
        self, func: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Raise LoopTraceError before the loop writes into the memory of a weight of the denoiser, or moves it."""
        if not writes_in_place(func, kwargs):
            return
        for leaf in tree_leaves(written_by(args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, LoopTensor):
                path = self.weight_in(leaf)
                if path is not None:
                    raise self.untraceable(
                        f"changes the weight '{path}' of the denoiser",
                        "a static graph reads weights where they are, so swap them in before the sampler is called",
                    )

    def note_weights_read(self, func: Callable[..., object], args: object, kwargs: object) -> None:
        """Note the weights among the arguments of a call of torch that is not recorded, unless it asks for a form."""
        leaves = tree_leaves((args, kwargs))
        if (name_of(func) == "__get__" and func != _DATA) or any(isinstance(leaf, LoopTensor) for leaf in leaves):
            return
        for leaf in leaves:
            if isinstance(leaf, nn.Parameter) or id(leaf) in self.weight_paths:
                self.read[id(leaf)] = leaf

    def create_arg(self, a: object) -> Argument:
        """Return what stands for a value among the arguments of a node."""
        if isinstance(a, LoopTensor):
            return a.node
        if isinstance(a, FakeTensor):
            raise self.uses_fake(a)
        if isinstance(a, torch.Generator):
            raise self.untraceable(
                "passes a torch.Generator", "draw from the default generator, or pass the noise as a condition"
            )
        if isinstance(a, Tensor):
            factory = self.memory.factory_of(a)
            return self._constant(a) if factory is None else self.create_arg(self.call(*factory))
        if isinstance(a, np.generic):
            return super().create_arg(a.item())
        if is_dataclass(a) or not isinstance(a, _ARGUMENTS):
            raise self.untraceable(
                f"passes a {type(a).__name__} to a tensor operation",
                "pass tensors and Python numbers (torch.from_numpy makes a tensor of an array)",
            )
        return super().create_arg(a)

    def evaluate(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Record one call of the denoiser and return tensors for its results."""
        if threading.get_ident() != self._thread:
            if not loop_tensors_in((args, kwargs)):
                # Somebody else uses the module meanwhile.
                return self.stand_in.forward(*args, **kwargs)
            raise self.untraceable(
                "calls the denoiser from another thread", "call it in the thread that runs the loop, in order"
            )
        self._reject_autocast()
        self.capturing = True
        try:
            return self._evaluate(args, kwargs)
        except L2CError as error:
            self._refusal = self._refusal or error
            raise
        finally:
            self.capturing = False

    def _evaluate(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        leaves, spec = tree_flatten(tree_map(self.memory.now, (args, kwargs)))
        # Code may ask whether it is given one tensor twice, as attention does.
        repeats = repeats_of([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        signature = CallSignature(spec, tuple(map(self._leaf_signature, leaves)), repeats=repeats)
        with self.stand_in.put_away(), torch.inference_mode(False), self._modes_put_away():
            graph = self.capture_call(signature)
        index = len(self.calls)
        self.calls.append(EvaluationCall(signature, graph))
        tensors = [self.create_arg(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        node = self.graph.create_node("call_module", "denoiser", (index, *tensors), {})
        outputs: list[LoopTensor] = []
        for leaf in graph.out_leaves:
            if isinstance(leaf, Tensor):
                getitem = self.graph.call_function(operator.getitem, (node, len(outputs)))
                outputs.append(self._known_form(getitem, leaf, LATENT))
            else:
                check_holds_no_tensors(leaf, f"{type(self.denoiser).__name__} returns", CaptureError)
        remaining = iter(outputs)
        results = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in graph.out_leaves]
        if graph.out_spec is None:
            raise AssertionError("an evaluation graph without an output structure")
        return tree_unflatten(results, graph.out_spec)

    @contextmanager
    def _modes_put_away(self) -> Iterator[None]:
        """Keep the modes of the trace from being asked for each call of torch that a capture makes."""
        own = [self._recorder, self.memory]
        with ExitStack() as stack:
            # A mode that the loop has entered since, such as torch.device, stays, and so do ours below it.
            entered = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
            if entered[-2:] == own:
                for _ in own:
                    stack.enter_context(torch.overrides._pop_mode_temporarily())
            yield

    def _leaf_signature(self, leaf: object) -> object:
        if isinstance(leaf, Tensor):
            # The lowered loop passes a copy, so that no later write reaches it.
            return TensorForm.of(leaf.fake if isinstance(leaf, LoopTensor) else leaf).of_copy()
        check_holds_no_tensors(leaf, "the loop gives the denoiser", LoopTraceError)
        try:
            hash(leaf)
        except TypeError:
            raise self.untraceable(
                f"gives the denoiser an argument of type {type(leaf).__name__}", "give it a tensor or a hashable value"
            ) from None
        return StaticValue.of(leaf)

    def _result(self, leaf: object) -> Argument:
        if isinstance(leaf, FakeTensor):
            raise self.uses_fake(leaf)
        check_holds_no_tensors(leaf, "the loop returns", LoopTraceError)
        try:
            return self.create_arg(self.memory.now(leaf))
        except LoopTraceError as error:
            raise LoopTraceError(
                f"the loop returns a {type(leaf).__name__}; return tensors, or tuples, lists or dicts of them"
            ) from error

    def _reject_autocast(self) -> None:
        if is_autocast_on():
            raise self.untraceable(
                "uses autocast", "a static graph would ignore it: enter it inside the denoiser's forward, or cast"
            )

    def _refuse_copy(self) -> NoReturn:
        raise self.untraceable("copies the denoiser", "make the copy before the loop, or give the copy to the sampler")

    def _make_inputs(self, given: object, origin: str) -> object:
        return tree_map(lambda leaf: self._make_input(leaf, origin) if isinstance(leaf, Tensor) else leaf, given)

    def _make_input(self, leaf: Tensor, origin: str) -> LoopTensor:
        node = self.graph.placeholder(f"input_{self.num_inputs}")
        self.num_inputs += 1
        return self._known_form(node, leaf, origin)

    def _known_form(self, node: Node, like: Tensor, origin: str) -> LoopTensor:
        node.meta["form"] = TensorForm.of(like)
        with self.fake_mode:
            return LoopTensor.wrap(self, node, node.meta["form"].empty(), {origin})

    def _constant(self, tensor: Tensor) -> Node:
        """Return a node for a concrete tensor of the loop, as it is at this moment."""
        weight = self.weight_paths.get(id(tensor))
        # A loop may go on writing into its own tensors, so the graph holds a copy: one for each state it has seen.
        # Keeping the original keeps its id from being used again.
        if isinstance(tensor, nn.Parameter) and not weight:
            self.read[id(tensor)] = tensor
        state = weight or id(tensor)
        name, _ = self._snapshots.get(state, ("", tensor))
        # A write through numpy or .data leaves the version, so the elements are compared.
        if not name or not (weight or _is_equal(tensor, self.constants[name])):
            name = weight or f"_loop_constant_{len(self.constants)}"
            self.constants[name] = tensor if weight else tensor.detach().clone()
            self._snapshots[state] = name, tensor
        return self.graph.create_node("get_attr", name)

    def _on_fakes(self, func: Callable[..., object], args: object, kwargs: object) -> object:
        fake_args, fake_kwargs = tree_map(
            lambda leaf: leaf.fake if isinstance(leaf, LoopTensor) else leaf, (args, kwargs)
        )
        with self.fake_mode, torch.no_grad():
            try:
                return func(*fake_args, **fake_kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                # How many elements x[mask] has depends on the mask only.
                given = loop_tensors_in((args, kwargs))[int(name_of(func) in INDEXING) :]
                what = f"asks for a result that depends on values of {made_from(given)} ({error})"
                raise self.untraceable(what, without_values(given)) from error
            except (UnsupportedFakeTensorException, UnsupportedOperatorException) as error:
                what = f"calls {name_of(func)}, which torch cannot record ({error})"
                raise self.untraceable(what, "use other operations") from error


class _RandomDrawRecorder(TorchFunctionMode):
    """Records ``torch.randn(shape)`` and other random draws as nodes, although none of their arguments is a proxy."""

    def __init__(self, tracer: LoopTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if self.tracer.capturing:
            return func(*args, **kwargs)
        self.tracer.check_no_weight_is_written(func, args, kwargs)
        self.tracer.note_weights_read(func, args, kwargs)
        if func in RANDOM_FUNCTIONS:
            return self.tracer.call(func, args, kwargs)
        if name_of(func) in IN_PLACE_DRAWS and not any(
            isinstance(leaf, LoopTensor) for leaf in tree_leaves((args, kwargs))
        ):
            raise self.tracer.untraceable(
                "draws random numbers into a tensor that it created itself", "draw with torch.randn or randn_like"
            )
        return func(*args, **kwargs)


class _GuardedGenerator:
    """Stands for torch's generator in ``torch.random`` while a loop is traced.

    The loop may save its state and put it back, as ``fork_rng`` does, as long as it draws nothing in between: draws are
    recorded, and would go on from the state that was put back.
    """

    def __init__(self, tracer: LoopTracer, generator: torch.Generator) -> None:
        self._tracer = tracer
        self._generator = generator
        self._num_draws: dict[bytes, int] = {}

    def get_state(self) -> Tensor:
        state: Tensor = self._generator.get_state()
        self._num_draws[state.numpy().tobytes()] = self._tracer.num_draws
        return state

    def set_state(self, state: Tensor) -> None:
        if self._tracer.is_in_loop and self._num_draws.get(state.numpy().tobytes()) != self._tracer.num_draws:
            raise self._refusal("set_state")
        self._generator.set_state(state)

    def _refusal(self, name: str) -> LoopTraceError:
        return self._tracer.untraceable(
            f"seeds the random number generator of torch, or puts back a state after a draw ({name})",
            "seed it before the sampler is called; the sampler draws the same numbers as the loop",
        )

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the generator has
        if self._tracer.is_in_loop:
            raise self._refusal(name)
        return getattr(self._generator, name)


@contextmanager
def _generator_guarded(tracer: LoopTracer) -> Iterator[None]:
    functions = vars(torch.random)
    generator = functions["default_generator"]
    functions["default_generator"] = _GuardedGenerator(tracer, generator)
    try:
        yield
    finally:
        functions["default_generator"] = generator


def _named_weights(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (denoiser.named_parameters(), denoiser.named_buffers()):
        for path, tensor in named:
            yield f"denoiser.{path}", tensor


def _is_equal(tensor: Tensor, snapshot: Tensor) -> bool:
    return tensor.shape == snapshot.shape and bool(tensor.is_meta or torch.equal(tensor, snapshot))


def _leaf_of(result: object, position: int) -> object:
    return tree_leaves(result)[position]


# The line that a user wrote is neither in a library nor in this folder.
_LIBRARIES = frozenset({"torch", "numpy", "contextlib", "copy", "functools", "pickle"})


def _caller() -> str:
    """Return file:line of the innermost frame outside torch and this package's tracer: the user's loop."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not (name.partition(".")[0] in _LIBRARIES or name.startswith(f"{__package__}.")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


def _lower(recorded: fx.Graph, tracer: LoopTracer) -> LoopSkeleton:
    """Turn the recorded torch calls into one functional ATen graph, with the denoiser's outputs as inputs."""
    nodes = list(recorded.nodes)
    constant_names = list(tracer.constants)
    outputs = [
        n for n in nodes if n.op == "call_function" and n.target is operator.getitem and _is_leaf_call(n.args[0])
    ]

    def loop_arithmetic(inputs: list[Tensor], constants: list[Tensor], predictions: list[Tensor]) -> list[object]:
        # Clones keep a later write into an input, a constant or a prediction from reaching a value that was read
        # before the write; in a functional graph they cost nothing, and the simplifier drops them.
        values: dict[Node, Any] = {}
        input_values, prediction_values = iter(inputs), dict(zip(outputs, predictions, strict=True))
        by_name = dict(zip(constant_names, constants, strict=True))
        arguments: list[object] = []
        result: list[object] = []
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = next(input_values).clone()
            elif node.op == "get_attr":
                values[node] = by_name[str(node.target)]
            elif _is_leaf_call(node):
                values[node] = None
                arguments += [argument.clone() for argument in args[1:]]
            elif node in prediction_values:
                values[node] = prediction_values[node].clone()
            elif node.op == "output":
                result = list(args[0])
            else:
                values[node] = _run(node, args, kwargs)
        return arguments + result

    with tracer.fake_mode:
        fakes = (
            [node.meta["form"].empty() for node in nodes if node.op == "placeholder"],
            [tracer.fake_mode.from_tensor(tensor) for tensor in tracer.constants.values()],
            [node.meta["form"].empty() for node in outputs],
        )
    with torch.no_grad(), tracer.fake_mode:
        module = _functional(loop_arithmetic, fakes)
        if any(n.op == "call_function" and _is_mutable(n.target) for n in module.graph.nodes):
            # Some operators are made of others that write in place, and appear only when those of the loop are gone.
            module = _functional(module, fakes)
    if tracer.out_spec is None:
        raise AssertionError("the loop was not run")
    root = nn.Module()
    for node in module.graph.find_nodes(op="get_attr"):
        # These are Python numbers that were assigned to a part of a tensor.
        value = getattr(module, str(node.target))
        root.register_buffer(str(node.target), value.constant if isinstance(value, FakeTensor) else value)
    return LoopSkeleton(
        graph=module.graph,
        root=root,
        calls=tracer.calls,
        num_inputs=tracer.num_inputs,
        num_noise=tracer.num_noise,
        constants=tracer.constants,
        out_spec=tracer.out_spec,
        num_outputs=tracer.out_spec.num_leaves,
        read=tuple(tracer.read.values()),
    )


def _run(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    function: Any = node.target
    try:
        return function(*args, **kwargs)
    except Exception as error:  # it ran on fake tensors before, so this is torch's, whatever its type
        raise LoopTraceError(
            f"the loop calls {name_of(function)} at {node.meta.get('caller', 'an unknown place')}, and torch cannot put"
            f" it into a static graph ({type(error).__name__}: {str(error).splitlines()[0]}); use other operations"
        ) from error


def _functional(function: Callable[..., object], inputs: tuple[Any, ...]) -> fx.GraphModule:
    functional = torch.func.functionalize(function, remove="mutations")
    return make_fx(functional, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)


def _is_mutable(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_leaf_call(node: object) -> bool:
    return isinstance(node, Node) and node.op == "call_module"
