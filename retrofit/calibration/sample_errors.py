"""How sure the moments are: standard errors, and what `calibrate` reports of them.

Whether a sample is enough is asked in `rounds`, after some of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.errors import NeitherTrueNorFalse
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.tables import table

PERCENTILE = 0.99
TOLERANCES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class SiteSample:
    """How well the sample tells the moments at one site, in standard deviations of a channel.

    The 99th percentile over the channels, and for the halves the worst channel too.

    Attributes:
        site: module path.
        mean_error, std_error: standard error of the mean and of the standard deviation.
        mean, mean_worst: difference of the means of the sample's two halves.
        std, std_worst: difference of their standard deviations.
    """

    site: str
    mean_error: float
    std_error: float
    mean: float
    mean_worst: float
    std: float
    std_worst: float


@dataclass(frozen=True)
class Calibration(NeitherTrueNorFalse):
    """What one call of `calibrate` did, and whether its sample was enough.

    Attributes:
        images, batches, seconds: how many, and how long it took.
        waited: how many of the seconds were spent waiting for data.
        standard_error: the larger of the standard errors of mean and standard deviation, in
            standard deviations of the channel: 99 % of all channels have less. They are estimated
            over images, since the pixels of one are no independent samples. Infinity where no site
            saw two images.
        sites: the same for each site in order, and how far the two halves of the sample disagree;
            without those that saw less than two samples.
    """

    images: int
    batches: int
    seconds: float
    waited: float
    standard_error: float
    sites: tuple[SiteSample, ...]
    ask_for = "its standard_error or images_needed(tolerance)"

    @property
    def disagreement(self) -> float:
        """The larger of mean and std disagreement (99th percentile) at the worst site, in sigma."""
        return max((max(s.mean, s.std) for s in self.sites), default=0.0)

    def images_needed(self, tolerance: float) -> float:
        """Estimate how many images bring `standard_error` down to `tolerance`.

        By the law that it falls with the square root of the number of images, which holds for
        images in random order. Infinity where the standard error is not known.
        """
        if math.isinf(self.standard_error):
            return math.inf
        return math.ceil(self.images * (self.standard_error / tolerance) ** 2)

    def __str__(self) -> str:
        names = ("mean_error", "std_error", "mean", "mean_worst", "std", "std_worst")
        rows = [(s.site, *(f"{getattr(s, name):.3f}" for name in names)) for s in self.sites]
        head = (
            "in sigma, p99",
            "error of mean",
            "of std",
            "halves: mean",
            "worst",
            "std",
            "worst ",
        )
        needed = ", ".join(f"{t:.0%}: {self.images_needed(t):,}" for t in TOLERANCES)
        return (
            f"{table(head, rows, right=','.join(head[1:]))}\n"
            f"{self.images} images in {self.seconds:.1f} s "
            f"({self.images / max(self.seconds, 1e-9):.1f} images/s, "
            f"{self.waited / max(self.seconds, 1e-9):.0%} of the time waiting for data)\n"
            f"standard error of 99 % of the channels: at most {self.standard_error:.2%} of sigma; "
            f"images needed for {needed}"
        )


class ChannelErrors(NamedTuple):
    """Standard errors of channels, (C,) each, on the CPU.

    `sigma` is the standard deviation, `live` tells the channels that vary, by more than float32
    rounds a constant. `mean` and `std` are the standard errors of these, in sigma; 0 elsewhere.
    """

    sigma: Tensor
    live: Tensor
    mean: Tensor
    std: Tensor


def channel_errors(statistics: ChannelStatistics, images: int) -> ChannelErrors:
    """Compute the standard errors of the channels that have seen at least two samples."""
    known = (statistics.samples > 1).cpu()
    errors = [error[known] for error in statistics.standard_errors()]
    moments = statistics.moments()
    sigma, live = moments.var.sqrt()[known], ~moments.constant[known]
    # Several samples of one image (windows, or calls) are no independent ones. At worst they are
    # copies of each other.
    copies = statistics.samples.cpu()[known].double() / max(images, 1)
    scale = copies.clamp(min=1).sqrt()
    mean, std = (torch.where(live, error * scale / sigma, 0.0) for error in errors)
    return ChannelErrors(sigma, live, mean, std)


def standard_error(sites: Iterable[ChannelStatistics], images: int) -> float:
    """Compute the standard error that 99 % of all channels stay below, as in `Calibration`."""
    errors = [channel_errors(statistics, images) for statistics in sites]
    largest = [torch.maximum(found.mean, found.std) for found in errors if len(found.mean)]
    return _percentile(torch.cat(largest)) if largest else math.inf


def site_sample(site: str, statistics: ChannelStatistics, images: int) -> SiteSample | None:
    """Judge the sample of one site; None where it saw less than two samples."""
    halves = statistics.halves()
    errors = channel_errors(statistics, images)
    if halves is None or not len(errors.live):
        return None
    if not bool(errors.live.any()):
        return SiteSample(site, *[0.0] * 6)
    first, second = halves
    sigma = errors.sigma[errors.live]
    mean = (first.mean - second.mean)[errors.live].abs() / sigma
    std = (first.var.sqrt() - second.var.sqrt())[errors.live].abs() / sigma
    figures = [_percentile(errors.mean), _percentile(errors.std)]
    for difference in (mean, std):
        figures += [_percentile(difference), float(difference.max())]
    return SiteSample(site, *figures)


def _percentile(values: Tensor) -> float:
    return float(values.quantile(PERCENTILE))
