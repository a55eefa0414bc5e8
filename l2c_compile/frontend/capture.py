"""Capture one evaluation of the denoiser as a functional ATen graph that knows its sites.

``torch.export`` (non-strict) runs the denoiser's own Python on fake tensors. Forward hooks, which exist only during the
export, pass every site's value through the identity op ``l2c::site``. So a site is found exactly, whatever the module's
class, and also when the module returns a tuple, returns its input, or is called twice.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.jit import ScriptModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from l2c_compile.errors import CaptureError, L2CError, UnknownSiteError, nearest
from l2c_compile.files.torch_cache import cache_folder_named
from l2c_compile.frontend.aliases import AliasesAsInEagerTorch
from l2c_compile.frontend.fast_path import fast_path_as_in_eager_torch
from l2c_compile.frontend.restore import left_as_it_was, no_part_is_made
from l2c_compile.frontend.stand_in import without_hooks_of
from l2c_compile.frontend.weights_lock import weights_swapped
from l2c_compile.frontend.written_state import Run, StateEffect, check_later_calls_are_alike
from l2c_compile.graphs.forms import CallSignature, tensors_in
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SITE
from l2c_compile.graphs.nodes import draws_random_numbers, module_path, output_list
from l2c_compile.graphs.site_results import SiteResult
from l2c_compile.schedules.sites import Site
from l2c_compile.state.python_state import PythonState
from l2c_compile.state.random_state import GeneratorStates, random_state_kept


def check_names(denoiser: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ``UnknownSiteError`` for a site that gives a shared module by another name than its first one."""
    names = {id(module): path for path, module in denoiser.named_modules()}
    for path, module in denoiser.named_modules(remove_duplicate=False):
        first = names[id(module)]
        for site in sites if path != first else ():
            if site.path == path:
                raise UnknownSiteError(
                    f"site '{site}': module '{path}' is module '{first}' under another name; give that one, whose calls"
                    " are counted under all its names"
                )


