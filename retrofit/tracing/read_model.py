"""Read what a model does: traced with torch.fx, or run on an example."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import fx, nn

from retrofit.errors import RetrofitError
from retrofit.running.call_arguments import ForwardFn, arguments_of
from retrofit.tracing.calls import Call, Trace, Way, rebuilt
from retrofit.tracing.example_run import watch
from retrofit.tracing.operations import is_leaf
from retrofit.tracing.symbolic import (
    defaults,
    trace_pieces,
    trace_whole,
)


def read(
    model: nn.Module,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    *,
    way: Way | None = None,
) -> Trace:
    """Read the calls that `model` makes in eval mode; it is not changed.

    torch.fx sees what every input would do, so it is asked first. Where it can follow the whole
    model as the example calls it, the run on the example adds the shapes; where it cannot, that run
    is all there is; without an example, what torch.fx can follow is.

    Args:
        model: any module.
        example: one batch, as for `calibrate`.
        forward_fn: `forward_fn(model, example)`, for any other way of calling it.
        way: read it so, and not otherwise: as another version of the model was read.

    Raises:
        RetrofitError: it does not run on the example.
    """
    if way == "run":
        return watch(model, example, forward_fn)
    if way == "symbolic" or example is None:
        return trace_pieces(model, trace_whole(model))
    if forward_fn is None and not arguments_of(model, example).kwargs.keys() & defaults(model):
        traced = trace_whole(model)
        if traced.static:
            run = watch(model, example)
            # They differ where code asks for types: isinstance(x, Tensor) is False in torch.fx.
            return _with_shapes(traced, run) if traced.modules_called == run.modules_called else run
    return watch(model, example, forward_fn)


def read_graph(
    module: nn.Module, calls: Sequence[Call], example: Any, forward_fn: ForwardFn | None
) -> Trace:
    """Make the trace of a model's graph, with the shapes of a run of the model on the example.

    Raises RetrofitError when the run calls other modules than the graph.
    """
    traced = Trace(tuple(calls), "symbolic")
    if example is None:
        return traced
    run = watch(module, example, forward_fn)
    if _layers_called(traced) != _layers_called(run):
        raise RetrofitError(
            f"torch.fx sees other calls in {type(module).__name__} than a run on the example "
            "makes (its code may ask for types): use the native layout"
        )
    return _with_shapes(traced, run, flat=isinstance(module, fx.GraphModule))


def _layers_called(trace: Trace) -> list[str]:
    """Paths of the layers called, without what a graph calls beside them (an export's guards)."""
    return [call.path for call in trace.calls if call.module is not None and is_leaf(call.module)]


def read_in_training(
    model: nn.Module,
    trace: Trace,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    *,
    way: Way | None = None,
) -> Trace | None:
    """Read the calls that `model` makes in train mode, where they may differ from those in `trace`.

    None where the code never asks for the mode, and where the model does not run in train mode (a
    detector without targets). `way` is as for `read`.
    """
    if not trace.asks_mode and not trace.opaque:
        return None
    with suppress(RetrofitError):
        if (way or trace.way) == "symbolic":
            found = trace_whole(model, training=True)
            if way or example is None or "" not in found.opaque:
                return trace_pieces(model, found, training=True)
        return watch(model, example, forward_fn, training=True)
    return None


def _with_shapes(traced: Trace, run: Trace, *, flat: bool = False) -> Trace:
    """Add to the traced calls what the run knows of their results.

    `flat`: the run was one of a graph, which itself calls the functions of all modules.
    """
    known: dict[tuple[str, str], list[Call]] = {}
    for call in run.calls:
        known.setdefault((call.path, call.name), []).append(call)
    seen: dict[Call, Call] = {}
    for call in traced.calls:
        caller = "" if flat and call.module is None else call.path
        if same := known.get((caller, call.name)):
            seen[call] = same.pop(0)

    def shaped(call: Call) -> Call:
        if call not in seen:
            return call
        return replace(
            call,
            shape=seen[call].shape,
            channels=call.channels or seen[call].channels,
            weighted=call.weighted or seen[call].weighted,
        )

    return replace(traced, calls=rebuilt(traced.calls, shaped))
