"""All that is known of any number of channels: their moments, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from retrofit.numerics.batch_table import BatchTable
from retrofit.numerics.moments import Moments, merged, pooled
from retrofit.numerics.threads import threads_for

STRETCHES = 16
STRETCHED = ("count", "mean", "M2")


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of C channels, those of one site or of many side by side. It never changes.

    The data is kept as up to 16 consecutive stretches, so that its beginning can be compared with
    its end. For standard errors it is kept how samples differ: pixels of one image resemble each
    other, so that images, not pixels, are the independent samples. Of each there are two figures
    per channel, its mean a and its mean square b, both about `centre`, weighted with the square of
    the sample's number of elements, as their errors are in the moments of all.

    Attributes:
        lengths: (16,) int64, on the CPU whatever the device; samples in each stretch, of the
            site that has the most.
        count, mean, M2: (16, C); the moments of each stretch.
        samples, batches: (C,) int64; how many of each have been added.
        weight: (C,); sum of the weights of the samples.
        centre: (C,); any values near the mean of the channels.
        spread: (5, C); the means of a and b, and the sums of aa, ab and bb about those.
    """

    lengths: Tensor
    count: Tensor
    mean: Tensor
    M2: Tensor
    samples: Tensor
    batches: Tensor
    weight: Tensor
    centre: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> ChannelStatistics:
        """Begin with nothing."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            lengths=torch.zeros(STRETCHES, dtype=torch.int64, device="cpu"),
            count=zeros(STRETCHES, channels),
            mean=zeros(STRETCHES, channels),
            M2=zeros(STRETCHES, channels),
            samples=zeros(channels, dtype=torch.int64),
            batches=zeros(channels, dtype=torch.int64),
            weight=zeros(channels),
            centre=zeros(channels),
            spread=zeros(5, channels),
        )

    def tensors(self) -> dict[str, Tensor]:
        """List the fields by name; `ChannelStatistics(**tensors)` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | None) -> ChannelStatistics:
        """Move everything but `lengths` to a device."""
        if device is None or self.mean.device == device:
            return self
        moved = {name: t.to(device) for name, t in self.tensors().items() if name != "lengths"}
        return replace(self, **moved)

    def columns(self, first: int, end: int) -> ChannelStatistics:
        """Take the channels from `first` up to `end`, exclusive."""
        tables = {name: table for name, table in self.tensors().items() if name != "lengths"}
        return replace(self, **{name: t[..., first:end].clone() for name, t in tables.items()})

    def add(self, batch: BatchTable) -> ChannelStatistics:
        """Add one batch, with the columns of these channels.

        The first batch counts as two stretches, so that even a single one has two halves.
        """
        known, rows = self.to(batch.rows.mean.device), batch.rows
        with threads_for(0):
            parts = [(rows, sum(batch.lengths))] if self.lengths[0] else batch.halves()
            for part, samples in parts:
                known = known._appended(merged(part), samples)._compared(part)
            return replace(known, batches=known.batches + (rows.count > 0).any(0))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Merge with the statistics of later data, about this centre (Chan et al., weighted)."""
        if not other.lengths[0]:
            return self
        other = other.to(self.mean.device)
        if not self.lengths[0]:
            return other
        used, more = int((self.lengths > 0).sum()), int((other.lengths > 0).sum())
        lengths, *tables = (
            torch.cat([getattr(self, name)[:used], getattr(other, name)[:more]])
            for name in ("lengths", *STRETCHED)
        )
        stretches = Moments(*tables)
        while len(lengths) > STRETCHES:
            lengths, stretches = _paired(lengths, stretches)
        joined = self._with_stretches(lengths.tolist(), stretches)
        centre = self.centre.where(self.weight > 0, other.centre)
        return replace(
            joined,
            samples=self.samples + other.samples,
            batches=self.batches + other.batches,
            weight=self.weight + other.weight,
            centre=centre,
            spread=_pooled_spread(
                self.weight,
                _recentred(self.spread, centre - self.centre),
                other.weight,
                _recentred(other.spread, centre - other.centre),
            ),
        )

    def moments(self) -> Moments:
        """Compute the moments of everything added, on the CPU; count is 0 where nothing was."""
        return merged(self._stretches(0, STRETCHES))

    def halves(self) -> tuple[Moments, Moments]:
        """Compute the moments of the first and second half of the data, as nearly as kept.

        They are on the CPU. The second has a count of 0 for channels of fewer than two samples.
        """
        stretches = self._stretches(0, STRETCHES)
        so_far = stretches.count.cumsum(0)
        total = so_far[-1]
        cuts = (so_far > 0) & (so_far < total)
        cut = (so_far - total / 2).abs().where(cuts, torch.inf).argmin(0)
        early = torch.arange(STRETCHES, device="cpu").unsqueeze(1) <= cut
        early |= ~cuts.any(0)
        return merged(stretches.where(early)), merged(stretches.where(~early))

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Estimate the standard errors of mean and standard deviation, (C,) each, on the CPU.

        The mean is a ratio of sums over samples, and the variance nearly one, so that their errors
        are those of a ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4); the error
        of sigma is that of its square, divided by 2 sigma. 0 for a constant channel; infinity for
        one of fewer than two samples.
        """
        own = self.to(torch.device("cpu"))
        moments = own.moments()
        count = moments.count.clamp(min=1)
        d = moments.mean - own.centre
        var = moments.M2 / count
        a, b, aa, ab, bb = own.spread
        of_mean = aa + own.weight * (a - d).square()
        square = b - 2 * d * a + d * d  # about the mean, for each sample
        of_square = bb - 4 * d * (ab - d * aa) + own.weight * (square - var).square()
        samples = own.samples.double()
        scale = (samples / (samples - 1).clamp(min=1)).sqrt() / count
        mean, square_error = (x.clamp(min=0).sqrt() for x in (of_mean, of_square))
        sigma = var.sqrt()
        std = torch.where(sigma > 0, square_error / (2 * sigma), 0.0)
        unknown = samples < 2
        return (
            torch.where(unknown, torch.inf, mean * scale),
            torch.where(unknown, torch.inf, std * scale),
        )

    def _stretches(self, first: int, end: int) -> Moments:
        """Take some stretches to the CPU: a GPU takes longer for each of the small steps."""
        return Moments(*(t[first:end].cpu() for t in (self.count, self.mean, self.M2)))

    def _appended(self, new: Moments, samples: int) -> ChannelStatistics:
        """Add to the last stretch while that is shorter than the first, else begin another."""
        lengths = self.lengths.tolist()
        row = sum(length > 0 for length in lengths)
        stretches = Moments(self.count, self.mean, self.M2)
        if row and lengths[row - 1] < lengths[0]:
            row -= 1
            samples += lengths[row]
            new = pooled(Moments(self.count[row], self.mean[row], self.M2[row]), new)
        elif row == STRETCHES:
            row //= 2
            paired_lengths, stretches = _paired(self.lengths, stretches)
            lengths = paired_lengths.tolist()
        last = Moments(*(t.unsqueeze(0) for t in (new.count, new.mean, new.M2)))
        return self._with_stretches([*lengths[:row], samples], stretches.rows(0, row), last)

    def _with_stretches(self, lengths: list[int], *parts: Moments) -> ChannelStatistics:
        """Replace the stretches; those that are missing are empty."""
        free = STRETCHES - len(lengths)
        none = torch.zeros_like(self.mean[:free])
        whole = [*parts, Moments(none, none, none)]
        return replace(
            self,
            lengths=torch.tensor([*lengths, *[0] * free], device="cpu"),
            **{name: torch.cat([getattr(p, name) for p in whole]) for name in STRETCHED},
        )

    def _compared(self, rows: Moments) -> ChannelStatistics:
        """Note how the samples of a batch differ from each other and from the earlier ones."""
        weights = rows.count.square()
        weight = weights.sum(0)
        first = (weights * rows.mean).sum(0) / weight.clamp(min=1)
        centre = self.centre.where(self.weight > 0, first)
        a = rows.mean - centre
        b = rows.M2 / rows.count.clamp(min=1) + a.square()
        figures = torch.stack([a, b])  # (2, N, C)
        means = (weights * figures).sum(1) / weight.clamp(min=1)
        a, b = figures - means.unsqueeze(1)
        sums = (weights * torch.stack([a * a, a * b, b * b])).sum(1)
        spread = torch.cat([means, sums])
        return replace(
            self,
            samples=self.samples + (rows.count > 0).sum(0),
            weight=self.weight + weight,
            centre=centre,
            spread=_pooled_spread(self.weight, self.spread, weight, spread),
        )


