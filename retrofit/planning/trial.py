"""A plan tried out on a copy of the model, with stand-ins where BatchNorms will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import starmap
from typing import Any

from torch import Tensor, nn

from retrofit.errors import RetrofitError
from retrofit.numerics.comparison import BRANCH_TOLERANCE, Comparison
from retrofit.numerics.tensor_checks import is_dense
from retrofit.plans import Plan, Site
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.batchnorm import weight_of
from retrofit.surgery.native import put_after_sites
from retrofit.tracing.calls import Call, Trace
from retrofit.tracing.read_model import read, read_in_training


def missed_sites(
    model: nn.Module,
    traces: tuple[Trace, Trace | None],
    plan: Plan,
    example: Any,
    forward_fn: ForwardFn | None,
) -> set[str]:
    """Find the sites whose BatchNorm the model would not call.

    Args:
        model: not changed.
        traces: of the model, in eval mode and in train mode, where that may differ.
        plan: to be tried.
        example, forward_fn: as for `plan`.

    Raises:
        RetrofitError: the model's code does something else once layers are inserted, in either
            mode.
    """
    if not plan.inserted:
        return set()
    trace, training = traces
    trial = shared_copy(model)
    put_after_sites(trial, plan, _stand_in)
    tried = read(trial, example, forward_fn, way=trace.way)
    if not _does_the_same(tried, trace, plan):
        raise _does_something_else(model, "")
    if training is not None:
        trained = read_in_training(trial, trace, example, forward_fn, way=training.way)
        if trained is None or not _does_the_same(trained, training, plan):
            raise _does_something_else(model, "in train mode ")
    called = Counter(call.path for call in tried.calls)
    return {site.path for site in plan.inserted if called[site.norm] != site.calls}


def _does_something_else(model: nn.Module, when: str) -> RetrofitError:
    return RetrofitError(
        f"the code of {type(model).__name__} does something else {when}once layers are inserted "
        "(it may ask for their type or number): exclude those layers, or pass renumber=()"
    )


def _does_the_same(tried: Trace, trace: Trace, plan: Plan) -> bool:
    norms, seats = ({getattr(site, name) for site in plan.inserted} for name in ("norm", "seat"))
    same_flow = _flow(tried.calls, norms) == _flow(trace.calls, seats - {""})
    return same_flow and _returned_the_same(tried, trace)


def _stand_in(site: Site, layer: nn.Module | None) -> nn.Module:
    """Make what computes nothing and has a BatchNorm's tensors, which code may count or sum."""
    stand_in = nn.Identity()
    norm = nn.BatchNorm1d(site.channels, device=weight_of(layer, layer or stand_in).device)
    stand_in._parameters.update(norm._parameters)
    stand_in._buffers.update(norm._buffers)
    return stand_in


def _flow(calls: Sequence[Call], norms: Collection[str] = ()) -> list[tuple[Any, ...]]:
    """List each call with those that it feeds, by number, as if there were no `norms`."""
    kept = [call for call in calls if call.path not in norms]
    numbers = {call: number for number, call in enumerate(kept)}

    def fed(call: Call) -> Iterator[int]:
        for user in call.users:
            if user in numbers:
                yield numbers[user]
            else:
                yield from fed(user)

    return [(call.name, call.arguments, sorted(set(fed(call)))) for call in kept]


def _returned_the_same(one: Trace, other: Trace) -> bool:
    """Tell whether both runs returned the same; traces without a run returned nothing."""
    if one.outputs.keys() != other.outputs.keys():
        return False
    return all(starmap(_are_equal, zip(one.outputs.values(), other.outputs.values(), strict=True)))


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not is_dense(one):
        return one.shape == other.shape
    compared = Comparison()
    compared.add(one, other, "")
    allowed = 0.0 if one.device.type == "cpu" else BRANCH_TOLERANCE
    return compared.difference("").relative <= allowed
