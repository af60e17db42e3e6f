"""One batch as a table: a row for each sample, the channels of all sites side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.numerics.moments import Moments
from retrofit.numerics.reductions import Samples
from retrofit.numerics.threads import threads_for

Sites = Sequence[Sequence[Samples]]  # for each site, what each call of it in the batch gave


@dataclass(frozen=True)
class BatchTable:
    """What one batch gave at all sites: few operations, however many sites there are.

    Attributes:
        rows: (N, C). A site with fewer samples than others has rows of count 0 at the end.
        late: (N, C) bool; the samples in the second half of their call.
        lengths: samples in either half, of the site that has the most.
    """

    rows: Moments
    late: Tensor
    lengths: tuple[int, int]

    @classmethod
    def of(cls, sites: Sites) -> BatchTable:
        """Put the samples of all sites side by side, in the order of the sites."""
        length = max(sum(len(call.mean) for call in calls) for calls in sites)
        counts, late = np.zeros((length, len(sites))), np.zeros((length, len(sites)), bool)
        for column, calls in enumerate(sites):
            row = 0
            for call in calls:
                end = row + len(call.mean)
                counts[row:end, column] = call.size
                late[(row + end + 1) // 2 : end, column] = True
                row = end
        lengths = ((counts > 0) & ~late).sum(0).max(), ((counts > 0) & late).sum(0).max()
        widths = [calls[0].mean.shape[1] for calls in sites]
        with threads_for(0):
            mean = _joined([[call.mean for call in calls] for calls in sites], length)
            var = _joined([[call.var for call in calls] for calls in sites], length)
            count = torch.from_numpy(counts.repeat(widths, axis=1)).to(mean.device)
            second = torch.from_numpy(late.repeat(widths, axis=1)).to(mean.device)
            rows = Moments(count, mean, var.mul_(count))
        return cls(rows, second, (int(lengths[0]), int(lengths[1])))

    @property
    def finite(self) -> bool:
        """Whether there is no NaN or Inf, in one read."""
        return bool((self.rows.mean.abs() + self.rows.M2).sum().isfinite())

    def halves(self) -> Iterator[tuple[Moments, int]]:
        """Cut each call's samples into a first and a second half, which may be empty."""
        for chosen, samples in zip((~self.late, self.late), self.lengths, strict=True):
            if samples:
                yield self.rows.where(chosen), samples


def _joined(sites: list[list[Tensor]], length: int) -> Tensor:
    """Make one float64 table of the columns of each site; below their last rows they are 0."""
    columns = [calls[0] if len(calls) == 1 else torch.cat(calls) for calls in sites]
    device = columns[0].device
    full = [F.pad(c, (0, 0, 0, length - len(c))) if len(c) < length else c for c in columns]
    table = torch.cat([column.to(device) for column in full], 1)
    return (table.cpu() if device.type == "mps" else table).double()  # mps has no float64
