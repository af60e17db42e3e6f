"""How sure the moments are: standard errors, and what `calibrate` reports of them.

Whether a sample is enough is asked in `rounds`, after some of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrofit.html_tables import Bar, html_table, of_largest, paragraph, view
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.moments import Moments
from retrofit.option_checks import check_number
from retrofit.tables import Table, counted, in_full, in_short, shortened

Array = npt.NDArray[Any]

PERCENTILE = 0.99
TOLERANCES = (0.01, 0.02, 0.05)
# Halves whose images come in no order differ by more than chance explains in so many samples.
FALSE_ALARMS = 0.01
# That matters from here on, in sigma: well-mixed samples of 256 pictures of the demo's network
# differ by 0.2, seldom more than 0.3; those sorted by class by 0.6 to 1.4.
DISAGREEMENT = 0.3
ALIKE = 1e-6  # sigma: images whose moments differ by no more are the same, but for rounding


@dataclass(frozen=True)
class SiteSample:
    """How well the sample tells the moments at one site, in standard deviations of a channel.

    The 99th percentile over the channels, and for the halves the worst channel too.

    Attributes:
        site: module path.
        mean_error, std_error: standard error of the mean and of the standard deviation.
        mean, mean_worst: difference of the means of the sample's two halves.
        std, std_worst: difference of their standard deviations.
        largest_z: the largest of these differences of all channels, in standard errors of the
            difference.
        channels, constant: how many there are, and how many did not vary on the sample.
    """

    site: str
    mean_error: float
    std_error: float
    mean: float
    mean_worst: float
    std: float
    std_worst: float
    largest_z: float = 0.0
    channels: int = 0
    constant: int = 0

    @property
    def error(self) -> float:
        """The larger of the two standard errors."""
        return max(self.mean_error, self.std_error)

    @property
    def disagreement(self) -> float:
        """The larger of the differences of the halves' means and standard deviations."""
        return max(self.mean, self.std)

    def __repr__(self) -> str:
        halves = f"halves differ by {self.mean:.3f} and {self.std:.3f} sigma"
        errors = f"standard errors {self.mean_error:.3f} of mean, {self.std_error:.3f} of std"
        constant = f"; {self.constant} of {self.channels} channels constant" * bool(self.constant)
        return in_short(self, f"{shortened(self.site)}: {errors}; {halves}{constant}")

    def __str__(self) -> str:
        return in_full(self)


@dataclass(frozen=True)
class Calibration:
    """What one call of `calibrate` did, and whether its sample was enough.

    Attributes:
        images, batches, seconds: how many, and how long it took.
        waited: how many of the seconds were spent waiting for data.
        standard_error: the larger of the standard errors of mean and standard deviation, in
            standard deviations of the channel: 99 % of all channels have less. They are estimated
            over images, since the pixels of one are no independent samples. Infinity where no site
            saw two images that differ.
        sites: the same for each site in order, and how far the two halves of the sample disagree;
            without those that saw less than two samples.
    """

    images: int
    batches: int
    seconds: float
    waited: float
    standard_error: float
    sites: tuple[SiteSample, ...]

    @property
    def disagreement(self) -> float:
        """The larger of mean and std disagreement (99th percentile) at the worst site, in sigma."""
        return max((s.disagreement for s in self.sites), default=0.0)

    @property
    def disordered(self) -> SiteSample | None:
        """The site where the halves differ most, if images in random order seldom differ so.

        That is by more than 0.3 sigma for 1 % of the channels, and by more standard errors than
        chance explains: with images in random order a difference of the halves exceeds z standard
        errors with a probability of at most about 2 exp(-z²/2), however the images are distributed
        (Hoeffding, 1963, for signs at random). Over the means and standard deviations of all
        channels together that makes one false alarm in a hundred samples at most.
        """
        tests = 2 * sum(site.channels - site.constant for site in self.sites)
        z = math.sqrt(2 * math.log(2 * max(tests, 1) / FALSE_ALARMS))
        unlike = [s for s in self.sites if s.largest_z > z and s.disagreement > DISAGREEMENT]
        return max(unlike, key=lambda s: s.disagreement, default=None)

    def images_needed(self, tolerance: float) -> float:
        """Estimate how many images bring `standard_error` down to `tolerance`.

        By the law that it falls with the square root of the number of images, which holds for
        images in random order. Infinity where the standard error is not known.
        """
        check_number("tolerance", tolerance, "be positive", lambda t: t > 0)
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
        return (
            f"{Table(head, rows, right=head[1:])}\n"
            f"{self.images} images in {self.seconds:.1f} s "
            f"({self.images / max(self.seconds, 1e-9):.1f} images/s, "
            f"{self.waited / max(self.seconds, 1e-9):.0%} of the time waiting for data)\n"
            f"standard error of 99 % of the channels: at most {self.standard_error:.2%} of sigma; "
            f"{self._needed()}"
        )

    def __repr__(self) -> str:
        told = [self._took(), self._error()]
        if worst := self.disordered:
            apart = f"{worst.disagreement:.2f} sigma at {shortened(worst.site)}"
            told.append(f"its halves differ by {apart}: shuffle")
        elif self.sites:
            worst = max(self.sites, key=lambda site: site.error)
            told.append(f"{counted(len(self.sites), 'layer')}, highest at {shortened(worst.site)}")
        return in_short(self, "; ".join([*told, "print it for all"]))

    def _repr_html_(self) -> str:
        """Show itself in a notebook: the standard errors by layer, with bars."""
        errors = [s.error for s in self.sites]
        rows = [
            (
                s.site,
                Bar(f"{s.error:.2%}", of_largest(s.error, errors)),
                f"{s.mean:.3f}",
                f"{s.std:.3f}",
                f"{s.constant} of {s.channels}",
            )
            for s in self.sites
        ]
        head = ("layer", "standard error", "halves differ: mean", "std", "constant channels")
        took = f"Calibration on {self._took()}"
        caption = f"{took}: {self._error()} (bars: against the highest)"
        worst, said = self.disordered, self._needed()
        if worst:
            said += f". The two halves differ by more than chance explains, most at {worst.site}"
        return view(html_table(caption, head, rows, right=head[1:]), paragraph(said))

    def _took(self) -> str:
        return f"{counted(self.images, 'image')} in {self.batches:,} batches"

    def _error(self) -> str:
        known = math.isfinite(self.standard_error)
        error = f"at most {self.standard_error:.2%} of sigma" if known else "not known"
        return f"standard error of 99 % of the channels {error}"

    def _needed(self) -> str:
        needed = ", ".join(f"{t:.0%}: {self.images_needed(t):,}" for t in TOLERANCES)
        return f"images needed for {needed}"


