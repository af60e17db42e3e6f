"""Python's garbage collector, held back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in the block, or in the function that this decorates.

    A copy or a trace of a network is ten thousands of new objects, none of them garbage. They make
    Python look through all that torch has loaded several times over: 40 % of the time it takes to
    plan a network of 1,000 convolutions.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
