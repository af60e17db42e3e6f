"""A plan tried out on a copy of the model, with nn.Identity where BatchNorms will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import starmap
from typing import Any

from torch import Tensor, nn

from retrofit.errors import RetrofitError
from retrofit.numerics.comparison import BRANCH_TOLERANCE, Comparison
from retrofit.numerics.tensor_checks import is_dense
from retrofit.plans import Plan
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.native import put_after_sites
from retrofit.tracing.calls import Call, Trace
from retrofit.tracing.read_model import read


def missed_sites(
    model: nn.Module, trace: Trace, plan: Plan, example: Any, forward_fn: ForwardFn | None
) -> set[str]:
    """Find the sites whose BatchNorm the model would not call.

    Raises RetrofitError when the model's code does something else once layers are inserted.
    """
    if not plan.inserted:
        return set()
    trial = shared_copy(model)
    put_after_sites(trial, plan, lambda _site, _layer: nn.Identity())
    norms = {site.norm for site in plan.inserted}
    tried = read(trial, example, forward_fn, way=trace.way)
    same_flow = _flow(tried.calls, norms) == _flow(trace.calls)
    if not (same_flow and _returned_the_same(tried, trace)):
        raise RetrofitError(
            f"the code of {type(model).__name__} does something else once layers are inserted "
            "(it may ask for their type or number): exclude those layers, or pass renumber=()"
        )
    called = Counter(call.path for call in tried.calls)
    return {site.path for site in plan.inserted if called[site.norm] != site.calls}


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
