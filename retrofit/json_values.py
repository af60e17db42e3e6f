"""Dataclasses as plain JSON values and back; what is read is checked: a file may say anything."""

from __future__ import annotations

import functools
import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from retrofit.errors import RetrofitError

T = TypeVar("T")
LARGEST = {int: 2**53, float: 1e100}  # beyond these, formulas overflow and figures mean nothing


def to_plain(value: Any) -> Any:
    """Turn a dataclass of numbers, texts, tuples, dicts and dataclasses into what JSON can hold.

    Infinity, which JSON lacks, becomes "inf".
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: type[T], value: object) -> T:
    """Read the `kind` that `to_plain` made `value` from.

    Every number in these is a count or a size: none is negative. Fields that have a default may be
    missing.

    Raises RetrofitError for anything else.
    """
    made: T = _read(kind, value)
    return made


def _read(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_dataclass(kind, value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(kind, value)
        return tuple(_read(inner[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(kind, value)
        return {_read(inner[0], key): _read(inner[1], item) for key, item in value.items()}
    if origin is UnionType:
        return _read_union(inner, value)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in inner):
            raise _wrong(kind, value)
        return value
    return _read_scalar(kind, value)


def _read_dataclass(kind: type[Any], value: Any) -> Any:
    types, required = _fields(kind)  # type: ignore[arg-type]
    if not isinstance(value, dict) or not required <= value.keys() <= types.keys():
        raise _wrong(kind, value)
    return kind(**{name: _read(types[name], item) for name, item in value.items()})


def _read_union(kinds: tuple[Any, ...], value: Any) -> Any:
    """Read one of several kinds: something or None, or scalars, which may be negative."""
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if len(kinds) == 1:
        return _read(kinds[0], value)
    if isinstance(value, list):
        value = next((_read(k, value) for k in kinds if get_origin(k) is tuple), value)
    elif type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(" | ".join(getattr(kind, "__name__", str(kind)) for kind in kinds), value)
    return value


def _read_scalar(kind: Any, value: Any) -> Any:
    if kind is float and value in ("inf", math.inf):
        return math.inf
    accepted = (float, int) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
        raise _wrong(kind, value)
    if kind in LARGEST and not 0 <= value <= LARGEST[kind]:
        raise _wrong(kind, value)
    return kind(value)


@functools.cache
def _fields(kind: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """List the fields of a dataclass with their types, and those that must be there."""
    required = frozenset(f.name for f in fields(kind) if f.default is MISSING)
    return get_type_hints(kind), required


def _wrong(kind: Any, value: Any) -> RetrofitError:
    shown = repr(value)
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return RetrofitError(f"{shown[:60]}{'...' * (len(shown) > 60)} is no {name}")
