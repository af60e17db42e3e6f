"""What arrives at a BatchNorm, batch after batch: small ones are reduced together."""

from __future__ import annotations

from collections import defaultdict

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


class Arrivals:
    """The activations that batches bring to BatchNorms, reduced to the moments of their samples.

    A single picture costs more calls than arithmetic. So activations of one shape wait for each
    other, until there are as many as a cache holds.

    Attributes:
        overwritten: one did not stay as it was until `statistics`, which are of no use then.
    """

    def __init__(self) -> None:
        self._reduced: dict[str, list[Samples]] = defaultdict(list)
        self._path = ""
        self._waiting: list[tuple[FedBatch, Tensor]] = []
        self._versions: list[int] = []
        self.overwritten = False

    def add(self, path: str, x: Tensor, batch: FedBatch) -> None:
        """Take what a BatchNorm got of a batch, (N, C, ...), of at least one element."""
        if self._waiting and not self._is_like_those_waiting(path, x):
            self._reduce()
        self._path = path
        self._waiting.append((batch, x))
        self._versions.append(version(x))
        if sum(waiting.numel() for _, waiting in self._waiting) + x.numel() > CACHED:
            self._reduce()

    def _is_like_those_waiting(self, path: str, x: Tensor) -> bool:
        other = self._waiting[0][1]
        return path == self._path and (
            (x.shape[1:], x.dtype, x.device) == (other.shape[1:], other.dtype, other.device)
        )

    def _reduce(self) -> None:
        batches, given = zip(*self._waiting, strict=True)
        self.overwritten |= self._versions != [version(x) for x in given]
        self._waiting, self._versions = [], []
        lengths = [len(x) for x in given]
        try:
            found = finite(torch.cat(given) if len(given) > 1 else given[0], self._path)
        except NonFiniteError as error:
            raise _placed(error, batches, lengths) from None
        parts = zip(found.mean.split(lengths), found.var.split(lengths), strict=True)
        self._reduced[self._path] += [Samples(found.size, mean, var) for mean, var in parts]

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
