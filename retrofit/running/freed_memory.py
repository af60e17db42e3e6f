"""Memory of freed tensors: kept from one layer to the next, or given back to the system."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's numbers of two thresholds, and the most that glibc moves them to by itself.
_TRIM, _MMAP = -1, -3
_USUAL = {_MMAP: 32 << 20, _TRIM: 64 << 20}
_KEEP = {_MMAP: 1 << 30, _TRIM: (1 << 31) - 1}

_blocks: set[object] = set()  # that run now in this process, whichever ends first


@functools.cache
def _watch_forks(libc: ctypes.CDLL) -> None:
    """Have forked processes return to the usual thresholds; there is no way to take that back."""

    def in_child() -> None:
        if _blocks:
            _set(libc, _USUAL)
            _blocks.clear()

    os.register_at_fork(after_in_child=in_child)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory with the process for the length of the block, under Linux with glibc.

    By default glibc returns a block of more than 32 MiB to the system as soon as it is freed, and
    the next layer's output comes as empty pages that the system fills one by one: a fifth of
    VGG16's forward pass. See mallopt(3). Afterwards the thresholds are the largest that glibc would
    have chosen. Whoever has chosen some in the environment keeps those, and processes that are
    forked in the block, such as the workers of a DataLoader, give memory back as they always do.
    """
    libc = _glibc()
    if libc is None or not _set(libc, _KEEP):
        yield
        return
    _watch_forks(libc)
    block = object()
    _blocks.add(block)
    try:
        yield
    finally:
        _blocks.discard(block)
        if not _blocks:
            _set(libc, _USUAL)
            libc.malloc_trim(0)


def give_back() -> None:
    """Return what is free to the system, under Linux with glibc.

    Tensors of less than 32 MiB leave it with the process, in pieces that no larger one fits into.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Find glibc; None elsewhere, and where the user has chosen how it allocates."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None


def _set(libc: ctypes.CDLL, thresholds: dict[int, int]) -> bool:
    """Set the thresholds; some versions of glibc refuse a mapping threshold above 32 MiB."""
    return all(libc.mallopt(number, value) for number, value in thresholds.items())
