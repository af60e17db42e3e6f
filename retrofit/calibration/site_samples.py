"""What one batch gives at each site, until it is added to the statistics as a whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from retrofit.numerics.batch_table import BatchTable
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.reductions import Samples, finite, reduced
from retrofit.running.remembered import Remembered


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
        self.length = 0
        self._expected: tuple[Remembered, Samples] | None = None
        self._forget_calls()

    def _forget_calls(self) -> None:
        self.calls: dict[str, list[Samples]] = {site: [] for site in self.channels}
        self._table: BatchTable | None = None

    def take(self, site: str, x: Tensor) -> None:
        """Reduce an activation, (N, C, ...), of at least one element.

        Raises NonFiniteError where `checks` asks for it.
        """
        self.length = self.length or len(x)
        found = finite(x, site) if self.checks else self._known(x) or reduced(x)
        self.calls[site].append(found)
        self._table = None

    def expect(self, x: Tensor, found: Samples) -> None:
        """Let `take` use what is known of x, if that comes next, and as it is now."""
        self._expected = Remembered(x), found

    def _known(self, x: Tensor) -> Samples | None:
        expected, self._expected = self._expected, None
        return expected[1] if expected is not None and expected[0].is_still(x) else None

    def are_finite(self) -> bool:
        """Tell whether no NaN or Inf came to any site, in one read."""
        table = self._side_by_side()
        return table is None or table.finite

    def added_to(self, statistics: ChannelStatistics) -> ChannelStatistics:
        """Add the batch to `statistics`, and forget what it gave; `length` stays."""
        table = self._side_by_side()
        self._forget_calls()
        return statistics if table is None else statistics.add(table)

    def _side_by_side(self) -> BatchTable | None:
        """Make the table of the batch, once; None where no site got anything."""
        some = next((calls[0].mean for calls in self.calls.values() if calls), None)
        if self._table is None and some is not None:
            none = {
                site: [Samples(1, *[some.new_empty(0, self.channels[site])] * 2)]
                for site, calls in self.calls.items()
                if not calls
            }
            self._table = BatchTable.of(list((self.calls | none).values()))
        return self._table

    def split(self, statistics: ChannelStatistics) -> dict[str, ChannelStatistics]:
        """Give each site its columns of `statistics`."""
        found, first = {}, 0
        for site, channels in self.channels.items():
            found[site] = statistics.columns(first, first + channels)
            first += channels
        return found
