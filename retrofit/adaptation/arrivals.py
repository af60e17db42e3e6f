"""What arrives at a BatchNorm, batch after batch: small ones are reduced together."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.calibration.feeding import FedBatch
from retrofit.errors import NonFiniteError
from retrofit.numerics.batch_table import BatchTable
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.reductions import CACHED, Samples, finite


def version(x: Tensor) -> int:
    """Give a number that differs once a tensor, or what shares its memory, was written to."""
    return 0 if x.is_inference() else x._version


class _Arrival(NamedTuple):
    """What a batch brought, and its version then."""

    batch: FedBatch
    x: Tensor
    version: int


class Arrivals:
    """The activations that batches bring to BatchNorms, reduced to the moments of their samples.

    A single picture costs more calls than arithmetic. So activations of one shape wait for each
    other, until there are as many as a cache holds.
    """

    def __init__(self) -> None:
        self._reduced: dict[str, list[Samples]] = defaultdict(list)
        self._path = ""
        self._waiting: list[_Arrival] = []
        self._intact = True

    def add(self, path: str, x: Tensor, batch: FedBatch) -> None:
        """Take what a BatchNorm got of a batch, (N, C, ...), of at least one element."""
        if self._waiting and not self._is_like_those_waiting(path, x):
            self._reduce()
        self._path = path
        self._waiting.append(_Arrival(batch, x, version(x)))
        if sum(waiting.x.numel() for waiting in self._waiting) + x.numel() > CACHED:
            self._reduce()

    def _is_like_those_waiting(self, path: str, x: Tensor) -> bool:
        other = self._waiting[0].x
        return path == self._path and (
            (x.shape[1:], x.dtype, x.device) == (other.shape[1:], other.dtype, other.device)
        )

    def _reduce(self) -> None:
        self._intact = self.are_intact()
        batches, given, _ = zip(*self._waiting, strict=True)
        self._waiting = []
        lengths = [len(x) for x in given]
        try:
            found = finite(torch.cat(given) if len(given) > 1 else given[0], self._path)
        except NonFiniteError as error:
            raise _placed(error, batches, lengths) from None
        parts = zip(found.mean.split(lengths), found.var.split(lengths), strict=True)
        self._reduced[self._path] += [Samples(found.size, mean, var) for mean, var in parts]

    def are_intact(self) -> bool:
        """Tell whether nothing was written to before it was reduced, as has to be."""
        return self._intact and all(version(x) == then for _, x, then in self._waiting)

    def statistics(self, path: str) -> ChannelStatistics | None:
        """Give the statistics of what came to a BatchNorm; None if that was nothing.

        Raises NonFiniteError, with the image's place in the data.
        """
        if self._waiting:
            self._reduce()
        if path not in self._reduced:
            return None
        table = BatchTable.of([self._reduced[path]])
        return ChannelStatistics.empty(table.rows.mean.shape[1]).add(table)


def _placed(error: NonFiniteError, batches: tuple[FedBatch, ...], lengths: list[int]) -> Exception:
    item = error.item
    for batch, length in zip(batches, lengths, strict=True):
        if item < length:
            return batch.placed(NonFiniteError(error.site, item, samples=length), length)
        item -= length
    return error
