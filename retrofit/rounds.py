"""The rounds of a calibration: when it ends, what it has learned, and what a state file gets."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.feeding import Fed
from retrofit.observer import MomentObserver
from retrofit.ranks import Ranks
from retrofit.resuming import StateFile
from retrofit.sampling import channel_errors, standard_error

# Images before the standard errors are looked at first, and the growth from one look to the next.
FIRST_LOOK, GROWTH = 32, 1.25
# Batches of each process from one meeting of several to the next.
ROUND = 8
Learned = list[dict[str, Tensor]]  # for each observer


class Rounds:
    """What the processes of a calibration have in common: they meet, and go on or end together.

    One alone meets itself after each batch.
    """

    def __init__(
        self,
        ranks: Ranks,
        observers: list[MomentObserver],
        data: Any,
        tolerance: float | None,
        file: StateFile | None,
        described: dict[str, Any],
    ) -> None:
        self.ranks, self.observers, self.data = ranks, observers, data
        self.tolerance, self.file, self.described = tolerance, file, described
        self.looked = 0  # images of all when the standard errors were looked at last
        self.ended = False  # all data is used, or enough
        self.begun, self.earlier = time.perf_counter(), 0.0  # seconds of the runs resumed

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.begun

    def resumed(self) -> Fed:
        """What this process was fed according to the state file, which is restored."""
        if self.file is None:
            return Fed()
        content = None
        if self.ranks.rank == 0:
            content = self.file.read(self.described, self.ranks.size)
        content = self.ranks.from_first(content)
        if content is None:
            return Fed()
        mine = content[self.ranks.rank]
        try:
            self._take_together([mine["observers"]])
            place = dict(mine["data"])
            self.looked, self.ended = mine["looked"], mine["ended"]
            self.earlier = mine["seconds"]
            fed = Fed(int(mine["images"]), int(mine["batches"]), float(mine["waited"]))
        except Exception as error:  # what a changed file makes the lines above raise
            raise RetrofitError(f"the state file is damaged: remove it ({error!r})") from error
        self.data.load_state_dict(place)
        return fed

    def until(self, fed: Fed) -> bool:
        """After a batch: True if it was the last, since all together have enough."""
        if self.ranks.size > 1 and fed.batches % ROUND:
            return False
        return self._meet(fed, done=False)

    def finish(self, fed: Fed) -> Fed:
        """At the end of one's own data: wait for the others, and take all data together."""
        while not self.ended:
            self._meet(fed, done=True)
        if self.ranks.size == 1:
            return fed
        states = self.ranks.gather(self._learned())
        feds = self.ranks.gather(fed)
        if self.ranks.rank == 0:
            self._take_together(states)
        # Merged once, since not every processor adds up in the same order.
        self._take_together([self.ranks.from_first(self._learned())])
        return Fed(
            images=sum(one.images for one in feds),
            batches=sum(one.batches for one in feds),
            waited=max(one.waited for one in feds),
        )

    def _meet(self, fed: Fed, *, done: bool) -> bool:
        news = self.ranks.gather((fed.images, done, self.file is not None and self.file.due))
        images = sum(one for one, _, _ in news)
        self.ended = all(one for _, one, _ in news)
        if self.tolerance is not None and not self.ended and _looks(images) > _looks(self.looked):
            self.looked = images
            self.ended = self._is_enough(images, self.tolerance)
        if self.file is not None and (news[0][2] or self.ended):
            content = self.ranks.gather(self._own(fed))
            if self.ranks.rank == 0:
                self.file.write(self.described, content)
        return self.ended

    def _is_enough(self, images: int, tolerance: float) -> bool:
        if self.ranks.size == 1:
            return self._standard_error(images) <= tolerance
        own = [observer.state() for observer in self.observers]
        states = self.ranks.gather(self._learned())
        enough = False
        if self.ranks.rank == 0:
            self._take_together(states)
            enough = self._standard_error(images) <= tolerance
            for observer, known in zip(self.observers, own, strict=True):
                observer.restore(known)
        return self.ranks.from_first(enough)

    def _standard_error(self, images: int) -> float:
        return standard_error(channel_errors(observer, images) for observer in self.observers)

    def _learned(self) -> Learned:
        return [{k: v.cpu() for k, v in o.state().items()} for o in self.observers]

    def _take_together(self, learned: list[Learned]) -> None:
        for observer, states in zip(self.observers, zip(*learned, strict=True), strict=True):
            observer.take_together(states)

    def _own(self, fed: Fed) -> dict[str, Any]:
        return {
            "images": fed.images,
            "batches": fed.batches,
            "waited": fed.waited,
            "seconds": self.seconds,
            "looked": self.looked,
            "ended": self.ended,
            "data": self.data.state_dict(),
            "observers": self._learned(),
        }


def _looks(images: int) -> int:
    """How often to have looked at the standard errors by then."""
    if images < FIRST_LOOK:
        return 0
    return 1 + int(math.log(images / FIRST_LOOK) / math.log(GROWTH))
