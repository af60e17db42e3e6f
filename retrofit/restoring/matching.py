"""Which tensor of a folded network belongs where: by its name, or by the order of execution."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from retrofit.errors import RetrofitError
from retrofit.files.fitting import COUNTS, fits, fitted, load_weights, other_classes, other_head
from retrofit.files.state_dicts import State
from retrofit.restoring.skeleton import skeleton_of
from retrofit.restoring.sources import Layer, Source
from retrofit.surgery.fold_pairs import Pairs
from retrofit.tables import few

ANOTHER = (
    ": is it of another architecture? (key_map= of retrofit.restore says how tensors are called)"
)


class Match(NamedTuple):
    """A folded network in the shape of an architecture.

    Attributes:
        skeleton: the architecture without the BatchNorms that are folded away, with the weights.
        seats: path of each of these BatchNorms to that of its layer.
    """

    skeleton: nn.Module
    seats: dict[str, str]


def by_name(architecture: nn.Module, pairs: Pairs, source: Source, key: str | None) -> Match | None:
    """Match tensors by their names, less a common prefix; None where they are another network's.

    Raises RetrofitError where the names are this architecture's, and do not fit.
    """
    own = list(architecture.state_dict())
    norms = {architecture.get_submodule(path) for path in pairs.pairs}
    every = dict(architecture.named_modules(remove_duplicate=False))
    folding = tuple(f"{path}." for path, module in every.items() if module in norms)
    always = dict.fromkeys(name for name in own if not name.startswith(folding))
    source = _less_indices(source, always, key)
    state = fits(source.file, always, key)[0].state
    missing = [name for name in always if name not in state and not name.endswith(COUNTS)]
    if missing and source.layers is not None:
        return None
    seats = {
        norm: pair.layer for norm, pair in pairs.pairs.items() if f"{norm}.running_var" not in state
    }
    if not seats and not missing:
        if lost := [name for name in own if name not in state and not name.endswith(COUNTS)]:
            raise RetrofitError(
                f"{source.name} has the statistics of all BatchNorms, so that none was folded, and "
                f"lacks {few(lost)}"
            )
        raise RetrofitError(
            f"{source.name} loads as it is: all of its BatchNorms are there, and there is nothing "
            "to restore"
        )
    _refuse_lost(pairs, state, missing, source)
    skeleton = skeleton_of(architecture, seats, state)
    tensors = fitted(source.file, skeleton, key)
    _refuse_other_shapes(skeleton, seats, tensors, source)
    load_weights(skeleton, tensors, source.name)
    return Match(skeleton, seats)


def _less_indices(source: Source, names: Mapping[str, None], key: str | None) -> Source:
    """Take the indices of fused modules out of the names where these then fit better."""
    shorter = source.without_indices({*names})
    wrong = [fits(one.file, names, key)[0].wrong for one in (source, shorter)]
    return shorter if wrong[1] < wrong[0] else source


def _refuse_lost(pairs: Pairs, state: State, missing: Sequence[str], source: Source) -> None:
    """Raise RetrofitError for tensors that cannot come back, with the place and the reason."""
    for norm, reason in pairs.left.items():
        if f"{norm}.running_var" in missing:
            raise RetrofitError(
                f"{source.name} has no {norm}.running_var, and this BatchNorm is in no layer's "
                f"weight: {reason}"
            )
    if missing:
        near = difflib.get_close_matches(missing[0], list(state), n=1)
        hint = f"; the nearest name there is {near[0]}" if near else ""
        raise RetrofitError(
            f"{source.name} has no {few(missing)}, of {len(missing)} tensors that are missing"
            f"{hint}{ANOTHER}"
        )


def _refuse_other_shapes(
    skeleton: nn.Module, seats: Mapping[str, str], tensors: State, source: Source
) -> None:
    """Raise RetrofitError for the first tensor of another shape, seats first."""
    own = skeleton.state_dict()
    both = {n: (tensors[n], t) for n, t in own.items() if n in tensors and isinstance(t, Tensor)}
    first = [f"{layer}.weight" for layer in seats.values()]
    for name in [*first, *own]:
        ours, theirs = own.get(name), tensors.get(name)
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape != theirs.shape:
            raise RetrofitError(
                f"{name} has shape {tuple(theirs.shape)} in {source.name}, and "
                f"{tuple(ours.shape)} in the architecture: it is of another one"
                f"{other_head(both, skeleton)}"
            )


# --- by the order of execution ------------------------------------------------------------------


def by_order(
    architecture: nn.Module,
    pairs: Pairs,
    source: Source,
    layers: Sequence[Layer],
    own: Sequence[Layer],
) -> Match:
    """Match layers one after another, or else those of each shape; all shapes have to agree.

    Whether they belong together only a run tells.

    Args:
        architecture, pairs: what is to come.
        source: the folded network.
        layers, own: those of the source and of the architecture, in the order of execution.

    Raises RetrofitError for the first place that differs.
    """
    seen = {architecture.get_submodule(layer.path) for layer in own}
    for pair in pairs.pairs.values():
        if is_parametrized(layer := architecture.get_submodule(pair.layer)) and layer not in seen:
            raise RetrofitError(
                f"{source.name} has other names than the architecture, in which {pair.layer} is "
                "parametrized (weight_norm, say): layers are matched in order where each has a "
                "weight of its own; torch.nn.utils.parametrize.remove_parametrizations makes one"
            )
    try:
        theirs_of = _one_after_another(pairs, source, layers, own)
    except RetrofitError:
        theirs_of = _shape_by_shape(pairs, source, layers, own)
        if not theirs_of:
            raise
    seats = {n: pair.layer for n, pair in pairs.pairs.items() if n not in theirs_of}
    if not seats:
        raise RetrofitError(f"{source.name} has all of its BatchNorms: there is nothing to restore")
    state: State = {
        f"{path}.{name}": tensor
        for path, theirs in theirs_of.items()
        for name, tensor in theirs.tensors.items()
    }
    skeleton = skeleton_of(architecture, seats, state)
    whole = dict(_completed(skeleton, state, source))
    missing = [n for n in skeleton.state_dict() if n not in whole and not n.endswith(COUNTS)]
    _refuse_lost(pairs, whole, missing, source)
    load_weights(skeleton, whole, source.name)
    return Match(skeleton, seats)


def _one_after_another(
    pairs: Pairs, source: Source, layers: Sequence[Layer], own: Sequence[Layer]
) -> dict[str, Layer]:
    """Give each of the architecture's layers the next one; raise for the first that differs."""
    found: dict[str, Layer] = {}
    waiting = list(layers)
    for i, layer in enumerate(own):
        theirs = waiting[0] if waiting else None
        if layer.path in pairs.pairs and not _is_that_norm(theirs, layer):
            continue
        if theirs is not None and source.exported:
            theirs = _with_bias(theirs, layer)
        if theirs is None or (reason := _other(layer, theirs)):
            what = f"{theirs.path} {reason}" if theirs else "no more layers"
            why = f" ({pairs.left[layer.path]})" if layer.path in pairs.left else ""
            rest = [one for one in own[i:] if one.path not in pairs.pairs]
            raise RetrofitError(
                f"{source.name} does not fit, neither by names nor layer by layer: where the "
                f"architecture has {layer.path} {_shapes(layer)}{why}, it has {what}"
                f"{_head_alone(waiting, rest)}"
            )
        found[layer.path] = theirs
        waiting.pop(0)
    if waiting:
        raise RetrofitError(
            f"{source.name} has {len(waiting)} more layers than the architecture, the first of "
            f"them {waiting[0].path} {_shapes(waiting[0])}"
        )
    return found


