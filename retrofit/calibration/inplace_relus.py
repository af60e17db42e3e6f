"""The in-place ReLUs that a kernel may compute along with the convolution before them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.nn.modules import module as modules
from typing_extensions import TypeIs

from retrofit.calibration.observer import MomentObserver, observers_of
from retrofit.running.shared_copy import shared_copy
from retrofit.tracing.calls import Call
from retrofit.tracing.symbolic import trace_whole


def relus_behind(
    prepared: nn.Module, convolutions: Iterable[nn.Conv2d]
) -> dict[nn.Conv2d, nn.ReLU]:
    """Find the in-place ReLU that alone reads what a convolution gives, at each of its calls.

    Nobody sees the convolution's output before the ReLU has written over it, but the observer in
    between. Where a hook could see it, and in a model that torch.fx cannot follow, there is none.

    Args:
        prepared: made by `prepare`. It is read as it runs in eval mode with the arguments of
            forward that have no default.
        convolutions: of that model.
    """
    of_all = modules._global_forward_hooks or modules._global_forward_pre_hooks
    if of_all or not any(map(_is_in_place_relu, prepared.modules())):
        return {}
    # torch.fx goes into observers, which look at what they get; nn.Identity is a layer to it.
    identities: dict[nn.Module, nn.Module] = {o: nn.Identity() for o in observers_of(prepared)}
    trace = trace_whole(shared_copy(prepared, instead=identities))
    if not trace.static:
        return {}
    behind: dict[nn.Module, set[nn.ReLU | None]] = {}
    for call in trace.calls:
        if call.module is not None:
            layer = prepared.get_submodule(call.path)
            behind.setdefault(layer, set()).add(_relu_behind(prepared, call, trace.changed))
    found = {conv: behind.get(conv, set()) for conv in convolutions}
    one = {conv: relus.pop() for conv, relus in found.items() if len(relus) == 1}
    return {conv: relu for conv, relu in one.items() if relu is not None}


def _relu_behind(prepared: nn.Module, call: Call, changed: Collection[str]) -> nn.ReLU | None:
    """Find the ReLU that alone reads what a call gives, behind an observer; None if there is none.

    `changed` has the paths of layers of which the model's own code makes others as it goes.
    """
    calls = [call]
    while len(calls) < 3:
        if len(calls[-1].users) != 1:
            return None
        calls += calls[-1].users
    if any(c.module is None or c.path in changed for c in calls):
        return None
    _, observer, relu = (prepared.get_submodule(c.path) for c in calls)
    if not (isinstance(observer, MomentObserver) and _is_in_place_relu(relu)):
        return None
    # What a hook would see as the convolution gave it: the output of what ends before the ReLU
    # begins, and the input of what begins after the convolution has ended.
    conv_ends, _, relu_begins = ({*c.inside, c.path} for c in calls)
    ending = {*conv_ends, calls[1].path} - relu_begins
    beginning = {*relu_begins, calls[1].path} - conv_ends
    hooks = [prepared.get_submodule(path)._forward_hooks for path in ending]
    hooks += [prepared.get_submodule(path)._forward_pre_hooks for path in beginning]
    return None if any(hooks) else relu


def _is_in_place_relu(module: nn.Module) -> TypeIs[nn.ReLU]:
    """Tell whether this is an nn.ReLU in place, with the `forward` of its class."""
    return type(module) is nn.ReLU and module.inplace and "forward" not in vars(module)
