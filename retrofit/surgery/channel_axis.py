"""Whether the channels of a layer reach a BatchNorm on the axis that it normalises.

A Linear layer gives them on its last axis and a BatchNorm takes them on the second: which that is
depends on the rank, and on the views between. So the layer is made to give the number of each
channel, and the BatchNorm has to get it: along the graph, or in a run on an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from retrofit.running.call_arguments import ForwardFn, call_model
from retrofit.running.modes import evaluating
from retrofit.running.random_numbers import seeded
from retrofit.running.shared_copy import shared_copy
from retrofit.tracing.operations import (
    ACTIVATIONS,
    OUTPUT_ACTIVATIONS,
    SHAPED_LIKE,
    channels,
    dims,
    is_activation,
    is_conv,
    is_linear,
    is_norm,
    keeps_dim,
    module_name,
)
from retrofit.tracing.symbolic import operation_name

RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
SIZES = (2, 3, 5, 7)  # of the other axes, where any will do
ELEMENTWISE = ACTIVATIONS | OUTPUT_ACTIVATIONS | {"dropout", "identity", "contiguous", "clone"}


def _numbers(layer: nn.Module) -> Tensor:
    """Make a number for each channel, of both signs."""
    numbers = torch.arange(1, channels(layer) + 1, device="cpu")
    return torch.where(numbers % 2 == 0, numbers, -numbers)


def _has_channels_second(x: Tensor, numbers: Tensor) -> bool:
    if x.dim() < 2 or x.shape[1] != len(numbers):
        return False
    return bool((x == numbers.to(x).view(-1, *[1] * (x.dim() - 2))).all())


def _along(numbers: Tensor, like: Tensor, layer: nn.Module) -> Tensor:
    """Fill a tensor in the shape of the layer's output with the numbers of its channels."""
    return numbers.to(like).view(-1, *[1] * dims(layer)).expand_as(like).clone()


# --- in a run ----------------------------------------------------------------------------------


def kept_in_run(
    model: nn.Module, example: Any, pairs: Mapping[str, str], forward_fn: ForwardFn | None = None
) -> set[str] | None:
    """Run a copy of `model` on the example, and tell which BatchNorms get their layer's channels.

    Args:
        model: not changed.
        example: one batch.
        pairs: paths of BatchNorms to those of their layers.
        forward_fn: `forward_fn(model, example)`, for any other way of calling it.

    Returns:
        Paths of the BatchNorms that do in every call; None if the model does not run like that.
    """
    copied = shared_copy(model)
    seen: dict[str, list[bool]] = {norm: [] for norm in pairs}
    for norm, layer in pairs.items():
        _connect(copied.get_submodule(norm), copied.get_submodule(layer), seen[norm])
    with seeded(), torch.no_grad(), evaluating(copied):
        try:
            call_model(copied, example, forward_fn)
        except Exception:  # noqa: BLE001 - numbers of channels are not what it was made for
            return None
    return {norm for norm, found in seen.items() if found and all(found)}


def _connect(norm: nn.Module, layer: nn.Module, seen: list[bool]) -> None:
    """Let `layer` give numbers, and `norm` note in `seen` whether it gets them."""
    numbers = _numbers(layer)
    layer.register_forward_hook(lambda _, __, given: _along(numbers, given, layer))
    norm.register_forward_pre_hook(
        lambda _, inputs: seen.append(_has_channels_second(inputs[0], numbers))
    )


# --- along the graph ---------------------------------------------------------------------------


def kept_in_graph(root: nn.Module, call: fx.Node, norm_call: fx.Node, rank: int | None) -> bool:
    """Tell whether the channels that `call` gives are on the second axis of what `norm_call` takes.

    Whatever its rank may be, if it is not known; False also where the views between take sizes that
    only a run tells.

    Args:
        root: what the graph is of.
        call: of a convolution or Linear layer.
        norm_call: of the BatchNorm that follows, after nothing but views.
        rank: of what the layer gives.
    """
    layer = root.get_submodule(str(call.target))
    norm = root.get_submodule(str(norm_call.target))
    allowed = next((r for kind, r in RANKS.items() if isinstance(norm, kind)), (2, 3, 4, 5))
    numbers, found = _numbers(layer), []
    for tried in (2, 3, 4, 5) if rank is None else (rank,):
        sizes = SIZES[: tried - dims(layer) - 1]
        shape = (*sizes, channels(layer), *SIZES[len(sizes) :][: dims(layer)])
        like = torch.zeros(shape, device="cpu")
        given = _arriving(norm_call, root, {call: _along(numbers, like, layer)})
        if given is not None and given.dim() in allowed:
            found.append(_has_channels_second(given, numbers))
    return bool(found) and all(found)


