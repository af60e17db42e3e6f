"""An activation reduced to one mean and one sum of squared deviations per sample and channel.

Float32 adds up no more than a few hundred elements at a time; the rest is float64. Both memory
formats are read as they lie. A sample's result depends on that sample alone, so neither on the
batch that it came in nor on its place there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.errors import NonFiniteError

# Elements of a channel that a naive sum in float32 may add up. The rounding errors of many such
# stretches average out: at a mean of 100 sigma, 50,000 elements give it to 1e-5 sigma.
STRETCH = 256
# Elements from which a sample is worth calls of its own, and how many at once fit a cache.
LARGE, CACHED = 1 << 16, 1 << 19


class Samples(NamedTuple):
    """N samples, each with `size` elements in each of C channels.

    `mean` and `M2` (sum of squared deviations from it) are float64 of shape (N, C).
    """

    size: int
    mean: Tensor
    M2: Tensor

    def checksum(self) -> Tensor:
        """Sum up to a scalar that is finite if all of them are."""
        return (self.mean.abs() + self.M2).sum()


def reduced(x: Tensor) -> Samples:
    """Reduce (N, C, ...) over all axes but the first two.

    float16 and bfloat16 are read as float32; float64 is reduced in float64.
    """
    if x.dim() == 2:
        mean = (x.cpu() if x.device.type == "mps" else x).double()
        return Samples(1, mean, torch.zeros_like(mean))
    rows = x.movedim(1, -1)
    if x.device.type != "cpu":
        return _in_one_call(x.flatten(2))
    if rows.is_contiguous():
        return _rows(rows.view(len(x), -1, x.shape[1]))
    return _two_passes(x.flatten(2), axis=2)


def finite(x: Tensor, site: str) -> Samples:
    """Reduce (N, C, ...) and check for NaN and Inf: NonFiniteError with the site and the sample."""
    samples = reduced(x)
    if bool(samples.checksum().isfinite()):
        return samples
    sound = x.isfinite().flatten(1).all(1)
    if not bool(sound.all()):
        raise NonFiniteError(site, int((~sound).nonzero()[0]), samples=len(x))
    return reduced(x.double())  # the squares overflowed float32


def _in_one_call(x: Tensor) -> Samples:
    """Reduce (N, C, L) with the one kernel that every backend has."""
    var, mean = torch.var_mean(_wide(x), 2, correction=0)
    if x.device.type == "mps":  # which has no float64
        var, mean = var.cpu(), mean.cpu()
    return Samples(x.shape[2], mean.double(), var.double() * x.shape[2])


def _rows(x: Tensor) -> Samples:
    """Reduce (N, L, C), channels adjacent in memory."""
    _, length, channels = x.shape
    if length <= STRETCH or length * channels < LARGE:
        return _two_passes(x, axis=1)
    block = max(STRETCH, CACHED // channels // STRETCH * STRETCH)
    counts: list[int] = []
    means, variances = [], []
    for sample in reversed(x.unbind()):  # the last ones are still in the cache
        parts = [part for rows in sample.split(block) for part in _folded(rows)]
        counts = [len(part) for part in parts for _ in range(part.shape[1] // channels)]
        pairs = [torch.batch_norm_update_stats(_wide(p), None, None, 0.0) for p in parts]
        means.append(torch.cat([mean for mean, _ in pairs]))
        variances.append(torch.cat([var for _, var in pairs]))
    shape = (len(x), len(counts), channels)
    mean, var = (torch.stack(t[::-1]).view(shape).double() for t in (means, variances))
    weight = torch.tensor(counts, dtype=torch.float64, device=mean.device).view(-1, 1)
    centre = (weight * mean).sum(1) / length
    within = var.add_((mean - centre.unsqueeze(1)).square_())
    return Samples(length, centre, (weight * within).sum(1))


def _folded(rows: Tensor) -> list[Tensor]:
    """View (R, C) as (R / k, k * C), for one call to reduce k stretches of each channel, and rest.

    A stretch takes every k-th row; fewer than k rows are left over. No copy is made.
    """
    length, channels = rows.shape
    k = max(1, length // STRETCH)
    whole = length // k * k
    parts = (rows[:whole].view(-1, k * channels), rows[whole:])
    return [part for part in parts if len(part)]


def _two_passes(x: Tensor, axis: int) -> Samples:
    """Reduce three axes over one of them, by the corrected two-pass algorithm."""
    length = x.shape[axis]
    means, M2s = [], []
    for group in x.split(max(1, CACHED // max(1, x[0].numel()))):
        wide = _wide(group)
        mean = wide.mean(axis, keepdim=True)
        deviation = wide - mean
        rest = deviation.sum(axis).double()  # what the rounding of the mean left over
        M2s.append(deviation.square_().sum(axis).double() - rest.square() / length)
        means.append(mean.squeeze(axis).double() + rest / length)
    return Samples(length, torch.cat(means), torch.cat(M2s))


def _wide(x: Tensor) -> Tensor:
    """Read float16 and bfloat16 as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
