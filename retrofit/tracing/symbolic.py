"""The calls a model makes, read with torch.fx, without data."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from retrofit.errors import RetrofitError
from retrofit.running.random_numbers import seeded
from retrofit.running.shared_copy import shared_copy
from retrofit.tracing.attribute_reads import Reads, united, watched_layers
from retrofit.tracing.calls import Call, Trace, is_alone, rebuilt
from retrofit.tracing.contractions import SCALINGS, SUMS, drops_weights, weight_shape
from retrofit.tracing.operations import (
    AFFINE_FUNCTIONS,
    PRODUCTS,
    SHAPE_READERS,
    called_name,
    factors,
    function_name,
    is_leaf,
    keeps_dim,
    module_name,
    with_values,
)


class UntraceableError(RetrofitError):
    """torch.fx cannot follow the model.

    Attributes:
        place: in the model's code, what stopped it ("vgg.py:84").
        reads: what that code had read of its modules.
    """

    def __init__(
        self, model: str, frame: traceback.FrameSummary, reason: str, reads: Reads
    ) -> None:
        self.place, self.reads = _place(frame), reads
        super().__init__(
            f"torch.fx cannot trace {model}: {frame.filename}:{frame.lineno}, in {frame.name}: "
            f'"{frame.line}": {reason}'
        )


@dataclass(frozen=True)
class Symbolic:
    """What torch.fx made of a model.

    Attributes:
        graph: of `traced`, a copy of the model that shares its tensors.
        opaque: submodules that count as one call each, since they could not be followed: path to
            the place in the code that stopped it ("vgg.py:84").
        reads: what the model's own code read of its modules.
    """

    graph: fx.Graph
    traced: nn.Module
    opaque: dict[str, str]
    reads: Reads


def defaults(model: nn.Module) -> dict[str, Any]:
    """List the arguments of forward that keep their default when a model is traced.

    All that have one, but not the only input, as in `forward(self, x=None)`.
    """
    signature = inspect.signature(model.forward).parameters.values()
    named = [p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = {p.name: p.default for p in named if p.default is not p.empty}
    if found and len(found) == len(named):
        del found[next(iter(found))]
    return found


def variadic(model: nn.Module) -> list[str]:
    """List `*args` and `**kwargs` of forward, as they are written, and in a graph."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    signature = inspect.signature(model.forward).parameters.values()
    return [f"{stars[p.kind]}{p.name}" for p in signature if p.kind in stars]


def symbolic(
    model: nn.Module,
    *,
    training: bool = False,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
) -> Symbolic:
    """Trace `model` in the given mode; arguments of forward that have a default keep it.

    `fixed` gives values of arguments instead; those that it does not name are inputs. The seed is
    for what forward draws while it is traced; the generators are afterwards as they were. A
    submodule that torch.fx cannot follow becomes opaque, and the rest is traced around it.

    Raises UntraceableError when it cannot follow the model itself, with the line that stopped it.
    """
    traced = shared_copy(model)  # forward may keep what it sees, and now sees proxies
    for module in traced.modules():  # without hooks, which may keep it too
        module.training = training
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    opaque: dict[str, str] = {}
    with seeded(seed):
        while True:
            reads = Reads(traced, watched_layers(traced))
            tracer = _Tracer(traced, opaque, reads)
            try:
                with reads.noted(), _Uses(reads), warnings.catch_warnings():
                    # That a graph asserts no default of this type; it is not run.
                    warnings.filterwarnings("ignore", "Was not able to add assertion")
                    values = defaults(model) if fixed is None else dict(fixed)
                    graph = tracer.trace(traced, concrete_args=values)
                _note_uses(reads, graph, traced)
                return Symbolic(graph, traced, opaque, reads)
            except Exception as error:
                stopped_in = traced.get_submodule(tracer.stopped_in or "")
                frame, reason = _culprit(error, stopped_in)
                if tracer.stopped_in is not None and tracer.stopped_in not in opaque:
                    opaque[tracer.stopped_in] = _place(frame)
                    continue
                raise UntraceableError(type(model).__name__, frame, reason, reads) from error


