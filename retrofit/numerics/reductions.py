"""An activation reduced to one mean and one variance for each sample and channel.

Float32 adds up no more than a few hundred elements at a time; the rest is float64. Both memory
formats are read as they lie. A sample's result depends on that sample alone, so neither on the
batch that it came in nor on its place there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.errors import NonFiniteError
from retrofit.numerics.threads import threads_for

# Elements of a channel that a naive sum in float32 may add up. The rounding errors of many such
# stretches average out: at a mean of 100 sigma, 50,000 elements give it to 1e-5 sigma.
STRETCH, SHORT = 256, 16  # shorter ones are not worth it
# Elements from which a sample is worth calls of its own, and how many at once fit a cache.
LARGE, CACHED = 1 << 15, 1 << 19


class Samples(NamedTuple):
    """N samples, each with `size` elements in each of C channels.

    `mean` and `var` (the mean squared deviation from it) are (N, C): float64, but where one kernel
    gives them in the precision of its sums.
    """

    size: int
    mean: Tensor
    var: Tensor

    @property
    def finite(self) -> bool:
        """Whether there is no NaN or Inf."""
        return bool((self.mean.abs() + self.var).sum().isfinite())


def reduced(x: Tensor) -> Samples:
    """Reduce (N, C, ...) over all axes but the first two.

    float16 and bfloat16 are read as float32; float64 is reduced in float64.
    """
    if x.dim() == 2:
        # A copy: what is read may be overwritten by a layer that works in place.
        mean = x.clone() if x.device.type == "mps" else x.to(torch.float64, copy=True)
        return Samples(1, mean, torch.zeros_like(mean))
    if x.device.type != "cpu":
        return _in_one_call(x)
    rows = x.movedim(1, -1)
    with threads_for(x[0].numel()):
        if rows.is_contiguous():
            return _rows(rows.view(len(x), -1, x.shape[1]))
        return _two_passes(x.flatten(2), axis=2)


def finite(x: Tensor, site: str) -> Samples:
    """Reduce (N, C, ...) and check for NaN and Inf: NonFiniteError with the site and the sample."""
    samples = reduced(x)
    if samples.finite:
        return samples
    sound = x.isfinite().flatten(1).all(1)
    if not bool(sound.all()):
        raise NonFiniteError(site, int((~sound).nonzero()[0]), samples=len(x))
    return reduced(x.double())  # the squares overflowed float32


def _in_one_call(x: Tensor) -> Samples:
    """Reduce with the one kernel that every backend has."""
    var, mean = torch.var_mean(_wide(x), tuple(range(2, x.dim())), correction=0)
    return Samples(x.numel() // max(1, mean.numel()), mean, var)


def _rows(x: Tensor) -> Samples:
    """Reduce (N, L, C), channels adjacent in memory: large samples in stretches of rows."""
    samples, length, channels = x.shape
    piece = _divisor(length, CACHED // channels)
    stretches = piece // _divisor(piece, STRETCH)
    if length * channels < LARGE or piece // stretches < SHORT:
        return _two_passes(x, axis=1)
    # One call reduces k stretches: rows of k * C, so that a stretch has every k-th row.
    pieces = x.view(-1, piece // stretches, stretches * channels).unbind()
    # The last ones are still in the cache.
    found = [torch.batch_norm_update_stats(_wide(p), None, None, 0.0) for p in reversed(pieces)]
    mean, var = (torch.stack(t[::-1]).view(samples, -1, channels) for t in zip(*found, strict=True))
    mean = mean.double()
    centre = mean.mean(1, keepdim=True)
    return Samples(length, centre.squeeze(1), (mean - centre).square_().add_(var).mean(1))


@functools.lru_cache
def _divisor(number: int, most: int) -> int:
    """Find the largest divisor of a number that is no larger than `most`, or 1."""
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)


def _two_passes(x: Tensor, axis: int) -> Samples:
    """Reduce three axes over one of them, by the corrected two-pass algorithm."""
    length = x.shape[axis]
    means, variances = [], []
    for group in x.split(max(1, CACHED // max(1, x[0].numel()))):
        wide = _wide(group)
        mean = wide.mean(axis, keepdim=True)
        deviation = wide - mean
        rest = deviation.sum(axis).double() / length  # what the rounding of the mean left over
        squares = deviation.square_().sum(axis).double()
        variances.append(squares / length - rest.square())
        means.append(mean.squeeze(axis) + rest)
    if len(means) == 1:
        return Samples(length, means[0], variances[0])
    return Samples(length, torch.cat(means), torch.cat(variances))


def _wide(x: Tensor) -> Tensor:
    """Read float16 and bfloat16 as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
