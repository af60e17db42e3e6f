"""The processes that work on one calibration, and what they must agree in."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retrofit.calibration.observer import observers_of
from retrofit.errors import PeerError, RetrofitError
from retrofit.plans import Plan

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for one that hangs; one that has died is missed at once


class Processes:
    """A process group, or one process alone.

    Every process has to make the same calls in the same order. A process that fails says so to the
    others instead of its next call, and one that is gone is missed there: either raises PeerError.

    Attributes:
        rank, size: which of how many this process is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        try:
            self.rank = 0 if group is None else dist.get_rank(group)
            self.size = 1 if group is None else dist.get_world_size(group)
        except ValueError as error:
            raise RetrofitError(
                "process_group must be a group of torch.distributed, such as its group.WORLD after "
                f"init_process_group, not {group!r}: {error}"
            ) from error
        if self.rank < 0:
            raise RetrofitError("this process is not in the process_group that it was given")

    def gather(self, value: T) -> list[T]:
        """Give every process what every process gave, in rank order."""
        return self._exchange(value, "")

    def from_first(self, value: T) -> T:
        """Give every process what the first one gave, bit for bit."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def agree(self, what: Mapping[str, Any]) -> None:
        """Raise PeerError in all processes where one gives something else than the first."""
        first, *others = self.gather(what)
        for rank, other in enumerate(others, 1):
            if problem := difference(first, other):
                raise PeerError(f"process {rank} of {self.size} has {problem} than process 0")

    def fail(self, error: Exception) -> None:
        """Tell the others that this process has failed, unless it was they who did."""
        if not isinstance(error, PeerError) and self.size > 1:
            with suppress(PeerError):  # this process's own
                self._exchange(None, str(error) or type(error).__name__)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others of an error in the block."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

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
def launched() -> Iterator[Processes]:
    """Join the processes that torchrun has started, for the length of the block, or be alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield Processes()
        return
    both = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RetrofitError(f"the processes cannot find each other: {reason}") from error
    processes = Processes(dist.group.WORLD)

    def stop(*_: object) -> None:
        # It may come anywhere, also where an Exception would be taken for a bad picture. A text
        # is printed, and the process exits with 1.
        raise SystemExit(
            f"retrofit: process {processes.rank} of {processes.size} was told to stop, as torchrun "
            "does when another one has failed: see what that one printed"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        # gloo's thread wants the interpreter's lock to let go of the tensors of the last exchange;
        # to destroy the group is to wait for that thread with the lock in hand, for ever.
        time.sleep(0.2)
        dist.destroy_process_group()


def fingerprint(prepared: nn.Module, plan: Plan) -> dict[str, Any]:
    """Describe a prepared model: its class, its plan, and a digest of each of its tensors."""
    learned = [tensor for observer in observers_of(prepared) for tensor in observer.buffers()]
    return {
        "class": type(prepared).__name__,
        "plan": {site.path: f"{site.norm}, {site.calls}" for site in plan.inserted},
        "weights": digests(prepared, but=learned),
    }


def digests(model: nn.Module, but: Iterable[Tensor] = ()) -> dict[str, str]:
    """Hash each tensor in the state dict of `model`, but for some."""
    left_out = set(map(id, but))
    state = model.state_dict(keep_vars=True)
    tensors = {k: t for k, t in state.items() if isinstance(t, Tensor) and id(t) not in left_out}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what `other` differs in, in a few words; "" if in nothing."""
    for name in {**one, **other}:
        value, found = one.get(name), other.get(name)
        if value == found:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            keys = [key for key in {**value, **found} if value.get(key) != found.get(key)]
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            return f"different {name} at {keys[0]}{more}"
        return f"a different {name} ({found}, not {value})"
    return ""


def digest(tensor: Tensor | None) -> str:
    """Hash the dtype, the shape and the bits of a tensor."""
    if tensor is None or tensor.is_meta:
        return "-"
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(plain.data)
    return found.hexdigest()[:32]