def trace_whole(model: nn.Module, *, training: bool = False) -> Trace:
    """Trace `model` as one, in eval mode by default; what torch.fx cannot follow is opaque."""
    try:
        found = symbolic(model, training=training)
    except UntraceableError as error:
        reads = error.reads
        return Trace((), "symbolic", {"": error.place}, reads=reads.frozen(), asks_mode=reads.mode)
    return Trace(
        tuple(calls_of(found.traced, found.graph, found.opaque, original=model).values()),
        "symbolic",
        opaque=found.opaque,
        reads=found.reads.frozen(),
        asks_mode=found.reads.mode,
        changed=frozenset(found.reads.changed),
    )


def trace_pieces(model: nn.Module, whole: Trace, *, training: bool = False) -> Trace:
    """Add to the trace of `model` what is inside of its opaque modules, read piecewise.

    The largest modules inside that torch.fx can follow are traced each on their own; what goes out
    of them goes somewhere "unknown".
    """
    found = whole
    for path in whole.opaque:
        for name, child in model.get_submodule(path).named_children():
            if not is_leaf(child):
                piece = trace_whole(child, training=training)
                piece = trace_pieces(child, piece, training=training)
                found = _joined(found, f"{path}.{name}".lstrip("."), piece)
    return found


def _joined(whole: Trace, prefix: str, piece: Trace) -> Trace:
    """Add the trace of the module at `prefix`, made of it alone, to that of the model."""

    def below(path: str) -> str:
        return f"{prefix}.{path}".rstrip(".")

    def moved(call: Call) -> Call:
        name = "unknown" if call.name in ("input", "output") else call.name
        inside = (prefix, *map(below, call.inside))
        return replace(call, name=name, path=below(call.path), inside=inside)

    return replace(
        whole,
        calls=whole.calls + rebuilt(piece.calls, moved),
        opaque={**whole.opaque, **{below(path): place for path, place in piece.opaque.items()}},
        reads=united(whole.reads, {below(path): names for path, names in piece.reads.items()}),
        asks_mode=whole.asks_mode or piece.asks_mode,
        changed=whole.changed | frozenset(map(below, piece.changed)),
    )


class _Uses(TorchFunctionMode):
    """Notes the tensors that functions take while a model is traced, without being in the graph."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.reads.muted:
            return func(*args, **kwargs)
        name = function_name(called_name(func), args)
        fx.node.map_aggregate(with_values(name, args, kwargs), self.reads.note_use)
        return func(*args, **kwargs)


def _note_uses(reads: Reads, graph: fx.Graph, traced: nn.Module) -> None:
    """Note the tensors that the graph computes with."""
    for node in graph.nodes:
        for used in _nodes_in(with_values(operation_name(node), node.args, node.kwargs)):
            if used.op == "get_attr":
                owner, _, name = str(used.target).rpartition(".")
                reads.note_use(getattr(traced.get_submodule(owner), name, None))


class _Tracer(fx.Tracer):
    """Takes layers as single calls, and notes where the tracing stopped.

    Attributes:
        stopped_in: path of the innermost submodule that raised; None if the model itself did.
    """

    def __init__(self, model: nn.Module, opaque: Collection[str], reads: Reads) -> None:
        super().__init__()
        self.opaque, self.reads = opaque, reads
        self.inside = set(model.modules())
        self.stopped_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or module_qualified_name in self.opaque

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if m not in self.inside:  # of a list of the model's, or of another thread
            return forward(*args, **kwargs)
        self.reads.note_call(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)
            raise


def calls_of(
    model: nn.Module,
    graph: fx.Graph,
    opaque: Collection[str] = (),
    original: nn.Module | None = None,
) -> dict[fx.Node, Call]:
    """Make the neutral record of a graph: a call for each node, in order.

    Args:
        model: what the graph is of; `original`, if that is a copy, whose modules the calls name.
        graph: its nodes.
        opaque: modules that count as one call each.
        original: see `model`.
    """
    names = {node: operation_name(node) for node in graph.nodes}
    read = {n: _nodes_in(with_values(name, n.args, n.kwargs)) for n, name in names.items()}
    constants = _constants(names, read)
    calls: dict[fx.Node, Call] = {}
    for node in reversed(graph.nodes):  # users first
        users = tuple(calls[user] for user in node.users if node in read[user])
        name = names[node]
        multiplied = factors(name, node.args, node.kwargs) if name in PRODUCTS else ()
        weighted = not constants.isdisjoint(_nodes_in(multiplied))
        if name in SUMS and node.args and names.get(node.args[0]) in SCALINGS:
            weights = (weight_shape(model, n) for n in _nodes_in(node.args[0].args) & constants)
            weighted = any(w and drops_weights(w, None, node.args, node.kwargs) for w in weights)
        call = _call(model, node, name, opaque)
        if original is not None and call.module is not None:
            call = replace(call, module=original.get_submodule(call.path))
        calls[node] = replace(call, users=users, weighted=weighted)
    return dict(reversed(calls.items()))


def _constants(names: Mapping[fx.Node, str], read: Mapping[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """List the nodes that give parameters and buffers, or what is made of these alone."""
    found: set[fx.Node] = set()
    sizes: set[fx.Node] = set()
    for node, name in names.items():
        every = node.all_input_nodes
        if name in SHAPE_READERS or (every and sizes.issuperset(every)):
            sizes.add(node)
            continue
        inputs = read[node] - sizes
        if node.op == "get_attr" or (inputs and node.op != "output" and found >= inputs):
            found.add(node)
    return found


def operation_name(node: fx.Node) -> str:
    """Name the operation of a function or method; empty for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target = node.target if node.op == "call_method" else node.target.__name__  # type: ignore[union-attr]
    if target == "getattr" and isinstance(node.args[1], str):  # x.shape, x.T
        target = node.args[1]
    return function_name(str(target), node.args)