def check_sites_exist(denoiser: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ``UnknownSiteError`` for a site whose module the denoiser does not have, or whose calls are TorchScript."""
    modules = dict(denoiser.named_modules())
    paths = modules.keys()
    for site in sites:
        for path in site.modules():
            if path not in paths:
                hint = nearest(path, paths) or f"see {type(denoiser).__name__}.named_modules() for the paths it has"
                raise UnknownSiteError(f"site '{site}': the denoiser has no module '{path}'; {hint}")
        if isinstance(modules[site.path], torch.jit.ScriptModule):
            raise UnknownSiteError(
                f"site '{site}': module '{site.path}' is TorchScript, whose calls can be neither marked nor left out;"
                " name a module around it, or build the denoiser of plain modules"
            )


def capture(
    denoiser: nn.Module,
    signature: CallSignature,
    sites: Sequence[Site],
    read_inputs_of: Collection[Site] = (),
) -> EvaluationGraph:
    """Export one call of ``denoiser`` and mark ``sites`` in it.

    Args:
        denoiser: any module that ``torch.export`` takes; it is left as it was.
        signature: the form of the call. Shapes, dtypes, devices and non-tensor arguments become static.
        sites: the sites to mark; every one must exist (``check_sites_exist``).
        read_inputs_of: the sites whose input is marked too because a rule reads it; that of a "delta" site always is.

    Returns:
        The evaluation graph. Its inputs are the tensors of the call in order; weights are ``get_attr`` nodes. A site
        whose module is not called, or not that often, is not marked in it (``check_sites_called``).

    Raises:
        UnknownSiteError: if a site's module returns no tensor, or its input is wanted and is none.
        CaptureError: if the denoiser cannot be exported, draws random numbers, or changes its weights, its buffers, its
            inputs or the value of a site in place.
        BackendError: if torch cannot make its cache folder.
    """
    _reject_weights(denoiser)
    with FakeTensorMode():
        example_inputs = tuple(spec.empty() for spec in signature.tensor_forms())

    def export() -> tuple[_FlatCall, ExportedProgram]:
        flat = _FlatCall(denoiser, signature)
        marking = _marking(denoiser, sites, read_inputs_of, flat.returned)
        fast_path = fast_path_as_in_eager_torch(denoiser)
        reads = _ValueReads()
        with marking, AliasesAsInEagerTorch(), fast_path, reads, warnings.catch_warnings():
            # Torch asks for buffers in place of attributes that a call assigns; they are put back.
            warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
            program = torch.export.export(flat, example_inputs, strict=False)
        reads.check(denoiser)
        return flat, program

    def export_again() -> Run:
        flat, program = export()
        return flat.run(program)

    try:
        with (
            cache_folder_named(),
            weights_swapped(),
            torch.no_grad(),
            random_state_kept(),
            left_as_it_was({"denoiser": denoiser}),
            without_hooks_of(denoiser),
        ):
            drawn = GeneratorStates()
            with no_part_is_made(denoiser):
                flat, program = export()
            _reject_draws(denoiser, drawn)
            check_later_calls_are_alike(denoiser, flat.run(program), export_again)
        with warnings.catch_warnings():
            # torch warns of its own copying of specs.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            program = program.run_decompositions({})
    except L2CError:
        raise
    except Exception as error:  # torch.export raises whatever the model's own Python raises
        raise CaptureError(
            f"torch.export cannot capture one evaluation of {type(denoiser).__name__}"
            f" ({type(error).__name__}: {_first_line(error)}); {_way_out(denoiser)}"
        ) from error
    if flat.returned.spec is None:
        raise AssertionError("torch.export did not run the denoiser")
    _reject_effects(denoiser, program)
    return _to_evaluation_graph(flat, program, tuple(sites))


def _reject_weights(denoiser: nn.Module) -> None:
    """Raise ``CaptureError`` for a weight of a kind that an exported graph cannot hold."""
    name = type(denoiser).__name__
    for path, weight in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        if is_traceable_wrapper_subclass(weight):
            raise CaptureError(
                f"weight '{path}' of {name} is a {type(weight).__name__}, which is no plain tensor but holds several,"
                " and a static graph refers to plain ones only; give the module plain weights, for example those before"
                " quantization"
            )


_TENSOR = object()


@dataclass
class _ReturnedTree:
    """The structure that the denoiser returned, kept here because attributes of a module do not survive the export."""

    spec: TreeSpec | None = None
    leaves: Sequence[object] = ()
    marks: list[Tensor] = field(default_factory=list)
    """The marks, which are returned too: export removes what is unused, but a rule may read an input that its module
    ignores."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often each module with a site was called."""
    effect: StateEffect | None = None
    """What the call changed in the denoiser's state; the tensors that it stored there are returned last."""
    marked: list[_MarkedTensor] = field(default_factory=list)
    """The values of the sites, with their marks."""
    results: dict[str, SiteResult] = field(default_factory=dict)
    """What the module of each site returned, by the site's text."""


class _FlatCall(nn.Module):
    """The denoiser with flat tensors as inputs and outputs, so that export sees only what can vary."""

    def __init__(self, denoiser: nn.Module, signature: CallSignature) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._signature = signature
        self.returned = _ReturnedTree()

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self._signature.unflatten(tensors)
        before = PythonState({"denoiser": self.denoiser})
        leaves, self.returned.spec = tree_flatten(nn.Module.__call__(self.denoiser, *args, **kwargs))
        self.returned.effect = effect = StateEffect.since(before)
        self._check_marked()
        # A token stands for each tensor, because export takes a tensor that is kept for state of the module.
        self.returned.leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        marks = list(self.returned.marks)
        self.returned.marks.clear()
        stored = [] if effect is None else list(effect.stored.values())
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)] + marks + stored

    def run(self, program: ExportedProgram) -> Run:
        """Return the latest call: what it gave, and what it changed."""
        values = tuple(leaf for leaf in self.returned.leaves if leaf is not _TENSOR)
        return Run(program, self.returned.effect, values)

    def _check_marked(self) -> None:
        for each in self.returned.marked:
            if each.differs_by_write():
                raise CaptureError(
                    f"site '{each.site}': {type(self.denoiser).__name__} writes in place into a tensor that shares"
                    " memory with the site's value; clone one of them first"
                )


