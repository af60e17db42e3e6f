"""Whether two models do the same, as far as their traces tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import Any

from torch import Tensor

from retrofit.numerics.comparison import BRANCH_TOLERANCE, Comparison
from retrofit.numerics.tensor_checks import is_dense
from retrofit.tracing.calls import Call, Trace


def do_the_same(one: Trace, other: Trace) -> bool:
    """Tell whether both make the same calls, which feed each other alike, and return the same."""
    return _flow(one.calls) == _flow(other.calls) and _returned_the_same(one, other)


def _flow(calls: Sequence[Call]) -> list[tuple[Any, ...]]:
    """List each call with those that it feeds, by number."""
    numbers = {call: number for number, call in enumerate(calls)}
    return [
        (call.name, call.arguments, sorted({numbers[user] for user in call.users}))
        for call in calls
    ]


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