class ChannelErrors(NamedTuple):
    """Standard errors of channels, (C,) each, on the CPU.

    `sigma` is the standard deviation. `known` tells the channels that have seen two samples, `live`
    those of them that vary, by more than float32 rounds a constant. `mean` and `std` are the
    standard errors of these, in sigma; 0 elsewhere.
    """

    sigma: Tensor
    known: Tensor
    live: Tensor
    mean: Tensor
    std: Tensor


def channel_errors(statistics: ChannelStatistics, images: int) -> ChannelErrors:
    """Compute the standard errors of channels, of one site or of several."""
    samples, moments = statistics.samples.cpu(), statistics.moments()
    sigma, known = moments.var.sqrt(), samples > 1
    live = known & ~moments.constant
    # Several samples of one image (windows, or calls) are no independent ones. At worst they are
    # copies of each other.
    scale = (samples.double() / max(images, 1)).clamp(min=1).sqrt() / sigma
    mean, std = (torch.where(live, error * scale, 0.0) for error in statistics.standard_errors())
    return ChannelErrors(sigma, known, live, mean, std)


def standard_error(sites: Iterable[ChannelStatistics], images: int) -> float:
    """Compute the standard error that 99 % of all channels stay below, as in `Calibration`."""
    errors = [channel_errors(statistics, images) for statistics in sites]
    largest = [torch.maximum(found.mean, found.std)[found.known].numpy() for found in errors]
    found = _percentile(np.concatenate([*largest, np.zeros(0)]))
    return math.inf if found <= ALIKE else found  # one image over and over tells nothing


def site_samples(
    channels: Mapping[str, int], statistics: ChannelStatistics, images: int
) -> tuple[SiteSample, ...]:
    """Judge the sample of each site, those left out that saw less than two samples.

    Args:
        channels: the sites, in the order of their columns: path to C.
        statistics: of all of them.
        images: how many there were.
    """
    errors = channel_errors(statistics, images)
    halves = statistics.halves()
    rows = [errors.mean, errors.std, *_differences(*halves, errors)]
    ends = np.cumsum(list(channels.values()))[:-1]
    figures = np.split(torch.stack(rows).numpy(), ends, axis=1)
    cut = halves[1].count > 0
    known, live = (np.split(t.numpy(), ends) for t in (errors.known & cut, errors.live))
    return tuple(
        _site_sample(*one)
        for one in zip(channels, figures, known, live, strict=True)
        if one[2].any()
    )


def _site_sample(site: str, figures: Array, known: Array, live: Array) -> SiteSample:
    """Summarise the channels of a site, (5, C)."""
    channels, constant = int(known.sum()), int((known & ~live).sum())
    if channels == constant:
        return SiteSample(site, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, channels, constant)
    mean_error, std_error = figures[:2, known]
    mean, std, z = figures[2:, known & live]
    return SiteSample(
        site,
        mean_error=_percentile(mean_error),
        std_error=_percentile(std_error),
        mean=_percentile(mean),
        mean_worst=float(mean.max()),
        std=_percentile(std),
        std_worst=float(std.max()),
        largest_z=float(z.max()),
        channels=channels,
        constant=constant,
    )


def _differences(
    first: Moments, second: Moments, errors: ChannelErrors
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare two halves: means and deviations in sigma, and the larger in standard errors.

    The standard error of a difference is that of all, times N / sqrt(N1 N2), N = N1 + N2. For the
    latter squared deviations from the mean of all are compared: unlike standard deviations they are
    means.
    """
    total = (first.count + second.count).clamp(min=1)
    common = (first.mean * first.count + second.mean * second.count) / total
    squares = [half.var + (half.mean - common).square() for half in (first, second)]
    mean = (first.mean - second.mean).abs() / errors.sigma
    std = (first.var.sqrt() - second.var.sqrt()).abs() / errors.sigma
    var = (squares[0] - squares[1]).abs() / (2 * errors.sigma.square())
    share = (first.count * second.count).sqrt() / total
    z = torch.maximum(_ratio(mean, errors.mean), _ratio(var, errors.std)) * share
    return mean, std, z


def _ratio(difference: Tensor, error: Tensor) -> Tensor:
    """Divide; 0 where no image differs from another."""
    found = difference / error
    return found.where(found.isfinite(), 0.0)


def _percentile(values: Array) -> float:
    return float(np.quantile(values, PERCENTILE)) if len(values) else 0.0
