"""A plan tried out on a copy of the model, with stand-ins where BatchNorms will be."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.plans import Plan, Site
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.batchnorm import weight_of
from retrofit.surgery.native import put_after_sites
from retrofit.tracing.calls import Trace
from retrofit.tracing.read_model import read, read_in_training
from retrofit.tracing.same_calls import do_the_same


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
            mode. Of a model that does something else each time this cannot be told.
    """
    if not plan.inserted:
        return set()
    trace, training = traces
    trial = shared_copy(model)
    put_after_sites(trial, plan, _stand_in)
    norms = {site.norm for site in plan.inserted}
    seats = {site.seat for site in plan.inserted if site.seat}
    tried = read(trial, example, forward_fn, way=trace.way)
    if not do_the_same(tried.without(norms), trace.without(seats)) and do_the_same(
        read(model, example, forward_fn, way=trace.way), trace
    ):
        raise _does_something_else(model, "")
    if training is not None:
        trained = read_in_training(trial, trace, example, forward_fn, way=training.way)
        if trained is None or not do_the_same(trained.without(norms), training.without(seats)):
            again = read_in_training(model, trace, example, forward_fn, way=training.way)
            if again is not None and do_the_same(again, training):
                raise _does_something_else(model, "in train mode ")
    called = Counter(call.path for call in tried.calls)
    return {site.path for site in plan.inserted if called[site.norm] != site.calls}


def _does_something_else(model: nn.Module, when: str) -> RetrofitError:
    return RetrofitError(
        f"the code of {type(model).__name__} does something else {when}once layers are inserted "
        "(it may ask for their type or number): exclude those layers, or pass renumber=()"
    )


def _stand_in(site: Site, layer: nn.Module | None) -> nn.Module:
    """Make what computes nothing and has a BatchNorm's tensors, which code may count or sum."""
    stand_in = nn.Identity()
    norm = nn.BatchNorm1d(site.channels, device=weight_of(layer, layer or stand_in).device)
    stand_in._parameters.update(norm._parameters)
    stand_in._buffers.update(norm._buffers)
    return stand_in
