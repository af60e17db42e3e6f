"""The statistics that BatchNorms had, to be given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.adaptation.running_statistics import Buffers, restore

# Of each BatchNorm what was saved and not given back yet, in that order.
_SAVED: WeakKeyDictionary[_BatchNorm, list[ref[SavedStatistics]]] = WeakKeyDictionary()


class SavedStatistics:
    """What BatchNorms had before their statistics were replaced.

    Several may lie upon each other. To give back what one saved takes away what later ones put
    there: these have nothing to give back any more, or the same, so that the order does not matter.

    Args:
        old: of each BatchNorm.
        goes_on: the statistics are replaced again and again, also after an earlier one was given
            back.
    """

    def __init__(self, old: Mapping[_BatchNorm, Buffers], *, goes_on: bool = False) -> None:
        self._old, self._goes_on = dict(old), goes_on
        for norm in self._old:
            _register(norm, [*_registered(norm), self])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let a copy, of other BatchNorms, be known as well."""
        self.__init__(state["_old"], goes_on=state["_goes_on"])  # type: ignore[misc]

    def __bool__(self) -> bool:
        return bool(self._old)

    def __getitem__(self, norm: _BatchNorm) -> Buffers:
        return self._old[norm]

    def give_back(self) -> None:
        """Restore the statistics, bit for bit; the second time does nothing."""
        for norm, was in self._old.items():
            restore(norm, was)
            saved = _registered(norm)
            for later in saved[saved.index(self) + 1 :]:
                later._start_from(norm, was)
            _register(norm, [one for one in saved if one is not self])
        self._old = {}

    def _start_from(self, norm: _BatchNorm, was: Buffers) -> None:
        if self._goes_on:
            self._old[norm] = was
        else:
            self._old.pop(norm, None)


def _registered(norm: _BatchNorm) -> list[SavedStatistics]:
    """List what was saved of a BatchNorm, but for what nobody holds any more."""
    return [saved for one in _SAVED.get(norm, ()) if (saved := one()) is not None]


def _register(norm: _BatchNorm, saved: Iterable[SavedStatistics]) -> None:
    _SAVED[norm] = [ref(one) for one in saved]
