"""What the operators of a file may be given, beyond what torch says when it runs them on fake tensors.

Fake tensors show that shapes and dtypes fit. They do not show what a kernel believes of what it is given: how many
elements statistics have, where a view begins, how long a transform was, by which scale an image grows. Each function
here asks about one kind of operator and returns why a call of it is refused, or None. ``OperationChecker`` asks them
all, in the same way when a sampler is saved and when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.errors import FileFormatError, SaveError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import arguments_of, evaluation_of, module_path, packet_of, root_tensor
from l2c_compile.graphs.storages import Storages
from l2c_compile.sampler_file.allowed_operators import CUTS, name_of

aten = torch.ops.aten

MAX_PIECES = 10_000
"""The most tensors in a list that is an argument or a result."""

_MAX_DIAGONAL = 2**31

Given = Mapping[str, Any]
"""The arguments of a call by name, with fake tensors for nodes."""


class OperationChecker:
    """Checks what the different operations of a graph are given, and that there are not too many of them.

    Each is tried on fake tensors when a file is read. Evaluations are copies of one another, so a loop has few
    different operations: 1500, and one for every 8 lines, are enough for any loop, and a hostile file then takes no
    longer to read than an honest one of its size.
    """

    def __init__(self, num_lines: int, error: type[SaveError] | type[FileFormatError]) -> None:
        self._limit = 1500 + num_lines // 8
        self._error = error
        self._num_checked = 0

    def check(self, node: Node) -> None:
        """Check an operation whose arguments have their fake values.

        Raises:
            SaveError: if a file may not hold it, and the checker was made with this error.
            FileFormatError: if a file may not hold it, and the checker was made with this error.
        """
        self._num_checked += 1
        if self._num_checked > self._limit:
            raise self._error(
                f"the graph has more than {self._limit} different operations, which a file does not hold; compile fewer"
                " evaluations"
            )
        if not isinstance(node.target, OpOverload):
            return
        given: Given = fx.node.map_arg(arguments_of(node), lambda argument: argument.meta["val"])
        self._raise_first(node, [_has_numbers_for_names(node, node.target)])
        asked = [_asks_for_pinned_memory, *_QUESTIONS.get(node.target._schema.name, ())]
        if node.target.overloadpacket in CUTS:
            asked.append(_makes_many_pieces)
        self._raise_first(node, (ask(given) for ask in asked))

    def check_whole(self, program: ProgramGraph) -> None:
        """Check what depends on more than the forms of the arguments; all nodes have their fake values.

        Raises:
            SaveError: if a file may not hold the graph, and the checker was made with this error.
            FileFormatError: if a file may not hold the graph, and the checker was made with this error.
        """
        views = program.graph.find_nodes(op="call_function", target=aten.as_strided.default)
        storages = Storages(program.graph.nodes if views else ())
        for node in views:
            self._raise_first(node, [_leaves_its_tensor(node, storages)])
        for node in program.graph.nodes:
            if packet_of(node) in _DIVISIONS:
                self._raise_first(node, [_divides_by_anything(node, program.root)])

    def _raise_first(self, node: Node, reasons: Iterable[str | None]) -> None:
        reason = next(filter(None, reasons), None)
        if reason is not None:
            raise self._error(refusal(node, reason))


def refusal(node: Node, reason: str) -> str:
    """Return the message of the error that a call in a file is refused with."""
    return (
        f"{place_of(node)} cannot be in a saved sampler, because it {reason}; write that part with other functions of"
        " torch, or keep the sampler in Python"
    )


def place_of(node: Node) -> str:
    """Return the operator of a node, with module path and evaluation, for a message."""
    name = name_of(node.target) if isinstance(node.target, OpOverload) else str(node.target)
    path, evaluation = module_path(node), evaluation_of(node)
    module = f" in module {path!r:.80}" if path else ""
    return name + module + ("" if evaluation is None else f" in evaluation {evaluation}")


def _tensors(given: Given, *names: str) -> list[tuple[str, Tensor]]:
    return [(name, given[name]) for name in names if isinstance(given.get(name), Tensor)]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _has_numbers_for_names(node: Node, target: OpOverload) -> str | None:
    # Torch takes a number for a dtype, and does not compare it with those that it has.
    schema = target._schema.arguments
    given = {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
    for argument in schema:
        value, kind = given.get(argument.name), str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        if value is not None and not isinstance(value, _NAMED_KINDS.get(kind, object)):
            return f"wants a {kind} for {argument.name}, got {value!r:.80}"
    return None


def _asks_for_pinned_memory(given: Given) -> str | None:
    return "asks for pinned memory" if given.get("pin_memory") else None


def _makes_many_pieces(given: Given) -> str | None:
    value, dim = given.get("self"), given.get("dim", 0)
    if not isinstance(value, Tensor) or not isinstance(dim, int) or any(isinstance(v, list) for v in given.values()):
        return None  # as many pieces as the list has entries
    num_pieces = given.get("sections", given.get("chunks"))
    if num_pieces is None:
        size = given.get("split_size", 1)
        num_pieces = value.shape[dim] // max(1, size if isinstance(size, int) else 1)
    is_known = isinstance(num_pieces, int) and num_pieces <= MAX_PIECES
    return None if is_known else f"makes {num_pieces} pieces, where at most {MAX_PIECES} are read"


def _has_other_statistics(given: Given) -> str | None:
    """Batch and instance norm: one number a channel, and running ones only where they are not written."""
    x = given.get("input")
    if not isinstance(x, Tensor) or x.dim() < 2:
        return "wants an input with channels"
    for name, tensor in _tensors(given, "weight", "bias", "running_mean", "running_var"):
        if _shape(tensor) != [x.shape[1]]:
            return f"wants a {name} of shape {[x.shape[1]]}, one number a channel, got {_shape(tensor)}"
    uses_batch = given.get("training", given.get("use_input_stats", False))
    running = [given.get("running_mean"), given.get("running_var")]
    if uses_batch and any(each is not None for each in running):
        return "would write running statistics"
    if not uses_batch and any(each is None for each in running):
        return "wants running statistics where it does not take those of the batch"
    return None


def _has_other_groups(given: Given) -> str | None:
    x, sizes = given["input"], [given["N"], given["C"], given["HxW"]]
    wanted = [*x.shape[:2], math.prod(x.shape[2:])]
    return None if sizes == wanted else f"wants the sizes {wanted} of its input, got {sizes}"


def _has_other_normalized_shape(given: Given) -> str | None:
    shape = list(given["normalized_shape"])
    for name, tensor in _tensors(given, "weight", "bias"):
        if _shape(tensor) != shape:
            return f"wants a {name} of shape {shape}, got {_shape(tensor)}"
    x = given["input"]
    fits = 0 < len(shape) <= x.dim() and _shape(x)[-len(shape) :] == shape
    return None if fits else f"wants an input that ends in the shape {shape}, got {_shape(x)}"


def _has_another_norm(given: Given) -> str | None:
    v, g, dim = given["v"], given["g"], given["dim"]
    if v.dim() == 0 or dim not in (0, v.dim() - 1):
        return f"wants the first or the last dimension of the weight, got {dim}"
    wanted = [size if i == dim else 1 for i, size in enumerate(v.shape)]
    return None if _shape(g) == wanted else f"wants norms of shape {wanted}, got {_shape(g)}"


def _has_a_norm_with_gaps(given: Given) -> str | None:
    is_plain = given["v"].is_contiguous() and given["g"].is_contiguous()
    return None if is_plain else "wants a weight and norms that are contiguous"


def _grows_by_another_scale(given: Given) -> str | None:
    sizes = given.get("output_size")
    scales = [given.get(name) for name in ("scales", "scales_d", "scales_h", "scales_w") if name in given]
    x = given.get("self", given.get("input"))
    assert isinstance(x, Tensor)
    if given.get("scale_factors") is not None:
        scales = list(given["scale_factors"])
    for scale in scales:
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            return f"wants a scale that is finite and above 0, got {scale}"
    if sizes is None:
        return None
    for before, after, scale in zip(x.shape[2:], sizes, scales, strict=False):
        if scale is not None and abs(before * scale - after) >= 1:
            return f"wants the scale from {before} to {after}, got {scale}"
    return None


def _transforms_another_size(given: Given) -> str | None:
    x = given["self"]
    dims = [dim + x.dim() if dim < 0 else dim for dim in given["dim"]]
    if not dims or len(set(dims)) < len(dims) or not all(0 <= dim < x.dim() for dim in dims):
        return f"wants different dimensions of its input, got {given['dim']}"
    size = given.get("last_dim_size")
    if size is not None and (size < 1 or size // 2 + 1 != x.shape[dims[-1]]):
        return f"wants {size // 2 + 1} frequencies for a result of size {size}, got {x.shape[dims[-1]]}"
    return None


def _leaves_gaps_between_rows(given: Given) -> str | None:
    """Attention: torch gives its result the strides of a copy of the queries, and writes rows without gaps."""
    query = given["query"]
    gap = TensorForm.of(query).of_copy().stride[-1] if query.dim() == 4 and query.shape[-1] > 1 else 1
    return f"wants queries whose rows do not overlap, got strides {list(query.stride())}" if gap != 1 else None


def _overlaps_in_rows(given: Given) -> str | None:
    query = given["query"]
    # With other queries torch takes a kernel that reads any strides.
    return _leaves_gaps_between_rows(given) if query.dim() and query.stride(-1) == 1 else None


def _attends_elsewhere(given: Given) -> str | None:
    """Attention: (B, H, L, E), (B, H, S, E) and (B, H, S, E), and a mask that broadcasts to (B, H, L, S)."""
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [_shape(each) for each in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        return f"wants four dimensions each, got {shapes}"
    b, h, length, e = shapes[0]
    s = shapes[1][2]
    if shapes[1:] != [[b, h, s, e]] * 2:
        return f"wants keys and values of one shape that fits the queries, got {shapes}"
    mask = given.get("attn_mask")
    if mask is None:
        return None
    fits = mask.dim() in (2, 4) and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), (s, length, h, b), strict=False)
    )
    return None if fits else f"wants a mask that broadcasts to {[b, h, length, s]}, got {_shape(mask)}"


def _has_other_heads(given: Given) -> str | None:
    """Attention in one operator, and a whole encoder layer: a stream (B, T, D), and weights of its width."""
    x = given.get("src", given.get("query"))
    assert isinstance(x, Tensor)
    dim, heads = given["embed_dim"], given.get("num_head", given.get("num_heads"))
    if x.dim() != 3 or x.shape[2] != dim or heads < 1 or dim % heads:
        return f"wants a stream (B, T, {dim}) that {heads} heads divide, got {_shape(x)}"
    batch, tokens = x.shape[:2]
    hidden = given["ffn_weight_1"].shape[0] if "ffn_weight_1" in given else 0
    wanted = {
        **{name: [batch, tokens, dim] for name in ("query", "key", "value")},
        **{"qkv_weight": [3 * dim, dim], "qkv_bias": [3 * dim], "proj_weight": [dim, dim], "proj_bias": [dim]},
        **{f"norm_{kind}_{number}": [dim] for kind in ("weight", "bias") for number in (1, 2)},
        **{"ffn_weight_1": [hidden, dim], "ffn_bias_1": [hidden]},
        **{"ffn_weight_2": [dim, hidden], "ffn_bias_2": [dim]},
    }
    for name, tensor in _tensors(given, *wanted):
        if _shape(tensor) != wanted[name]:
            return f"wants {name} of shape {wanted[name]}, got {_shape(tensor)}"
    shapes = {0: [tokens, tokens], 1: [batch, tokens], 2: [batch, heads, tokens, tokens]}
    for _, mask in _tensors(given, "mask"):
        shape = shapes.get(given["mask_type"])
        if _shape(mask) != shape:
            return f"wants a mask of shape {shape}, got {_shape(mask)}"
    return None


def _has_other_gates(num_gates: int) -> Callable[[Given], str | None]:
    """Recurrent layers: weights and states of the sizes that the input and the number of layers say."""

    def ask(given: Given) -> str | None:
        if "batch_sizes" in given:
            return "takes packed sequences, whose lengths nothing compares"
        x, params = given["input"], given["params"]
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        directions, layers = 2 if given["bidirectional"] else 1, given["num_layers"]
        each = 4 if given["has_biases"] else 2
        if layers < 1 or len(params) != layers * directions * each or x.dim() not in (2, 3):
            return "wants weights for each layer and direction, and no projections"
        hidden = params[1].shape[-1]
        rows = num_gates * hidden
        for number, tensor in enumerate(params):
            layer, kind = number // (each * directions), number % each
            width = (x.shape[-1] if layer == 0 else directions * hidden) if kind == 0 else hidden
            wanted = [rows, width] if kind < 2 else [rows]
            if _shape(tensor) != wanted:
                return f"wants weight {number} of shape {wanted}, got {_shape(tensor)}"
        batch = [x.shape[0 if given["batch_first"] else 1]] if x.dim() == 3 else []
        wanted = [layers * directions, *batch, hidden]
        if len(states) != (2 if num_gates == 4 else 1) or any(_shape(state) != wanted for state in states):
            return f"wants states of shape {wanted}"
        return None

    return ask


def _samples_in_another_mode(given: Given) -> str | None:
    modes = given["interpolation_mode"], given["padding_mode"]
    return None if all(0 <= mode <= 2 for mode in modes) else f"wants modes of 0 to 2, got {modes}"


def _is_far_from_the_diagonal(given: Given) -> str | None:
    numbers = [given[name] for name in ("diagonal", "offset", "row", "col") if name in given]
    is_near = all(abs(number) <= _MAX_DIAGONAL for number in numbers)
    return None if is_near else f"wants a diagonal of at most {_MAX_DIAGONAL}, got {numbers}"


def _negates_no_float(given: Given) -> str | None:
    return None if given["self"].is_floating_point() else f"wants floats to negate, got {given['self'].dtype}"


def _is_sorted_elsewhere(given: Given) -> str | None:
    return "takes positions from a sorter" if given.get("sorter") is not None else None


def _has_unwritten_strides(given: Given) -> str | None:
    allowed = (None, torch.contiguous_format)
    return None if given.get("memory_format") in allowed else "makes memory without values; make zeros"


def _leaves_its_tensor(node: Node, storages: Storages) -> str | None:
    given: Given = arguments_of(node)
    source, size, stride, offset = (given[name] for name in ("self", "size", "stride", "storage_offset"))
    view = TensorForm(tuple(size), tuple(stride), node.meta["val"].dtype, node.meta["val"].device)
    # The position is one in the storage, where it is given; otherwise that of the source in its storage.
    holders = [source] if offset is None else [source, storages.base(source)]
    room = max(_dense_bytes(holder) for holder in holders)
    needed = extent_bytes(view) + (offset or 0) * view.dtype.itemsize if 0 not in size else 0
    reason = f"wants {needed} bytes of a tensor without gaps, which has {room}"
    return reason if needed > room or min([offset or 0, *stride], default=0) < 0 else None


def _divides_by_anything(node: Node, root: nn.Module) -> str | None:
    # The processor ends the process where it divides an integer by 0, or the smallest one by -1.
    given: Given = arguments_of(node)
    divisor = given["other"]
    is_true = given.get("rounding_mode") is None and packet_of(node) in (aten.div, aten.divide)
    values = [x.meta["val"] if isinstance(x, Node) else x for x in (given["self"], divisor)]
    if is_true or any(x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float) for x in values):
        return None
    if not isinstance(divisor, Node):
        return f"divides integers by {divisor}" if divisor in (0, -1) else None
    if divisor.op != "get_attr":
        return "divides integers by a tensor that is computed, not by a number or a constant"
    constant = root_tensor(root, divisor)
    is_safe = constant.is_meta or not bool(((constant == 0) | (constant == -1)).any())
    return None if is_safe else "divides integers by a constant with 0 or -1 in it"


def _dense_bytes(node: Node) -> int:
    """Return the bytes of a tensor; 0 if its strides leave gaps, in which nothing was written."""
    form = TensorForm.of(node.meta["val"])
    return extent_bytes(form) if form.of_copy().stride == form.stride else 0


def extent_bytes(form: TensorForm) -> int:
    """Return the number of bytes from the first to behind the last element of a tensor."""
    if 0 in form.shape:
        return 0
    steps = zip(form.shape, form.stride, strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * form.dtype.itemsize


_NAMED_KINDS: Mapping[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}

_QUESTIONS: dict[str, tuple[Callable[[Given], str | None], ...]] = {
    f"aten::{name}": questions
    for names, questions in (
        ("batch_norm instance_norm native_batch_norm _native_batch_norm_legit", (_has_other_statistics,)),
        ("_native_batch_norm_legit_no_training _batch_norm_no_update", (_has_other_statistics,)),
        ("native_group_norm", (_has_other_groups,)),
        ("layer_norm native_layer_norm rms_norm _fused_rms_norm", (_has_other_normalized_shape,)),
        ("_weight_norm", (_has_another_norm,)),
        ("_weight_norm_interface", (_has_another_norm, _has_a_norm_with_gaps)),
        ("upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d", (_grows_by_another_scale,)),
        ("upsample_nearest1d upsample_nearest2d upsample_nearest3d", (_grows_by_another_scale,)),
        ("_upsample_nearest_exact1d _upsample_nearest_exact2d", (_grows_by_another_scale,)),
        ("_upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", (_grows_by_another_scale,)),
        ("_fft_c2c _fft_c2r _fft_r2c", (_transforms_another_size,)),
        ("_scaled_dot_product_flash_attention_for_cpu", (_attends_elsewhere, _leaves_gaps_between_rows)),
        ("scaled_dot_product_attention", (_overlaps_in_rows,)),
        ("_native_multi_head_attention _transformer_encoder_layer_fwd", (_has_other_heads,)),
        ("lstm", (_has_other_gates(4),)),
        ("gru", (_has_other_gates(3),)),
        ("rnn_tanh rnn_relu", (_has_other_gates(1),)),
        ("grid_sampler grid_sampler_2d grid_sampler_3d", (_samples_in_another_mode,)),
        ("tril triu tril_indices triu_indices", (_is_far_from_the_diagonal,)),
        ("_neg_view", (_negates_no_float,)),
        ("searchsorted", (_is_sorted_elsewhere,)),
        ("empty", (_has_unwritten_strides,)),
    )
    for name in names.split()
}

_DIVISIONS = (aten.div, aten.divide, aten.floor_divide, aten.remainder, aten.fmod)
