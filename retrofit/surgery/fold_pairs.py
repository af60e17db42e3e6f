"""Which layer each BatchNorm alone follows; why the others follow none that could absorb them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from retrofit.errors import RetrofitError
from retrofit.running.call_arguments import ForwardFn, arguments_of
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.affine_map import UnfoldableError, batchnorms, refuse_hooks
from retrofit.surgery.channel_axis import kept_in_graph, kept_in_run, of_two_axes, ranks_in
from retrofit.tracing.branches import branches
from retrofit.tracing.calls import Call, Trace
from retrofit.tracing.operations import (
    AFFINE_FUNCTIONS,
    SHAPE_READERS,
    VIEWS,
    dims,
    is_affine,
    is_linear,
)
from retrofit.tracing.read_model import read
from retrofit.tracing.same_calls import do_the_same
from retrofit.tracing.symbolic import (
    Symbolic,
    UntraceableError,
    calls_of,
    defaults,
    symbolic,
    variadic,
)

# The same numbers in another shape. (Others of VIEWS change the precision, or mix the channels.)
MIXING = {"expand", "flip", "pixelshuffle", "pixelunshuffle", "roll"}
CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "typeas"}
BETWEEN = (VIEWS - CASTS - MIXING) | {"getitem"}
TENSORS = {"bias", "parametrizations", "weight", "weight_g", "weight_v"}
NO_CALL = "no call of it is seen in eval mode"


class Pair(NamedTuple):
    """A BatchNorm and the layer that it alone follows.

    Attributes:
        layer, norm: paths.
        between: the views from one to the other, as they are written, in each call.
        calls: each call of the layer, and that of the BatchNorm which takes what it gives.
    """

    layer: str
    norm: str
    between: tuple[tuple[str, ...], ...]
    calls: tuple[tuple[Call, Call], ...]


@dataclass(frozen=True)
class Pairs:
    """All BatchNorms of a model: those that follow a layer, and the others.

    Attributes:
        pairs: by path of the BatchNorm.
        left: the others: path to reason.
        unknown: arguments of forward that decide what is called, in ways not all of which could be
            followed.
    """

    pairs: dict[str, Pair]
    left: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def without(self, reasons: Mapping[str, str]) -> Pairs:
        """Leave out pairs, for these reasons."""
        kept = {norm: pair for norm, pair in self.pairs.items() if norm not in reasons}
        return Pairs(kept, {**self.left, **reasons}, self.unknown)


class _Reading(NamedTuple):
    """What a model does in eval mode.

    Attributes:
        trace: its calls.
        special: the example gives another value for an argument that has a default.
        symbolic, nodes: where no example was given.
        example, forward_fn: what the model was called with, and how.
    """

    trace: Trace
    special: bool = False
    symbolic: Symbolic | None = None
    nodes: Mapping[Call, fx.Node] = MappingProxyType({})
    example: Any = None
    forward_fn: ForwardFn | None = None


def find_pairs(model: nn.Module, example: Any = None, forward_fn: ForwardFn | None = None) -> Pairs:
    """Find for each BatchNorm of `model` the layer that it alone follows; nothing is changed.

    Args:
        model: any module with BatchNorms.
        example: one batch; the calls are then read off a run where torch.fx cannot follow.
        forward_fn: `forward_fn(model, example)`, for any other way of calling it.

    Raises:
        RetrofitError: without an example, torch.fx cannot trace the model; with one, it does not
            run.
    """
    norms = batchnorms(model)
    if "" in norms:
        return Pairs({}, {"": "there is no layer before it: fold the model that it is a part of"})
    reading = _read(model, example, forward_fn)
    in_graph = isinstance(model, fx.GraphModule)
    found = _followed(reading.trace.calls, norms, in_graph=in_graph)
    found = found.without(_hidden(model, found, reading.trace.opaque))
    found = found.without(_read_by_code(found, reading.trace.reads))
    found = found.without(_changed_by_code(found, reading.trace.changed))
    found = found.without(_hooked(model, found))
    found = found.without(_on_another_axis(model, found, reading))
    found = found.without(_missed(model, found, reading))
    return _in_every_branch(model, found, reading)


def _read(model: nn.Module, example: Any, forward_fn: ForwardFn | None) -> _Reading:
    if example is not None:
        trace = read(model, example, forward_fn)
        usual = forward_fn is not None or not (
            arguments_of(model, example).kwargs.keys() & defaults(model).keys()
        )
        return _Reading(trace, not usual, example=example, forward_fn=forward_fn)
    try:
        found = symbolic(model)
    except UntraceableError as error:
        raise RetrofitError(
            f"torch.fx cannot trace this {type(model).__name__} ({error.place}), so that nobody "
            "knows which layer a BatchNorm follows: pass example (--data)"
        ) from error
    nodes = {call: node for node, call in calls_of(model, found.graph, found.opaque).items()}
    trace = Trace(
        tuple(nodes),
        "symbolic",
        found.opaque,
        found.reads.frozen(),
        changed=frozenset(found.reads.changed),
    )
    return _Reading(trace, symbolic=found, nodes=nodes)


# --- what feeds what ---------------------------------------------------------------------------


def _followed(calls: Iterable[Call], norms: Collection[str], *, in_graph: bool = False) -> Pairs:
    """Pair BatchNorms and layers by the calls of a forward pass, perhaps of a GraphModule."""
    calls = list(calls)
    made: dict[str, list[Call]] = {}
    for call in calls:
        if _is_seen(call):
            made.setdefault(call.path, []).append(call)
    sources: dict[Call, tuple[Call, tuple[str, ...]]] = {}
    for call in calls:
        if _is_seen(call) and call.module is not None and is_affine(call.module):
            reader, views = _only_reader(call)
            if reader is not None and _is_seen(reader) and reader.path in norms and reader.alone:
                sources[reader] = call, views
    feeders = _feeders(calls)
    pairs: dict[str, Pair] = {}
    left: dict[str, str] = {}
    for norm in norms:
        own = made.get(norm, [])
        found = [sources[call] for call in own if call in sources]
        layers = {call.path for call, _ in found}
        between = tuple(passed for _, passed in found)
        if not own:
            left[norm] = NO_CALL
        elif len(found) < len(own):
            unpaired = next(call for call in own if call not in sources)
            left[norm] = _reason(unpaired, feeders, norms, in_graph=in_graph)
        elif len(layers) > 1:
            left[norm] = "it is called after several layers"
        elif len(made[layer := next(iter(layers))]) > len(own):
            left[norm] = "its layer is called elsewhere too"
        else:
            both = zip((call for call, _ in found), own, strict=True)
            pairs[norm] = Pair(layer, norm, between, tuple(both))
    return Pairs(pairs, left)


def _feeders(calls: Iterable[Call]) -> dict[Call, list[Call]]:
    """List for each call those whose numbers it takes: no sizes, nor what is computed of them."""
    every: dict[Call, list[Call]] = {}
    feeders: dict[Call, list[Call]] = {}
    for call in calls:
        found, told = feeders.get(call, []), every.get(call, [])
        made_of_sizes = call.module is None and told and not found
        is_size = call.name in SHAPE_READERS or made_of_sizes
        for user in call.users:
            every.setdefault(user, []).append(call)
            if not is_size:
                feeders.setdefault(user, []).append(call)
    return feeders


def _is_seen(call: Call) -> bool:
    """Tell whether this is the call of a module that was followed."""
    return call.module is not None and call.name != "unknown"


def _only_reader(call: Call) -> tuple[Call | None, tuple[str, ...]]:
    """Find the one call that takes the numbers `call` gives, and the views on the way there."""
    between: list[str] = []
    while True:
        if len(call.users) != 1:
            return None, ()
        (call,) = call.users
        if not _is_view(call):
            return call, tuple(between)
        between.append(f"{call.name} {call.path} {call.arguments}")


def _is_view(call: Call) -> bool:
    if call.module is None:  # F.dropout may drop in eval mode, too
        return call.name in BETWEEN and "dropout" not in call.name
    hooked = call.module._forward_hooks or call.module._forward_pre_hooks
    return call.name in BETWEEN and not hooked


def _reason(
    call: Call, feeders: Mapping[Call, list[Call]], norms: Collection[str], *, in_graph: bool
) -> str:
    """Say why a call of a BatchNorm is not paired."""
    if not call.alone:
        return "it is called with more than its one input"
    while before := feeders.get(call):
        call = before[0]
        if not _is_view(call):
            break
    if call.name == "input":
        return "it follows the model's input, no convolution or Linear layer"
    if call.name in AFFINE_FUNCTIONS and call.module is None:
        where = "whose weight can change in a torch.fx.GraphModule only"
        if in_graph:
            where = "which can absorb only one that is called once, right after it, and alone"
        return f"it follows a function ({call.name}), {where}"
    if call.name == "unknown" or call.module is None or not is_affine(call.module):
        name = type(call.module).__name__ if call.module is not None else call.name
        return f"it follows {name}, no convolution or Linear layer"
    if all(user.path in norms and user.module is not None for user in call.users):
        return "its layer feeds several BatchNorms, and has one weight"
    return "what its layer gives is used elsewhere too"


# --- what a trace does not say -----------------------------------------------------------------


def _hidden(model: nn.Module, found: Pairs, opaque: Mapping[str, str]) -> dict[str, str]:
    """Give the reasons of BatchNorms that, or whose layers, may be called where nobody sees it."""
    places = {
        m: place for path, place in opaque.items() for m in model.get_submodule(path).modules()
    }
    scripts = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    scripted = {module for script in scripts for module in script.modules()}
    reasons: dict[str, str] = {}
    for norm in (*found.pairs, *found.left):
        paths = (norm, found.pairs[norm].layer) if norm in found.pairs else (norm,)
        for module in map(model.get_submodule, paths):
            if module in places:
                reasons[norm] = (
                    f"it is inside a module that torch.fx cannot follow ({places[module]}): pass "
                    "example"
                )
            elif module in scripted:
                reasons[norm] = "it is inside TorchScript, which cannot be changed"
    return reasons


def _read_by_code(found: Pairs, reads: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Give the reasons of pairs whose tensors the model's own code reads."""
    reasons: dict[str, str] = {}
    for norm, pair in found.pairs.items():
        # None but tensors change in the layer; of the BatchNorm nothing stays.
        of_layer = reads.get(pair.layer, frozenset()) & TENSORS
        names = sorted({*reads.get(norm, ()), *of_layer})
        if names:
            reasons[norm] = f"the model's own code reads {names[0]} of it or of its layer"
    return reasons


