"""The processes that read for a DataLoader, looked after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from retrofit.errors import PeerError


def loaded(loader: DataLoader[Any], what: str) -> Iterator[Any]:
    """Yield what a loader gives; PeerError, out of next() alone, for a worker that is gone.

    `what` it reads is for the message.
    """
    with _without_torchs_signal_handler(), _stops_held():
        batches = iter(loader)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # What a data set of the user's raises, in a worker or without any, is its own affair.
        own = str(error).startswith("Caught ") or not getattr(batches, "_workers", ())
        if own or (isinstance(error, RuntimeError) and _are_alive(batches)):
            raise
        raise PeerError(
            f"a process that reads {what} is gone ({' '.join(str(error).split())}): is there "
            "enough memory? --workers 0 does without"
        ) from error
    finally:
        # An error holds on to them until garbage collection, which closes their queues first, and
        # waits five seconds for each one in the midst of something else.
        if getattr(batches, "_workers", ()):
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _are_alive(batches: Any) -> bool:
    """Tell whether the processes and the thread that read for a loader's iterator are."""
    readers = [*getattr(batches, "_workers", ()), getattr(batches, "_pin_memory_thread", None)]
    return all(reader.is_alive() for reader in readers if reader is not None)


@contextmanager
def _stops_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block, in which processes start.

    What a handler raises while a process forks is printed and lost, and everything would go on.
    """
    held: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@contextmanager
def _without_torchs_signal_handler() -> Iterator[None]:
    """Undo that torch's loader sets a signal handler in the block, for the whole process.

    It raises out of whatever runs, for each worker that is gone, also when the error for the first
    one is being handled. Without it the loader looks after its workers every five seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = number and signal.getsignal(number)
    try:
        yield
    finally:
        if number and before is not None and signal.getsignal(number) is not before:
            signal.signal(number, before)
