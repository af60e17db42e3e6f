"""What the options of the public functions may be, and how to say so."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
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


def check_flags(**flags: object) -> None:
    """Raise RetrofitError for a flag that is neither True nor False: "no" counts as true."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise RetrofitError(f"{name} must be True or False, not {value!r}")


def check_forward_fn(value: object) -> None:
    """Raise RetrofitError unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise RetrofitError(
            f"forward_fn must be a function, called as forward_fn(model, batch), not {value!r}"
        )


def check_text(name: str, value: object) -> None:
    """Raise RetrofitError unless `value` is None or a string."""
    if value is not None and not isinstance(value, str):
        raise RetrofitError(f"{name} must be a string, not {value!r}")


def check_path(name: str, value: object) -> None:
    """Raise RetrofitError unless `value` is a path, as a string or as pathlib has it."""
    if not isinstance(value, (str, os.PathLike)):
        raise RetrofitError(f"{name} must be the path of a file, not {value!r}")


def check_models(function: str, *models: object) -> None:
    """Raise RetrofitError where `function` got something else for a model."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise RetrofitError(f"{function} takes an nn.Module, not a {type(model).__name__}")