def _changed_by_code(found: Pairs, changed: Collection[str]) -> dict[str, str]:
    """Give the reasons of pairs that the model's own code changes before it calls them."""
    reason = "the model's own code changes it or its layer before it calls them"
    return {
        norm: reason
        for norm, pair in found.pairs.items()
        if not {norm, pair.layer}.isdisjoint(changed)
    }


def _hooked(model: nn.Module, found: Pairs) -> dict[str, str]:
    """Give the reasons of pairs with hooks that no trace shows: on the way, or the BatchNorm's."""
    reasons: dict[str, str] = {}
    for norm, pair in found.pairs.items():
        try:
            refuse_hooks(model.get_submodule(norm))
        except UnfoldableError as error:
            reasons[norm] = error.after("its layer")
        for call, norm_call in pair.calls:
            left, entered = {*call.inside} - {call.path}, {*norm_call.inside} - {norm_call.path}
            after = {p for p in left - entered if model.get_submodule(p)._forward_hooks}
            before = {p for p in entered - left if model.get_submodule(p)._forward_pre_hooks}
            for path in after | before:
                reasons[norm] = f"{path}, between it and its layer, has a hook"
    return reasons


def _missed(model: nn.Module, found: Pairs, reading: _Reading) -> dict[str, str]:
    """Give the reasons of pairs whose BatchNorm the model's code would miss: it asks for its type.

    Tried on copies in which what is no BatchNorm computes the same.
    """

    def is_missed(norms: list[str]) -> bool:
        stand_ins = {m: _stand_in(m) for m in map(model.get_submodule, norms)}
        try:
            copied = shared_copy(model, instead=stand_ins)
            tried = _read(copied, reading.example, reading.forward_fn).trace
        except RetrofitError:
            return True
        return not do_the_same(tried.without(norms), reading.trace.without(norms))

    def missed(norms: list[str]) -> list[str]:
        """Find, by halves, which of these are."""
        if not norms or not is_missed(norms):
            return []
        half = len(norms) // 2
        return (missed(norms[:half]) + missed(norms[half:]) if half else []) or norms

    left: list[str] = []
    while more := missed([norm for norm in found.pairs if norm not in left]):
        left += more
    if left and is_missed([]):  # it differs from one run to the next
        return {}
    reason = "the model's own code does something else without it (it may ask for its type)"
    return dict.fromkeys(left, reason)


