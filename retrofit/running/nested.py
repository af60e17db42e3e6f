"""Which tensors are in nested values: a batch, or what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def first_tensor(value: Any) -> Tensor | None:
    """Find the first tensor in nested values; None if there is none."""
    return next((tensor for _, tensor in _walk(value, "", set())), None)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """List all tensors in nested values by their place: "output", "output[1].boxes".

    Looks into mappings, lists, tuples, dataclasses, and objects with attributes such as
    SimpleNamespace.
    """
    return dict(_walk(value, name, set()))


def _walk(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterable[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = ((f"{name}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"{name}[{i}]", item) for i, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        items = ((f"{name}.{key}", item) for key, item in vars(value).items())
    else:
        return
    if id(value) not in above:  # an object may hold itself
        for place, item in items:
            yield from _walk(item, place, above | {id(value)})
