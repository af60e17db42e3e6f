"""Exact streaming moments of every channel, and how far they can be trusted.

Samples, stretches of data and the data of several processes are merged in float64 with the formula
of Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance". So the result
depends neither on the batch size nor, to about 1e-7 sigma, on the order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.reductions import Samples

CONSTANT = 1e-6  # sigma / mean


@dataclass(frozen=True)
class Moments:
    """Moments of C channels: `mean` and `M2` (sum of squared deviations), float64 of shape (C,).

    `count` is the number of elements behind each channel: images times pixels.
    """

    count: float
    mean: Tensor
    M2: Tensor

    @property
    def var(self) -> Tensor:
        """Unbiased variance, as torch's running_var has it; 0 for a single element."""
        return self.M2 / max(self.count - 1, 1)

    @property
    def constant(self) -> Tensor:
        """(C,), which channels do not vary by more than float32 rounds a constant."""
        return self.var.sqrt() <= CONSTANT * self.mean.abs()


def merge(counts: Tensor, means: Tensor, M2s: Tensor) -> Moments:
    """The moments of R disjoint samples taken together: (R,), (R, C), (R, C) in float64.

    Chan, Golub and LeVeque (1983), for many samples at once: the squared deviations within each
    sample, plus those of the samples' means from the common mean.
    """
    mean = ((counts / counts.sum()).unsqueeze(1) * means).sum(0)
    between = counts.unsqueeze(1) * (means - mean).square()
    return Moments(float(counts.sum()), mean, M2s.sum(0) + between.sum(0))


# For every batch, where its activations are. Counts stay numbers: a GPU would wait for tensors.


def pooled(one: Moments, other: Moments) -> Moments:
    """The moments of two disjoint samples taken together, where the first are."""
    count = one.count + other.count
    difference = other.mean.to(one.mean.device) - one.mean
    mean = one.mean + difference * (other.count / count)
    between = difference.square() * (one.count * other.count / count)
    return Moments(count, mean, one.M2 + other.M2.to(one.M2.device) + between)


def together(samples: Samples) -> Moments:
    """The moments of all samples of an activation."""
    size, means, M2s = samples
    mean = means.mean(0)
    between = (means - mean).square().sum(0) * float(size)
    return Moments(float(size * len(means)), mean, M2s.sum(0) + between)


@dataclass(frozen=True)
class Spread:
    """How samples differ from each other: what the standard errors of their moments come from.

    Pixels of one image resemble each other, so that images, not pixels, are the independent
    samples. Of each there are two figures per channel, its mean a and its mean square b, both
    about `centre`. They are weighted with the square of the sample's number of elements, as their
    errors are in the moments of all.

    Attributes:
        samples: how many.
        weight: sum of the weights.
        centre: (C,); any values near the mean of the channels.
        table: (5, C); the means of a and b, and the sums of aa, ab and bb about those.
    """

    samples: int
    weight: float
    centre: Tensor
    table: Tensor

    def moved(self, centre: Tensor) -> Spread:
        """The same about another centre."""
        if centre is self.centre:
            return self
        d = centre - self.centre
        a, b, aa, ab, bb = self.table
        moved = (a - d, b - 2 * d * a + d * d, aa, ab - 2 * d * aa, bb - 4 * d * (ab - d * aa))
        return Spread(self.samples, self.weight, centre, torch.stack(moved))

    def plus(self, other: Spread) -> Spread:
        """Of both together, about the centre of this one: Chan's formula with weights."""
        one, two = self.table, other.moved(self.centre).table
        weight = self.weight + other.weight
        a, b = two[:2] - one[:2]
        between = torch.stack([a * a, a * b, b * b]) * (self.weight * other.weight / weight)
        means = one[:2] + (two[:2] - one[:2]) * (other.weight / weight)
        table = torch.cat([means, one[2:] + two[2:] + between])
        return Spread(self.samples + other.samples, weight, self.centre, table)

    def standard_errors(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Of the mean and of the standard deviation, both (C,), from at least two samples.

        `moments` are those of the same samples. The mean is a ratio of sums over samples, and the
        variance nearly one, so that their errors are those of a ratio estimator (Cochran, Sampling
        Techniques, 1977, section 6.4); the error of sigma is that of its square, divided by
        2 sigma. 0 for a constant channel.
        """
        d = moments.mean - self.centre
        var = moments.M2 / moments.count
        a, b, aa, ab, bb = self.table
        of_mean = aa + self.weight * (a - d).square()
        square = b - 2 * d * a + d * d  # about the mean, for each sample
        of_square = bb - 4 * d * (ab - d * aa) + self.weight * (square - var).square()
        scale = math.sqrt(self.samples / (self.samples - 1)) / moments.count
        errors = of_mean.clamp(min=0).sqrt() * scale, of_square.clamp(min=0).sqrt() * scale
        sigma = var.sqrt()
        return errors[0], torch.where(sigma > 0, errors[1] / (2 * sigma), 0.0)


def spread(samples: Samples, centre: Tensor | None = None) -> Spread:
    """How the samples of one activation differ, by default about their mean."""
    size, mean, M2 = samples
    centre = mean.mean(0) if centre is None else centre
    a = mean - centre
    figures = torch.stack([a, M2 / size + a.square()])  # (2, N, C)
    means = figures.mean(1)
    a, b = figures - means.unsqueeze(1)
    weight = float(size) ** 2
    sums = torch.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)]) * weight
    return Spread(len(mean), weight * len(mean), centre, torch.cat([means, sums]))


def stretches(rows: Sequence[Moments], most: int) -> list[Moments]:
    """Consecutive samples as at most `most`, by taking neighbours together."""
    merged = list(rows)
    while len(merged) > most:
        merged = [
            pooled(*pair) if len(pair) == 2 else pair[0]
            for pair in (merged[i : i + 2] for i in range(0, len(merged), 2))
        ]
    return merged
