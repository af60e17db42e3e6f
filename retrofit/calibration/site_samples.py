"""What one batch gives at each site, until it is added to the statistics as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.reductions import Samples, finite, reduced


class SiteSamples:
    """The activations of one batch, each reduced to the moments of its samples.

    Args:
        channels: the sites, in the order of their columns in the statistics: path to C.

    Attributes:
        checks: look for NaN and Inf at once, and name the site; else `are_finite` tells.
        length: samples in the first activation that was seen; 0 before.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.channels = channels
        self.checks = True
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self.calls = self._no_calls()
        self.length = 0

    def _no_calls(self) -> dict[str, list[Samples]]:
        return {site: [] for site in self.channels}

    def take(self, site: str, x: Tensor) -> None:
        """Reduce an activation, (N, C, ...), of at least one element.

        Raises NonFiniteError where `checks` asks for it.
        """
        self.length = self.length or len(x)
        self.calls[site].append(finite(x, site) if self.checks else reduced(x))

    def are_finite(self) -> bool:
        """Tell whether no NaN or Inf came to any site, in one read."""
        calls = [call for calls in self.calls.values() for call in calls]
        if not calls:
            return True
        sums = [call.checksum() for call in calls]
        return bool(torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all())

    def added_to(self, statistics: ChannelStatistics) -> ChannelStatistics:
        """Add the batch to `statistics`, and forget what it gave; `length` stays."""
        calls, self.calls = self.calls, self._no_calls()
        present = [call for found in calls.values() for call in found]
        if not present:
            return statistics
        none = {
            site: Samples(1, *[present[0].mean.new_empty(0, channels)] * 2)
            for site, channels in self.channels.items()
        }
        return statistics.add([found or [none[site]] for site, found in calls.items()])

    def split(self, statistics: ChannelStatistics) -> dict[str, ChannelStatistics]:
        """Give each site its columns of `statistics`."""
        found, first = {}, 0
        for site, channels in self.channels.items():
            found[site] = statistics.columns(first, first + channels)
            first += channels
        return found