class _ValueReads(TorchFunctionMode):
    """Notes where code asks for a value of a tensor that has none, so that an error of torch which it catches shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first_error: Exception | None = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if getattr(func, "__name__", "") in _VALUE_READS:
                self.first_error = self.first_error or error
            raise

    def check(self, denoiser: nn.Module) -> None:
        """Raise CaptureError if there was such an error, although the denoiser went on."""
        if self.first_error is not None:
            raise CaptureError(
                f"{type(denoiser).__name__} asks for a value of a tensor and catches the error that it gets while it is"
                f" captured ({_first_line(self.first_error)}), so the capture would be another way through its forward;"
                " use torch.where, or put that part into the loop"
            ) from self.first_error


_VALUE_READS = frozenset({"__bool__", "__float__", "__int__", "__index__", "__complex__", "item", "tolist", "numpy"})


@dataclass(frozen=True)
class _MarkedTensor:
    """A tensor and its mark, which the denoiser uses in its place: a copy, so a write into one leaves the other."""

    site: Site
    tensor: Tensor
    version: int
    mark: Tensor
    is_input: bool
    """Whether the module returned its input, or a view of it, so that other code may still read it."""

    def differs_by_write(self) -> bool:
        """Return whether a write in place has reached one of the two, while the other may still be read."""
        return self.tensor._version != self.version or (self.is_input and self.mark._version != 0)


@contextmanager
def _marking(
    denoiser: nn.Module, sites: Sequence[Site], read_inputs_of: Collection[Site], returned: _ReturnedTree
) -> Iterator[None]:
    """Pass the inputs and outputs of the sites' modules through ``l2c::site`` while the context is open."""
    calls: Counter[str] = Counter()
    begun: set[Site] = set()
    versions: dict[str, list[int]] = {}

    def needs_input(site: Site) -> bool:
        return site.kind == "delta" or site in read_inputs_of

    def mark_tensors(value: object, site: Site, inputs: list[Tensor]) -> object:
        storages = {_storage(tensor) for tensor in inputs}
        leaves, spec = tree_flatten(value)
        marks: list[object] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.is_inference():
                    raise CaptureError(
                        f"site '{site}': its value is made under torch.inference_mode, where torch does not count the"
                        " writes into a tensor; use torch.no_grad in the forward"
                    )
                port = sum(isinstance(mark, Tensor) for mark in marks)
                mark = SITE(leaf, str(site), port, -1)
                returned.marked.append(_MarkedTensor(site, leaf, leaf._version, mark, _storage(leaf) in storages))
                returned.marks.append(mark)
                marks.append(mark)
            else:
                marks.append(leaf)
        return tree_unflatten(marks, spec)

    def mark_input(path: str, wanted: list[Site]) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
            for site in wanted:
                if site.call == calls[path]:
                    if not args or not isinstance(args[0], Tensor):
                        raise UnknownSiteError(
                            f"site '{site}': module '{path}' takes no tensor as its first positional argument, so what"
                            " needs its input (a change out - in, or the rule) is not defined; use its output and"
                            " another rule"
                        )
                    mark = SITE(args[0], str(site), INPUT_PORT, -1)
                    returned.marks.append(mark)
                    begun.add(site)
                    args = (mark, *args[1:])
            versions[path] = _versions(args)
            return args

        return hook

    def mark_output(path: str, wanted: list[Site]) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> object:
            for site in wanted:
                if site.call == calls[path] and needs_input(site) and site not in begun:
                    raise UnknownSiteError(
                        f"site '{site}': '{path}' is called without a call of '{site.path}' before it, so what needs"
                        " the input of the run is not defined; use its output and another rule"
                    )
            inputs = tensors_in(args)
            here = [site for site in wanted if site.call == calls[path]]
            if here and versions[path] != _versions(args):
                raise CaptureError(
                    f"site '{here[0]}': module '{path}' writes into its input in place, so more than its output would"
                    " change where it is reused; let it clone that input first"
                )
            for site in here:
                returned.results[str(site)] = result = SiteResult.of(output)
                if not result.num_tensors:
                    raise UnknownSiteError(
                        f"site '{site}': module '{path}' returns {result}, in which there is no tensor to reuse; let it"
                        " return tensors, or tuples, lists or dicts of them, or name another module"
                    )
                output = mark_tensors(output, site, inputs)
            calls[path] += 1
            return output

        return hook

    with ExitStack() as hooks:
        for path in dict.fromkeys(p for site in sites for p in (site.path, site.last or site.path)):
            module = denoiser.get_submodule(path)
            begins = [site for site in sites if site.path == path and needs_input(site)]
            ends = [site for site in sites if (site.last or site.path) == path]
            # A run is marked behind its last module, so that it holds what is read where that module is reused.
            ends.sort(key=lambda site: site.num_modules)
            # In front of the user's own hooks: the input and the value of a site are those that the caller sees.
            hooks.callback(module.register_forward_pre_hook(mark_input(path, begins), prepend=True).remove)
            hooks.callback(module.register_forward_hook(mark_output(path, ends)).remove)
        yield


