"""Mean and variance of channels, and the formulas that merge those of disjoint samples.

Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", in float64: so a
result depends neither on the batch size nor, to about 1e-7 sigma, on the order of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from retrofit.tables import in_short

CONSTANT = 1e-6  # sigma / mean


class ChannelMoments(NamedTuple):
    """Mean and unbiased variance of each channel of one site, float64 (C,) on the CPU."""

    mean: Tensor
    var: Tensor

    def __repr__(self) -> str:
        spans = (
            f"{name} {float(values.min()):.3g} to {float(values.max()):.3g}"
            for name, values in zip(self._fields, self, strict=True)
            if len(values)
        )
        return in_short(self, f"{len(self.mean)} channels: {', '.join(spans)}")

    def __str__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean!r}, var={self.var!r})"


@dataclass(frozen=True)
class Moments:
    """Moments of channels: three float64 tensors of one shape, (C,) or (rows, C).

    Attributes:
        count: elements behind each channel, images times pixels; 0 where nothing was seen.
        mean: their mean.
        M2: the sum of their squared deviations from it.
    """

    count: Tensor
    mean: Tensor
    M2: Tensor

    @property
    def var(self) -> Tensor:
        """Unbiased variance, as torch's running_var has it; 0 for a single element."""
        return self.M2 / (self.count - 1).clamp(min=1)

    @property
    def constant(self) -> Tensor:
        """Which channels do not vary by more than float32 rounds a constant."""
        return self.var.sqrt() <= CONSTANT * self.mean.abs()

    def rows(self, first: int, end: int) -> Moments:
        """Take the rows from `first` up to `end`, exclusive."""
        return Moments(self.count[first:end], self.mean[first:end], self.M2[first:end])

    def where(self, chosen: Tensor) -> Moments:
        """Empty all but the chosen ones."""
        return Moments(self.count * chosen, self.mean, self.M2 * chosen)


def merged(rows: Moments) -> Moments:
    """Merge the moments of disjoint samples, (rows, C), into those of all, (C,).

    The squared deviations within each sample, plus those of the samples' means from the common one.
    """
    count = rows.count.sum(0)
    mean = (rows.count / count.clamp(min=1) * rows.mean).sum(0)
    between = (rows.count * (rows.mean - mean).square()).sum(0)
    return Moments(count, mean, rows.M2.sum(0) + between)


def pooled(one: Moments, other: Moments) -> Moments:
    """Merge the moments of two disjoint samples, channel by channel."""
    count = one.count + other.count
    share = other.count / count.clamp(min=1)
    difference = other.mean - one.mean
    between = difference.square() * one.count * share
    return Moments(count, one.mean + difference * share, one.M2 + other.M2 + between)
