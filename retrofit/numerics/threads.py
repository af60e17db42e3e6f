"""How many threads of torch the small steps of a calibration use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW = 4  # threads
LARGE = 1 << 18  # elements


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Let torch's operations in the block use one thread, or all where that is worth it.

    Every parallel step waits for all of its threads. On a machine that is busy one of them is often
    not running, so that many short steps take several times as long as on one thread; and reading
    an activation waits for memory rather than for a core.

    Args:
        elements: what one operation reads. Few take one thread; and so do many where torch has few
            threads in all.
    """
    before = torch.get_num_threads()
    if before == 1 or not _changeable() or (before > FEW and elements >= LARGE):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _changeable() -> bool:
    """Whether torch can change the number once it has begun: only with OpenMP."""
    return "parallel backend: OpenMP" in torch.__config__.parallel_info()
