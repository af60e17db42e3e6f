"""The first batch of some data, looked at before all of it is gone through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import nothing_in

_END = object()  # None is a batch, too, though one that no model takes


def looked_into(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, and the data from its beginning, which may be an iterator.

    Raises RetrofitError where there is none.
    """
    batches = iter(data)
    first = next(batches, _END)
    if first is _END:
        raise RetrofitError(nothing_in(data))
    return first, _Again(data, first, batches)


class _Again:
    """`data` from its beginning, although its first batch was taken from the iterator."""

    def __init__(self, data: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self.first, self.rest = first, rest
        self.dataset = getattr(data, "dataset", None)  # for the length of the progress bar

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self.rest
