"""When a calibration ends: its data is used up, or its sample is enough.

Its processes meet now and then, and go on or end together.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from retrofit.calibration.feeding import Fed
from retrofit.calibration.processes import Processes
from retrofit.calibration.sample_errors import standard_error
from retrofit.calibration.state_file import StateFile, Stateful
from retrofit.errors import RetrofitError
from retrofit.numerics.channel_statistics import ChannelStatistics

# Images before the standard errors are checked first, and the growth from one check to the next.
FIRST_CHECK, GROWTH = 32, 1.25
# Batches of each process from one meeting of several to the next.
ROUND = 8


@dataclass(frozen=True)
class Learned:
    """What one process has learned so far, as it stands between two batches.

    Attributes:
        statistics: of all sites, side by side.
        fed: how much that took.
        checked: images of all processes when the standard errors were checked last.
        needed: images of this process that, as estimated then, are enough.
        ended: all data is used, or the sample is enough.
        seconds: how long it took, the runs before a kill included.
    """

    statistics: ChannelStatistics
    fed: Fed = field(default_factory=Fed)
    checked: int = 0
    needed: float = math.inf
    ended: bool = False
    seconds: float = 0.0


class Rounds:
    """Lets the processes of a calibration meet, and go on or end together.

    A single process synchronises after every batch, several after every eighth. With a state file,
    what all have learned is written there now and then.

    Args:
        processes: all that calibrate together.
        tolerance: the standard error that is enough; None to use all data.
        file: the state file, if any.
        data: knows its place, if there is a file.
        described: what a state has to agree in.
    """

    def __init__(
        self,
        processes: Processes,
        tolerance: float | None,
        file: StateFile | None = None,
        data: Stateful | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self.processes, self.tolerance = processes, tolerance
        self.file, self.data, self.described = file, data, described or {}
        self.begun = time.perf_counter()

    def begin(self, start: Learned) -> Learned:
        """Return what the state file has of this process; without one, `start`."""
        if self.file is None or self.data is None:
            return start
        content = None
        if self.processes.rank == 0:
            content = self.file.read(self.described, self.processes.size)
        content = self.processes.from_first(content)
        if content is None:
            return start
        mine = content[self.processes.rank]
        try:
            learned, place = _from_state(mine, start.statistics), dict(mine["data"])
        except Exception as error:  # what a changed file makes the lines above raise
            raise RetrofitError(f"the state file is damaged: remove it ({error!r})") from error
        self.data.load_state_dict(place)
        self.begun -= learned.seconds
        return learned

    def after_batch(self, learned: Learned) -> Learned:
        """Synchronise where it is time to; `ended` is set if that was the last batch."""
        if self.processes.size > 1 and learned.fed.batches % ROUND:
            return learned
        return self._synchronised(learned, done=False)

    def end(self, learned: Learned) -> Learned:
        """Wait for the others at the end of one's own data, and merge what all have learned."""
        while not learned.ended:
            learned = self._synchronised(learned, done=True)
        learned = replace(learned, seconds=time.perf_counter() - self.begun)
        if self.processes.size == 1:
            return learned
        feds = self.processes.gather(learned.fed)
        statistics = self._merged(learned.statistics)
        # Merged once, since not every processor adds up in the same order.
        statistics = self.processes.from_first(statistics)
        fed = Fed(
            images=sum(one.images for one in feds),
            batches=sum(one.batches for one in feds),
            waited=max(one.waited for one in feds),
        )
        return replace(learned, statistics=statistics, fed=fed)

    def _synchronised(self, learned: Learned, *, done: bool) -> Learned:
        """Meet the others: have all ended, is the sample enough, is it time to write the state."""
        due = self.file is not None and self.file.due
        news = self.processes.gather((learned.fed.images, done, due))
        images = sum(one for one, _, _ in news)
        ended = all(one for _, one, _ in news)
        if self.tolerance is not None and not ended and _checks(images) > _checks(learned.checked):
            share = self._share(learned, images, self.tolerance)
            ended = share >= 1
            needed = learned.fed.images / share if share else math.inf
            learned = replace(learned, checked=images, needed=needed)
        learned = replace(learned, ended=ended)
        if self.file is not None and self.data is not None and (news[0][2] or ended):
            elapsed = time.perf_counter() - self.begun
            state = _to_state(replace(learned, seconds=elapsed)) | {"data": self.data.state_dict()}
            content = self.processes.gather(state)
            if self.processes.rank == 0:
                self.file.write(self.described, content)
        return learned

    def _share(self, learned: Learned, images: int, tolerance: float) -> float:
        """Estimate which share of the images needed there were; see `Calibration.images_needed`."""
        statistics, share = self._merged(learned.statistics), 0.0
        if self.processes.rank == 0:
            error = standard_error([statistics], images)
            share = (tolerance / error) ** 2 if error else math.inf
        return self.processes.from_first(share)

    def _merged(self, own: ChannelStatistics) -> ChannelStatistics:
        """Merge the statistics of all processes, in their order; only the first one's are whole."""
        if self.processes.size == 1:
            return own
        states = self.processes.gather(own.to(torch.device("cpu")))
        return functools.reduce(ChannelStatistics.merge, states) if not self.processes.rank else own


def _checks(images: int) -> int:
    """Count the standard-error checks due after `images`."""
    if images < FIRST_CHECK:
        return 0
    return 1 + int(math.log(images / FIRST_CHECK) / math.log(GROWTH))


def _to_state(learned: Learned) -> dict[str, Any]:
    """Turn it into plain values and tensors, for a state file."""
    return {
        "images": learned.fed.images,
        "batches": learned.fed.batches,
        "waited": learned.fed.waited,
        "seconds": learned.seconds,
        "checked": learned.checked,
        "ended": learned.ended,
        "statistics": learned.statistics.to(torch.device("cpu")).tensors(),
    }


def _from_state(state: Mapping[str, Any], like: ChannelStatistics) -> Learned:
    """Undo `_to_state`; any error where the state is of other statistics than `like`."""
    statistics = ChannelStatistics(**state["statistics"])
    for name, tensor in like.tensors().items():
        found = getattr(statistics, name)
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}")
    return Learned(
        statistics,
        Fed(int(state["images"]), int(state["batches"]), float(state["waited"])),
        checked=int(state["checked"]),
        ended=bool(state["ended"]),
        seconds=float(state["seconds"]),
    )