def _stand_in(norm: nn.Module) -> nn.Module:
    """Make what is no BatchNorm, and computes what `norm` computes in eval mode."""
    inside, stand_in = shared_copy(norm), nn.Identity()
    for module in inside.modules():
        module.training = False
    vars(stand_in)["forward"] = inside.forward
    return stand_in


def _on_another_axis(model: nn.Module, found: Pairs, reading: _Reading) -> dict[str, str]:
    """Give the reasons of pairs in which the BatchNorm may not normalise the layer's channels."""
    unsure = {
        norm: pair
        for norm, pair in found.pairs.items()
        if any(pair.between) or dims(model.get_submodule(pair.layer)) < 2
    }
    if not unsure:
        return {}
    if reading.symbolic is None:
        kept: set[str] | None = kept_in_run(
            model,
            reading.example,
            {norm: pair.layer for norm, pair in unsure.items()},
            reading.forward_fn,
        )
        reason = "it normalises another axis than the one of its layer's channels"
        if kept is None:
            reason = "whether it normalises the channels of its layer cannot be tried"
    else:
        kept = _kept(reading.symbolic, reading.nodes, unsure)
        reason = (
            "whether it normalises its layer's channels an example tells: pass example (--data)"
        )
    return {norm: reason for norm in unsure if norm not in (kept or ())}


