"""What a loop or a denoiser returns: the values that a generator yields, and objects that hide their tensors."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Generator, Iterator
from dataclasses import dataclass, is_dataclass
from types import FunctionType, GeneratorType, ModuleType

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import register_pytree_node, tree_leaves

from l2c_compile.errors import CaptureError, LoopTraceError
from l2c_compile.frontend.loop_tensor import LoopTensor


@dataclass
class _Yielded:
    """All that a generator yielded, and what it returned in the end; unflattened it is a generator of the same."""

    values: list[object]
    returned: object


def consumed(result: object) -> object:
    """Return the result of a loop, with what a generator yields in the place of the generator.

    Raises:
        LoopTraceError: if the loop is asynchronous.
    """
    if inspect.iscoroutine(result):
        result.close()
    if inspect.isawaitable(result) or inspect.isasyncgen(result):
        raise LoopTraceError("the loop is asynchronous, so it has not run yet; give a plain function that runs it")
    if not isinstance(result, GeneratorType):
        return result
    values: list[object] = []
    try:
        while True:
            values.append(next(result))
    except StopIteration as end:
        return _Yielded(values, end.value)


def check_holds_no_tensors(tree: object, what: str, error: type[LoopTraceError | CaptureError]) -> None:
    """Raise ``error`` if an object in a nested container hides tensors without values from torch.

    Args:
        tree: the nested container.
        what: who does what with it: "the loop returns".
        error: the kind of error.
    """
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) or not _hides_tensors(leaf):
            continue
        name = type(leaf).__name__
        if is_dataclass(leaf):
            way_out = f"call torch.export.register_dataclass({name})"
        elif isinstance(leaf, Iterator):
            way_out = "use a list of what it gives"
        else:
            way_out = f"call torch.utils._pytree.register_pytree_node({name}, ...), or use a plain tuple, list or dict"
        raise error(f"{what} an object of type {name}, whose tensors torch does not see; {way_out}")


def _hides_tensors(leaf: object) -> bool:
    around: list[object] = [leaf]
    seen: set[int] = set()
    for _ in range(5):
        if any(isinstance(each, (LoopTensor, FakeTensor)) for each in around):
            return True
        seen.update(map(id, around))
        around = [each for each in gc.get_referents(*around) if id(each) not in seen and not isinstance(each, _PASSED)]
    return False


_PASSED = (type, ModuleType, FunctionType)


def _generator(values: list[object], returned: object) -> Generator[object, None, object]:
    yield from values
    return returned


register_pytree_node(
    _Yielded,
    lambda yielded: ([yielded.values, yielded.returned], None),
    lambda children, _: _generator(*children),
    serialized_type_name="l2c_compile.Yielded",
)
