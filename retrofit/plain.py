"""Reports as plain JSON values and back; what is read is checked, since a file may say anything."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from retrofit.errors import RetrofitError

T = TypeVar("T")
LARGEST = {int: 2**53, float: 1e100}  # beyond these, formulas overflow and figures mean nothing


def to_plain(value: Any) -> Any:
    """A dataclass of numbers, texts, tuples and further dataclasses, as JSON can hold it.

    Infinity, which JSON lacks, becomes "inf".
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: type[T], value: object) -> T:
    """The `kind` that `to_plain` made `value` from; RetrofitError for anything else.

    Every number in these reports is a count or a size: none is negative.
    """
    made: T = _read(kind, value)
    return made


def _read(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != types.keys():
            raise _wrong(kind, value)
        return kind(**{name: _read(types[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _wrong(kind, value)
        return tuple(_read(get_args(kind)[0], item) for item in value)
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _read(get_args(kind)[0], value)
    if kind is float and value in ("inf", math.inf):
        return math.inf
    accepted = (float, int) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
        raise _wrong(kind, value)
    if kind in LARGEST and not 0 <= value <= LARGEST[kind]:
        raise _wrong(kind, value)
    return kind(value)


def _wrong(kind: type[Any], value: Any) -> RetrofitError:
    shown = repr(value)
    return RetrofitError(f"{shown[:60]}{'...' * (len(shown) > 60)} is no {kind.__name__}")
