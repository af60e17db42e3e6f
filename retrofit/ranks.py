"""The processes that work on one calibration."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retrofit.errors import PeerError, RetrofitError
from retrofit.fingerprint import difference

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for one that hangs; one that has died is missed at once


class Ranks:
    """A process group, or one process alone.

    Every process has to make the same calls in the same order. A process that fails says so to the
    others instead of its next call, and one that is gone is missed there: either raises PeerError.

    Attributes:
        rank, size: which of how many this process is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise RetrofitError("this process is not in the process_group that it was given")

    def gather(self, value: T) -> list[T]:
        """What every process gave, in rank order, for every process."""
        return self._exchange(value, "")

    def from_first(self, value: T) -> T:
        """What the first process gave, bit for bit, for every process."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def agree(self, what: Mapping[str, Any]) -> None:
        """PeerError, for all, where a process gives something else than the first one."""
        first, *others = self.gather(what)
        for rank, other in enumerate(others, 1):
            if problem := difference(first, other):
                raise PeerError(f"process {rank} of {self.size} has {problem} than process 0")

    def fail(self, error: Exception) -> None:
        """Tell the others that this process has failed, unless it was they who did."""
        if not isinstance(error, PeerError) and self.size > 1:
            with suppress(PeerError):  # this process's own
                self._exchange(None, str(error) or type(error).__name__)

    def _exchange(self, value: Any, problem: str) -> list[Any]:
        if self.group is None:
            return [value]
        everything: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everything, (value, problem), group=self.group)
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.size} lost another one, which has died or hangs: "
                "see what that one printed, and start again"
            ) from error
        for rank, (_, text) in enumerate(everything):
            if text:
                raise PeerError(f"process {rank} of {self.size} failed: {text}")
        return [value for value, _ in everything]


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that torchrun has started, for the length of the block, or this one alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield Ranks()
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RetrofitError(f"the processes cannot find each other: {reason}") from error
    ranks = Ranks(dist.group.WORLD)

    def stop(*_: object) -> None:
        # It may come anywhere, also where an Exception would be taken for a bad picture. A text
        # is printed, and the process exits with 1.
        raise SystemExit(
            f"retrofit: process {ranks.rank} of {ranks.size} was told to stop, as torchrun does "
            "when another one has failed: see what that one printed"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield ranks
    finally:
        signal.signal(signal.SIGTERM, before)
        # gloo's thread wants the interpreter's lock to let go of the tensors of the last exchange;
        # to destroy the group is to wait for that thread with the lock in hand, for ever.
        time.sleep(0.2)
        dist.destroy_process_group()