def _paired(lengths: Tensor, rows: Moments) -> tuple[Tensor, Moments]:
    """Halve the number of stretches by taking neighbours together; an odd last one stays."""
    even, odd = (
        Moments(r.count[k::2], r.mean[k::2], r.M2[k::2]) for r, k in ((rows, 0), (rows, 1))
    )
    pairs = len(odd.mean)
    both = pooled(even.rows(0, pairs), odd)
    alone = even.rows(pairs, pairs + 1)
    sums = lengths[::2].clone()
    sums[:pairs] += lengths[1::2]
    tables = zip((both.count, both.mean, both.M2), (alone.count, alone.mean, alone.M2), strict=True)
    return sums, Moments(*(torch.cat(pair) for pair in tables))


def _recentred(spread: Tensor, d: Tensor) -> Tensor:
    """Re-centre a spread: `d` is the new centre less the old one."""
    a, b, aa, ab, bb = spread
    return torch.stack(
        (a - d, b - 2 * d * a + d * d, aa, ab - 2 * d * aa, bb - 4 * d * (ab - d * aa))
    )


def _pooled_spread(weight: Tensor, one: Tensor, more: Tensor, other: Tensor) -> Tensor:
    """Merge two spreads about one centre, of these weights: Chan's formula with weights."""
    share = more / (weight + more).clamp(min=1)
    a, b = difference = other[:2] - one[:2]
    between = torch.stack([a * a, a * b, b * b]) * (weight * share)
    return torch.cat([one[:2] + difference * share, one[2:] + other[2:] + between])