def _versions(tree: object) -> list[int]:
    """Return the versions of the tensors in a tree that have one."""
    return [tensor._version for tensor in tensors_in(tree) if not tensor.is_inference()]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _reject_draws(denoiser: nn.Module, drawn: GeneratorStates) -> None:
    for generator in drawn.moved():
        raise CaptureError(
            f"{type(denoiser).__name__} draws from the random number generator of {generator}, or seeds it, in a call;"
            " draw in the loop with torch.randn, and pass the numbers in"
        )


def _reject_effects(denoiser: nn.Module, program: ExportedProgram) -> None:
    name = type(denoiser).__name__
    for output in program.graph_signature.output_specs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            buffer = str(output.target).removeprefix("denoiser.")
            raise CaptureError(
                f"{name} changes its buffer '{buffer}' in every evaluation; call .eval() before compiling"
            )
        if output.kind is OutputKind.PARAMETER_MUTATION:
            weight = str(output.target).removeprefix("denoiser.")
            raise CaptureError(f"{name} changes its weight '{weight}' in place; let it clone that weight first")
        if output.kind is OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(f"{name} changes its input '{output.target}' in place; let it clone that input first")
    needed = _needed(program.graph)
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{name} calls {node.target} in {_place(node)}, and a static graph has neither branches nor loops of"
                " its own; use torch.where or another tensor operation there"
            )
        # Checks of sizes are no part of the graph.
        if node in needed and isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise CaptureError(
                f"{name} reads a value of a tensor into Python ({node.target}) in {_place(node)}, and a static graph"
                " has no Python; keep it a tensor, or compute it in the loop and pass it in"
            )
        if draws_random_numbers(node):
            raise CaptureError(
                f"{name} draws random numbers ({node.target}) in {_place(node)}; call .eval() if it is dropout, or"
                " draw them in the loop and pass them in"
            )


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the results are made from."""
    needed = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _place(node: fx.Node) -> str:
    path = module_path(node)
    return f"module '{path}'" if path else "its own forward"


def _to_evaluation_graph(flat: _FlatCall, program: ExportedProgram, sites: tuple[Site, ...]) -> EvaluationGraph:
    """Copy the exported graph with weights as ``get_attr`` instead of inputs."""
    root = nn.Module()
    root.denoiser = flat.denoiser
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants: dict[str, str] = {}

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                copies[node] = graph.placeholder(node.name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                copies[node] = graph.get_attr(str(spec.target))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                target = str(spec.target)
                if target not in constants:
                    constants[target] = f"_constant_{len(constants)}"
                    root.register_buffer(constants[target], program.constants[target], persistent=False)
                copies[node] = graph.get_attr(constants[target])
            else:
                raise CaptureError(
                    f"the exported denoiser takes an input of kind {spec.kind.name}, which is not supported"
                )
        elif node.op == "output":
            returned = sum(leaf is _TENSOR for leaf in flat.returned.leaves)
            copies[node] = graph.output(
                [copies[n] for n in output_list(program.graph)[:returned] if isinstance(n, fx.Node)]
            )
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    tensors = iter(n.meta["val"] for n in output_list(graph) if isinstance(n, fx.Node))
    leaves = tuple(next(tensors) if leaf is _TENSOR else leaf for leaf in flat.returned.leaves)
    stored = tuple(flat.returned.effect.stored) if flat.returned.effect is not None else ()
    return EvaluationGraph(graph, root, sites, flat.returned.spec, leaves, stored, flat.returned.results)


def check_sites_called(denoiser: nn.Module, sites: Sequence[Site], evaluations: Collection[EvaluationGraph]) -> None:
    """Raise ``UnknownSiteError`` for a site that none of the evaluations calls."""
    for site in sites:
        if evaluations and not any(str(site) in evaluation.results for evaluation in evaluations):
            raise UnknownSiteError(
                f"site '{site}': one evaluation of {type(denoiser).__name__} never calls it (call number {site.call} of"
                f" module '{site.last or site.path}'), or bypasses its __call__; name a module that it calls"
            )


def _way_out(denoiser: nn.Module) -> str:
    """Return what may help where torch.export cannot capture a denoiser."""
    for path, module in denoiser.named_modules():
        if isinstance(module, ScriptModule):
            what = f"module '{path}'" if path else "it"
            return f"{what} is made by torch.jit, and its Python is lost: give the module that it was made from"
    for path, weight in denoiser.named_parameters():
        if weight.is_inference() and weight.requires_grad:
            return (
                f"weight '{path}' was made under torch.inference_mode: make the model outside of it, or give"
                " copy.deepcopy(model), made outside of it"
            )
    return "remove what depends on tensor values or leaves torch from its forward, or put that part into the loop"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