def _shape_by_shape(
    pairs: Pairs, source: Source, layers: Sequence[Layer], own: Sequence[Layer]
) -> dict[str, Layer]:
    """Give each layer the next one of its shape; {} where their numbers do not agree.

    Of branches that run beside each other an exporter may put any first.
    """
    theirs, ours = _by_shape(layers), _by_shape(own)
    if theirs.keys() - ours.keys():
        return {}
    found: dict[str, Layer] = {}
    for shape, every in ours.items():
        there = theirs.get(shape, [])
        staying = [layer for layer in every if layer.path not in pairs.pairs]
        mine = every if len(there) == len(every) else staying
        if len(there) != len(mine):
            return {}
        if source.exported:
            there = list(map(_with_bias, there, mine))
        if any(map(_other, mine, there)):
            return {}
        found |= {layer.path: other for layer, other in zip(mine, there, strict=True)}
    return found


def _by_shape(layers: Sequence[Layer]) -> dict[tuple[object, ...], list[Layer]]:
    """Sort layers by what has to agree."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        key = (layer.tensors["weight"].shape, "running_var" in layer.tensors)
        found.setdefault(key, []).append(layer)
    return found


def _with_bias(theirs: Layer, ours: Layer) -> Layer:
    """Give a layer the bias of zeros that an exporter leaves out."""
    bias = ours.tensors.get("bias")
    if bias is None or "bias" in theirs.tensors:
        return theirs
    return Layer(theirs.path, {**theirs.tensors, "bias": torch.zeros_like(bias, device="cpu")})


def _is_that_norm(theirs: Layer | None, norm: Layer) -> bool:
    return theirs is not None and "running_var" in theirs.tensors and not _other(norm, theirs)


def _other(ours: Layer, theirs: Layer) -> str:
    """Say in what a layer differs; "" if in nothing but a bias that folding has added."""
    shapes = [layer.tensors["weight"].shape for layer in (ours, theirs)]
    norms = ["running_var" in layer.tensors for layer in (ours, theirs)]
    if shapes[0] != shapes[1] or norms[0] != norms[1]:
        return _shapes(theirs)
    lost = [n for n in ours.tensors if n not in theirs.tensors and n != COUNTS.lstrip(".")]
    return f"without {lost[0]}" if lost else ""


def _shapes(layer: Layer) -> str:
    return f"of shape {tuple(layer.tensors['weight'].shape)}"


def _head_alone(theirs: Sequence[Layer], ours: Sequence[Layer]) -> str:
    """Ask, of layers from the first that differs: of other classes, or of another architecture?"""
    if len(theirs) == len(ours):
        tensors = (
            (other.tensors[name], tensor)
            for other, layer in zip(theirs, ours, strict=True)
            for name, tensor in layer.tensors.items()
            if name in other.tensors
        )
        if hint := other_classes(tensors):
            return hint
    return ANOTHER


def _completed(skeleton: nn.Module, state: State, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield a tensor for each name: of the layers, else by its name, else a buffer of its own."""
    theirs = fits(source.file, skeleton.state_dict())[0].state
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        alias = next((n for n, p in parameters.items() if p is tensor and n in state), name)
        if alias in state or name in theirs:
            yield name, state.get(alias, theirs.get(name))
        elif name not in parameters:
            yield name, tensor  # a constant, such as a table of positions
