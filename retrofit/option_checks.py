"""What the options of the public functions may be, and how to say so."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

from torch import nn

from retrofit.errors import RetrofitError


def check_number(name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raise RetrofitError, "`name` must `wanted`", unless `value` is a number that fits."""
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):
        raise RetrofitError(f"{name} must {wanted}, not {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise RetrofitError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise RetrofitError(f"{name} must be positive and a whole number, not {value!r}")


def check_models(function: str, *models: object) -> None:
    """Raise RetrofitError where `function` got something else for a model."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise RetrofitError(f"{function} takes an nn.Module, not a {type(model).__name__}")