def _kept(found: Symbolic, nodes: Mapping[Call, fx.Node], pairs: Mapping[str, Pair]) -> set[str]:
    """Tell in which pairs the BatchNorm normalises the layer's channels, as far as a graph can."""
    root, ranks = found.traced, ranks_in(found.graph, found.traced)
    calls = {n: [(nodes[one], nodes[other]) for one, other in p.calls] for n, p in pairs.items()}
    unknown = {
        one: int(root.get_submodule(norm).num_features)  # type: ignore[arg-type]
        for norm, pair in pairs.items()
        for one, _ in calls[norm]
        if not any(pair.between)
        and is_linear(root.get_submodule(pair.layer))
        and ranks[one] is None
        and hasattr(root.get_submodule(norm), "num_features")
    }
    ranks |= dict.fromkeys(of_two_axes(root, unknown), 2)
    return {
        norm
        for norm, both in calls.items()
        if all(kept_in_graph(root, one, other, ranks[one]) for one, other in both)
    }


def _in_every_branch(model: nn.Module, found: Pairs, reading: _Reading) -> Pairs:
    """Leave out the pairs that are none where forward is called with other arguments."""
    # What a model that asks for types does in a run, torch.fx does not see.
    if not found.pairs:
        return found
    if not (reading.trace.way == "symbolic" or reading.special):
        return Pairs(found.pairs, found.left, tuple(variadic(model)))
    others, known = branches(model, usual=reading.special), reading.trace.opaque
    reasons: dict[str, str] = {}
    for words, other in others.traces.items():
        calls = list(calls_of(model, other.graph, other.opaque).values())
        seen = _followed(calls, found.pairs)
        called = {call.path for call in calls if call.module is not None}
        more = {path: place for path, place in other.opaque.items() if path not in known}
        hidden = _hidden(model, found, more)
        touched = _read_by_code(found, other.reads.frozen())
        touched |= _changed_by_code(found, other.reads.changed)
        for norm, pair in found.pairs.items():
            same = seen.pairs.get(norm)
            if norm in touched:
                reasons.setdefault(norm, f"{words}: {touched[norm]}")
            elif norm in hidden:
                reasons.setdefault(norm, f"what {words} does with it cannot be followed")
            elif {norm, pair.layer} & called and (
                same is None or (same.layer, same.between) != (pair.layer, pair.between)
            ):
                reasons.setdefault(norm, f"{words} uses it or its layer otherwise")
    return Pairs(found.pairs, found.left, others.unknown).without(reasons)