def _nodes_in(arguments: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    fx.node.map_arg(arguments, found.add)
    return found


def _call(model: nn.Module, node: fx.Node, operation: str, opaque: Collection[str]) -> Call:
    # Keys of the stack may repeat a path as "name@1"; the values hold the path itself.
    stack = node.meta.get("nn_module_stack", {})
    inside = tuple(path for path, _ in stack.values())
    where = inside[-1] if inside else ""
    if node.op == "call_module":
        path = str(node.target)
        module = model.get_submodule(path)
        name = "unknown" if path in opaque else module_name(module)
        return Call(name, path, module, inside, alone=is_alone(node.args, node.kwargs))
    if operation:
        return Call(
            operation,
            where,
            None,
            inside,
            keepdim=keeps_dim(node.args, node.kwargs),
            channels=_channels(model, node, operation) if operation in AFFINE_FUNCTIONS else 0,
            arguments=_arguments_text(node),
        )
    names = {"placeholder": "input", "get_attr": "attribute"}
    arguments = _arguments_text(node) if node.op == "output" else _constant_text(model, node)
    return Call(names.get(node.op, node.op), "", None, inside, arguments=arguments)


def is_made_by_forward(target: object) -> bool:
    """Tell whether a node refers to a tensor that forward made, for which torch.fx has a name."""
    return str(target).rpartition(".")[2].startswith("_tensor_constant")


def _constant_text(model: nn.Module, node: fx.Node) -> str:
    """Describe a tensor that forward made of other things than its inputs, by shape and sum."""
    if node.op != "get_attr" or not is_made_by_forward(node.target):
        return ""
    value = getattr(model, str(node.target), None)
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{tuple(value.shape)} {value.detach().to(torch.complex128).sum().item()}"


def _arguments_text(node: fx.Node) -> str:
    written = fx.node.map_arg((node.args, node.kwargs), lambda _: "_")
    return re.sub(r" at 0x[0-9a-f]+", "", repr(written))


def _channels(model: nn.Module, node: fx.Node, name: str) -> int:
    """Count the output channels of a function whose weight is a parameter, else 0."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return 0
    owner, _, own = str(weight.target).rpartition(".")
    tensor = getattr(model.get_submodule(owner), own, None)
    if tensor is None:  # a constant that forward made
        return 0
    shape = tensor.shape
    if "transpose" not in name:
        return int(shape[0])
    aten = len(node.args) > 8  # where all arguments are given, as of aten.convolution
    place = 8 if aten else 6
    groups = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
    return int(shape[1]) * groups if isinstance(groups, int) else 0


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _culprit(error: Exception, module: nn.Module) -> tuple[traceback.FrameSummary, str]:
    """Find the line of the model's own code that stopped the tracing, and why.

    It is that of the forward of `module`, which could not be followed, where no other was reached.
    """
    libraries = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/")
    # Not extract_tb: it wants the columns, which fx's patched code of torch 2.6 does not have.
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if not own and code is not None:
        own = [traceback.FrameSummary(code.co_filename, code.co_firstlineno, code.co_name)]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return (own or list(frames))[-1], reason