def _arriving(norm_call: fx.Node, root: nn.Module, known: dict[fx.Node, Any]) -> Tensor | None:
    """Compute what the BatchNorm gets; None if views take no such rank, or sizes of the input."""
    try:
        given = _value(norm_call.all_input_nodes[0], root, known)
    except Exception:  # noqa: BLE001 - whatever they raise
        return None
    return given if isinstance(given, Tensor) else None


def _value(node: fx.Node, root: nn.Module, known: dict[fx.Node, Any]) -> Any:
    """Compute what a node gives from the nodes in `known` alone."""
    if node not in known:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda argument: _value(argument, root, known)
        )
        if node.op == "call_function":
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_module":
            known[node] = root.get_submodule(str(node.target))(*args, **kwargs)
        else:
            raise ValueError(node.op)
    return known[node]


# --- the rank of what Linear layers give, as far as the graph tells ------------------------------


def ranks_in(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, int | None]:
    """Count the axes of what each node gives; None where the graph does not tell."""
    ranks: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        inputs = [ranks[n] for n in node.all_input_nodes]
        if node.op == "call_module" and len(inputs) == 1:
            ranks[node] = _rank_of_module(root.get_submodule(str(node.target)), inputs[0])
        elif node.op in ("call_function", "call_method") and inputs:
            ranks[node] = _rank_of_function(node, inputs)
        else:
            ranks[node] = None
    return ranks


def _rank_of_module(module: nn.Module, rank: int | None) -> int | None:
    if is_conv(module):
        return dims(module) + 2
    if isinstance(module, nn.Flatten) and module.end_dim == -1 and module.start_dim >= 0:
        return module.start_dim + 1
    same = is_linear(module) or _keeps_axes(module) or "pool" in module_name(module)
    return rank if same else None


def _rank_of_function(node: fx.Node, inputs: list[int | None]) -> int | None:
    """Count the axes of what a function gives, from those of its inputs."""
    name = operation_name(node)
    given = node.args[1:]
    if name in ("view", "reshape"):
        if len(given) == 1 and isinstance(given[0], (tuple, list)):
            return len(given[0])
        return len(given) if len(given) > 1 else None
    if name == "flatten":
        start = given[0] if given else node.kwargs.get("start_dim", 0)
        end = given[1] if len(given) > 1 else node.kwargs.get("end_dim", -1)
        return start + 1 if isinstance(start, int) and start >= 0 and end == -1 else None
    if name in SHAPED_LIKE:
        return inputs[-1]
    if name in ("add", "iadd", "sub", "mul"):
        return None if None in inputs else max(rank for rank in inputs if rank is not None)
    rank = inputs[0]
    if name in ("transpose", "permute", "movedim") or name in ELEMENTWISE:
        return rank
    if name == "mean" and rank is not None:
        axes = node.kwargs.get("dim", given[0] if given else ())
        count = len(axes) if isinstance(axes, (tuple, list)) else 1
        return rank if keeps_dim(node.args, node.kwargs) else rank - count if count else None
    return None


def _keeps_axes(module: nn.Module) -> bool:
    return is_norm(module) or is_activation(module) or isinstance(module, (nn.Identity, nn.Dropout))


def of_two_axes(root: nn.Module, calls: Mapping[fx.Node, int]) -> set[fx.Node]:
    """List the calls of Linear layers that can have no other input than (N, F).

    A BatchNorm1d of T channels right after each, which `calls` maps it to, would take (N, T, F) as
    well. But where one input goes through several of these, of different T, no such input fits.
    """
    by_origin: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        origin = call
        while origin.op == "call_module" and len(origin.all_input_nodes) == 1:
            module = root.get_submodule(str(origin.target))
            if not (is_linear(module) or _keeps_axes(module)):
                break
            origin = origin.all_input_nodes[0]
        by_origin.setdefault(origin, []).append(call)
    found: set[fx.Node] = set()
    for made in by_origin.values():
        found |= set(made) if len({calls[call] for call in made}) > 1 else set()
    return found
