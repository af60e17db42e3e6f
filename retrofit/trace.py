"""The calls a model makes, in order, and which feeds which: read with torch.fx, without data."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from retrofit.copies import shared_copy
from retrofit.errors import RetrofitError
from retrofit.layers import function_name, is_conv, is_norm, module_name
from retrofit.modes import evaluating


@dataclass(eq=False)
class Call:
    """One operation of the forward pass.

    Attributes:
        name: the operation as `retrofit.layers` names it; "input", "output" and "attribute" too.
        path: module path of the called module; of the calling module for a function.
        module: the called module, None for a function.
        inside: paths of the modules whose forward makes this call, outermost first.
        arguments: how many it is called with.
        keepdim: the function's keepdim argument.
        users: the calls this one feeds, in order.
    """

    name: str
    path: str
    module: nn.Module | None = None
    inside: tuple[str, ...] = ()
    arguments: int = 1
    keepdim: bool = False
    users: list[Call] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Trace:
    """What the forward pass does.

    Attributes:
        calls: all calls, in order.
        opaque: submodules that could not be followed and count as one call each: path to the
            place in the code that stopped it ("vgg.py:84").
        reads: what the model's own code reads of its convolutions that a Sequential in their
            place would lack: path to attribute names.
    """

    calls: list[Call]
    opaque: dict[str, str]
    reads: dict[str, set[str]]


def trace(model: nn.Module) -> Trace:
    """Trace `model` in eval mode; arguments of forward that have a default keep it.

    Raises RetrofitError when torch.fx cannot follow the model, with the line that stopped it.
    A submodule that it cannot follow becomes opaque, and the rest is traced around it.
    """
    signature = inspect.signature(model.forward).parameters
    defaults = {
        name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty
    }
    traced = shared_copy(model)  # forward may keep what it sees, and now sees proxies;
    for module in traced.modules():  # so may hooks
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    paths = {id(module): path for path, module in traced.named_modules() if is_conv(module)}
    opaque: dict[str, str] = {}
    with evaluating(traced):
        while True:
            tracer = _Tracer(opaque)
            try:
                with _attribute_reads(paths) as reads:
                    graph = tracer.trace(traced, concrete_args=defaults)
                return Trace(_calls(model, graph), opaque, reads)
            except Exception as error:
                frame, reason = _culprit(error)
                if tracer.stopped_in is not None and tracer.stopped_in not in opaque:
                    opaque[tracer.stopped_in] = f"{Path(frame.filename).name}:{frame.lineno}"
                    continue
                raise RetrofitError(
                    f"torch.fx cannot trace {type(model).__name__}: {frame.filename}:"
                    f'{frame.lineno}, in {frame.name}: "{frame.line}": {reason}'
                ) from error


class _Tracer(fx.Tracer):
    """Convolutions and norms stay whole, subclasses too: else a weight-standardised convolution,
    say, dissolves into functions.

    Attributes:
        stopped_in: path of the innermost submodule that raised; None if the model itself did.
    """

    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.stopped_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_conv(m) or is_norm(m) or module_qualified_name in self.opaque:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)
            raise


def _calls(model: nn.Module, graph: fx.Graph) -> list[Call]:
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        # Keys of the stack may repeat a path as "name@1"; the values hold the path itself.
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
        inside = tuple(path for path, _ in stack.values())
        if node.op == "call_module":
            module = model.get_submodule(node.target)
            arguments = len(node.args) + len(node.kwargs)
            call = Call(module_name(module), node.target, module, inside, arguments)
        elif node.op in ("call_function", "call_method"):
            target = node.target if isinstance(node.target, str) else node.target.__name__
            keepdim = bool(node.kwargs.get("keepdim", False))
            where = inside[-1] if inside else ""
            call = Call(function_name(target), where, None, inside, keepdim=keepdim)
        else:
            names = {"placeholder": "input", "get_attr": "attribute"}
            call = Call(names.get(node.op, node.op), "", None, inside)
        calls[node] = call
    for node, call in calls.items():
        call.users = [calls[user] for user in node.users]
    return list(calls.values())


@contextmanager
def _attribute_reads(paths: dict[int, str]) -> Iterator[dict[str, set[str]]]:
    """Record what is read of these convolutions that an nn.Sequential in their place would lack."""
    kept = set(dir(nn.Sequential()))
    reads: dict[str, set[str]] = {}

    def spy(self: _ConvNd, name: str) -> Any:
        if name not in kept and id(self) in paths:
            reads.setdefault(paths[id(self)], set()).add(name)
        return object.__getattribute__(self, name)

    _ConvNd.__getattribute__ = spy  # type: ignore[assignment]
    try:
        yield reads
    finally:
        del _ConvNd.__getattribute__


def _culprit(error: Exception) -> tuple[traceback.FrameSummary, str]:
    """The line of the model's own code that stopped the tracing, and why."""
    libraries = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return (own or list(frames))[-1], reason
