"""BatchNorms settled one after another, each fed by those that are settled already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from retrofit.adaptation.halted_sample import END, MIXED, HaltedSample
from retrofit.adaptation.norm_inputs import (
    Estimate,
    Measured,
    fed_by_all,
    hooked,
    measured,
    measured_by_all,
    other_data,
)
from retrofit.adaptation.running_statistics import Buffers, Norms, restore, settle
from retrofit.calibration.feeding import Fed, Feed
from retrofit.calibration.processes import Processes
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.running.modes import evaluating
from retrofit.running.progress import ProgressBar, progress_bar


class LayerByLayer:
    """Settles one BatchNorm after another, in eval mode: all batches come to it, and go on.

    A BatchNorm that is called again after it was settled is measured in a pass of its own, all its
    calls pooled, behind those before it, and the batches begin anew. Where the batches call
    BatchNorms in different orders, each has such a pass, in the order of the first calls; so it is
    where a batch comes upon what another has left, on the model or in memory that is used again.

    Args:
        model, norms: what is run, and its BatchNorms.
        old: the statistics that they had.
        feed: the batches.
        prior, processes, max_memory: as for `recalibrate`.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Norms,
        old: Mapping[str, Buffers],
        feed: Feed,
        prior: float,
        processes: Processes,
        max_memory: float | None,
    ) -> None:
        self.model, self.norms, self.old, self.feed = model, norms, old, feed
        self.prior, self.processes = prior, processes
        self.fed = Fed()
        self.measured: Measured = {}
        self.passes = 0
        self.max_memory = max_memory

    def run(self) -> Estimate:
        """Settle all that the data reaches."""
        feed = self.feed
        with evaluating(self.model), feed.opened(self.model) as device:
            sample = HaltedSample(self.model, self.norms, feed, device, self.max_memory)
            with sample.halting():
                sample.to_next()
                self.fed = fed_by_all(self.processes, sample.fed)
                counted = not any(MIXED in one for one in self.processes.gather(sample.places))
                layers = len(self.norms)
                with progress_bar(feed.stage, layers, "layer", shown=feed.progress) as bar:
                    if not (self._together(sample, bar) and self._were_apart(sample)):
                        sample.start_anew()
                        self._one_by_one(bar, counted=counted)
        return Estimate(self.fed, self.measured, self.passes + sample.passes, sample.held)

    def _together(self, sample: HaltedSample, bar: ProgressBar) -> bool:
        """Settle them with all batches at once; False if these are not at the same BatchNorm."""
        while True:
            everywhere = self.processes.gather(sample.places)
            places = {place for one in everywhere for place in one}
            if places <= {END}:
                return True
            if MIXED in places:
                return False
            again = next((path for path in self.measured if path in places), None)
            if again is not None:
                self._forget_from(again)
                sample.start_anew()
                self._in_a_pass(again)
                sample.final = (sample.final & self.measured.keys()) | {again}
                sample.settled = set(self.measured)
            elif len(places) == 1:
                (path,) = places
                self._settle(path, sample.arrived(path))
                sample.settled.add(path)
            else:
                return False
            bar.n = len(self.measured)
            bar.refresh()
            sample.to_next()

    def _were_apart(self, sample: HaltedSample) -> bool:
        """Tell whether no batch, in any process, has changed what another brought."""
        return all(self.processes.gather(sample.is_alike_alone()))

    def _one_by_one(self, bar: ProgressBar, *, counted: bool) -> None:
        """Settle them in a pass over all data for each.

        Args:
            bar: to move.
            counted: how much data there is is known. A batch may end before it has told.
        """
        if self.measured:
            self._forget_from(next(iter(self.measured)))
        called: dict[str, None] = {}
        with hooked(self.norms, lambda path, _norm, _x: called.setdefault(path)):
            fed, _ = measured(self.model, self.norms, (), replace(self.feed, progress=False))
        self.passes += 1
        if not counted:
            self.fed = fed_by_all(self.processes, fed)
        order = dict.fromkeys(path for one in self.processes.gather(list(called)) for path in one)
        bar.reset(len(order))
        for path in order:
            self._in_a_pass(path)
            bar.update()

    def _in_a_pass(self, path: str) -> None:
        """Settle a BatchNorm on all its calls in a pass over the data."""
        quiet = replace(self.feed, progress=False)
        fed, found = measured(self.model, self.norms, [path], quiet)
        self.passes += 1
        total = fed_by_all(self.processes, fed)
        if total != self.fed:
            raise other_data(self.fed, total)
        self._settle(path, found.get(path))

    def _settle(self, path: str, statistics: ChannelStatistics | None) -> None:
        found = {} if statistics is None else {path: statistics}
        merged = measured_by_all(self.processes, found).get(path)
        if merged is not None:  # it got more than empty tensors
            settle(path, self.norms[path], merged, self.fed, self.prior)
            self.measured[path] = merged

    def _forget_from(self, path: str) -> None:
        """Give a BatchNorm, and those settled after it, the old statistics."""
        order = list(self.measured)
        for later in order[order.index(path) :]:
            restore(self.norms[later], self.old[later])
            del self.measured[later]
