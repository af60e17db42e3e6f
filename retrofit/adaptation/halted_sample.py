"""A whole sample on its way through a model, halted at one BatchNorm after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from retrofit.adaptation.arrivals import Arrivals, version
from retrofit.adaptation.held_memory import HeldMemory
from retrofit.adaptation.norm_inputs import hooked, other_data
from retrofit.adaptation.paused_pass import PausedPass, pause
from retrofit.adaptation.running_statistics import Norms
from retrofit.calibration.feeding import Fed, FedBatch, Feed
from retrofit.calibration.processes import digest
from retrofit.errors import RetrofitError
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.running.memory import memory_of
from retrofit.running.nested import first_tensor

END = ""  # of the model, which no BatchNorm is called
MIXED = "."  # nor this: a batch came upon what another had left, and no number counts
MOST = 1024  # batches that wait: each has a stack
LOOKED_AT = 4096  # values of a sample: to hash a picture takes a hundredth of a pass


class _Stop(NamedTuple):
    """Where a pass waits: before a call of a BatchNorm, with what that gets."""

    path: str
    x: Tensor
    version: int


class _Run:
    """The pass of one batch, which stops at every call but the first ones of settled BatchNorms."""

    def __init__(self, batch: FedBatch, settled: Collection[str]) -> None:
        self.batch, self.settled = batch, settled
        self.calls: Counter[str] = Counter()
        self.digest = _digest(batch)
        self.passing = PausedPass(batch.run)
        self.stop: _Stop | None = None

    def at(self, path: str, x: Tensor) -> None:
        """Stop there, or pass."""
        self.calls[path] += 1
        if path not in self.settled or self.calls[path] > 1:
            pause(_Stop(path, x, version(x)))

    def go_on(self) -> _Stop | None:
        """Run to the next stop; None at the end.

        Raises RuntimeError where what it stopped with has been written to.
        """
        if self.stop is not None and version(self.stop.x) != self.stop.version:
            raise RuntimeError(f"what {self.stop.path} gets was overwritten")
        self.stop = self.passing.resume()
        return self.stop


class HaltedSample:
    """All batches of a sample, which go from one BatchNorm that is not settled to the next.

    Those that fit into the memory wait there; the others, at the end of the data, run anew each
    time. The first batch always waits.

    Args:
        model, norms, feed: what runs, its BatchNorms, and the batches.
        device: of the model.
        max_memory: bytes that waiting batches may take; a quarter of what there is by default.

    Attributes:
        settled: BatchNorms to pass. A batch that calls one again stops there.
        final: BatchNorms to pass at every call.
        places: where the batches are: at one BatchNorm if all is well, or at the `END`; `MIXED` is
            among them where batches get into each other's way, and it is to be begun otherwise.
        fed: how much data there is.
        passes: how often the data was gone through.
        held: the most bytes that waiting batches took, estimated from one image.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Norms,
        feed: Feed,
        device: torch.device | None,
        max_memory: float | None,
    ) -> None:
        self.model, self.norms, self.feed, self.device = model, norms, feed, device
        self.max_memory = memory_of(device) / 4 if max_memory is None else max_memory
        self.settled: set[str] = set()
        self.final: set[str] = set()
        self.places: set[str] = set()
        self._arrivals = Arrivals()
        self.fed, self.passes, self.held = Fed(), 0, 0
        self._waiting: list[_Run] = []
        self._others: list[str] = []  # digests of batches that do not wait
        self._each = 0  # bytes of an image, once they are known
        self._running: _Run | None = None
        self._seen: list[_Seen] = []  # of the first batch

    @contextmanager
    def halting(self) -> Iterator[None]:
        """Halt at BatchNorms in the block; at its end nothing waits."""

        def look(path: str, _: _BatchNorm, x: Tensor) -> None:
            if self._running is None:
                return
            if not self._waiting or self._running is self._waiting[0]:
                self._seen.append(_Seen.of(path, x))
            if path not in self.final:
                self._running.at(path, x.detach())

        try:
            with hooked(self.norms, look):
                yield
        finally:
            self.start_anew()

    def start_anew(self) -> None:
        """Let all batches begin again."""
        for run in self._waiting:
            run.passing.leave()
        self._waiting, self._others, self._seen = [], [], []

    def to_next(self) -> None:
        """Bring all batches to the next BatchNorm."""
        self.places, self._arrivals = set(), Arrivals()
        if self._waiting:
            self._advance()
        else:
            self._begin()
        if not self._arrivals.are_intact():
            self.places.add(MIXED)

    def arrived(self, path: str) -> ChannelStatistics | None:
        """Give the statistics of what this BatchNorm got; None if that was nothing."""
        return self._arrivals.statistics(path)

    def is_alike_alone(self) -> bool:
        """Tell whether the first batch, run on its own, brings to BatchNorms what it brought.

        Not so where the model keeps an activation outside of the pass, on itself for example, and
        reads it after a BatchNorm: another batch has put its own there meanwhile.
        """
        if self.fed.batches < 2:
            return True
        alone: list[_Seen] = []
        with hooked(self.norms, lambda path, _, x: alone.append(_Seen.of(path, x))):
            self._waiting[0].batch.run()
        return len(alone) == len(self._seen) and all(map(_Seen.is_like, alone, self._seen))

    def _begin(self) -> None:
        """Bring the batches to the first BatchNorm, and let wait what fits."""
        images = batches = 0
        stage, shown = "first pass", self.feed.progress and not self.passes
        with self.feed.bar(self.model, stage, shown=shown) as bar:
            for batch in self.feed.batches(self.model, self.device):
                self._each = self._each or self._bytes_of_an_image(batch)
                run = self._brought(_Run(batch, self.settled))
                images, batches = images + batch.images, batches + 1
                bar.update(batch.images)
                fits = images * self._each <= self.max_memory and batches <= MOST
                if batches == 1 or (fits and not self._others):
                    self._waiting.append(run)
                    self.held = max(self.held, images * self._each)
                else:
                    run.passing.leave()
                    self._others.append(run.digest)
        self.fed, self.passes = Fed(images, batches), self.passes + 1

    def _bytes_of_an_image(self, batch: FedBatch) -> int:
        """Measure what an image takes where a BatchNorm is called, where that is most."""
        try:
            return self._bytes_of(batch.head(1))
        except Exception:  # noqa: BLE001 - the model may want more; else it fails on the batch, too
            return self._bytes_of(batch.head(batch.images))

    def _bytes_of(self, one: FedBatch) -> int:
        memory, most, images = HeldMemory(), 0, one.images

        def look(_path: str, _norm: _BatchNorm, x: Tensor) -> None:
            nonlocal most, images
            images = images or len(x)
            most = max(most, memory.bytes)

        with hooked(self.norms, look), memory:
            one.run()
        given = sum(t.nbytes for t in tree_leaves(one.batch) if isinstance(t, Tensor))
        return (most + given) // max(1, images)

    def _advance(self) -> None:
        """Bring the batches from one BatchNorm to the next."""
        for run in self._waiting:
            self._brought(run)
        if self._others:
            self._run_others()

    def _run_others(self) -> None:
        """Run the batches that do not wait up to where the others are."""
        seen, images, batches = [], 0, 0
        for number, batch in enumerate(self.feed.batches(self.model, self.device)):
            if number < len(self._waiting):
                batch.images = self._waiting[number].batch.images
            else:
                run = self._brought(_Run(batch, self.settled))
                run.passing.leave()
                seen.append(run.digest)
            images, batches = images + batch.images, number + 1
        if (images, seen) != (self.fed.images, self._others):
            raise other_data(self.fed, Fed(images, batches), ", unless all fit into max_memory")
        self.passes += 1

    def _brought(self, run: _Run) -> _Run:
        """Let a batch run to where it stops next, and take what arrives there."""
        self._running = run
        try:
            stop = run.go_on()
            self.places.add(END if stop is None else stop.path)
            if stop is not None:
                run.batch.images = run.batch.images or len(stop.x)
                if stop.x.numel():
                    self._arrivals.add(stop.path, stop.x, run.batch)
        except BaseException as error:
            run.passing.leave()
            if isinstance(error, RetrofitError) or not isinstance(error, Exception):
                raise
            self.places.add(MIXED)  # an error of the batch itself comes again when it runs alone
        finally:
            self._running = None
        return run


class _Seen(NamedTuple):
    """A call of a BatchNorm: what it got, in two numbers."""

    path: str
    mean: float
    size: float

    @classmethod
    def of(cls, path: str, x: Tensor) -> _Seen:
        x = x.detach().float()
        return cls(path, float(x.mean()), float(x.norm()) / max(1, x.numel()) ** 0.5)

    def is_like(self, other: _Seen) -> bool:
        near = 1e-4 * max(self.size, other.size)
        means, sizes = abs(self.mean - other.mean), abs(self.size - other.size)
        return self.path == other.path and means <= near and sizes <= near


def _digest(batch: FedBatch) -> str:
    """Tell a batch from others by some values of its first sample."""
    x = first_tensor(batch.batch)
    if x is None or not x.dim():
        return digest(x)
    first = x[:1].flatten()
    return digest(first[:: 1 + first.numel() // LOOKED_AT])
