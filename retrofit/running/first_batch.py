"""The first batch of some data, looked at before all of it is gone through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import nothing_in
from retrofit.running.nested import tensors
from retrofit.running.random_order import in_random_order


def looked_into(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch with anything in it, and all of the data, which may be an iterator.

    Raises RetrofitError where there is none.
    """
    batches = iter(data)
    taken = []
    for batch in batches:
        taken.append(batch)
        if not _is_empty(batch):
            break
    if not taken:
        raise RetrofitError(nothing_in(data))
    if isinstance(data, (list, tuple)):  # which can be gone through again, and has a length
        return taken[-1], data
    return taken[-1], _Again(data, taken, batches)


def _is_empty(batch: Any) -> bool:
    found = tensors(batch).values()
    return bool(found) and not any(tensor.numel() for tensor in found)


class _Again:
    """`data` from its beginning, although its first batches were taken from the iterator."""

    def __init__(self, data: Iterable[Any], taken: list[Any], rest: Iterator[Any]) -> None:
        self.taken, self.rest = taken, rest
        self.dataset = getattr(data, "dataset", None)  # for the length of the progress bar
        self.in_random_order = in_random_order(data)

    def __iter__(self) -> Iterator[Any]:
        yield from self.taken
        yield from self.rest
