"""The statistics that BatchNorms had, to be given back."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import dropwhile
from weakref import WeakKeyDictionary, ref

from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.adaptation.running_statistics import Buffers, restore

# Of each BatchNorm what was saved and not given back yet, in that order.
_SAVED: WeakKeyDictionary[_BatchNorm, list[ref[SavedStatistics]]] = WeakKeyDictionary()


class SavedStatistics:
    """What BatchNorms had before their statistics were replaced.

    Several may lie upon each other. To give back what one saved takes its replacement out from
    under the later ones too: these then have the same to give back, so that the order does not
    matter.
    """

    def __init__(self, old: Mapping[_BatchNorm, Buffers]) -> None:
        self._old = dict(old)
        for norm in self._old:
            _SAVED.setdefault(norm, []).append(ref(self))

    def __bool__(self) -> bool:
        return bool(self._old)

    def __getitem__(self, norm: _BatchNorm) -> Buffers:
        return self._old[norm]

    def give_back(self) -> None:
        """Restore the statistics, bit for bit; the second time does nothing."""
        for norm, was in self._old.items():
            restore(norm, was)
            alive = [saved for one in _SAVED[norm] if (saved := one()) is not None]
            for later in dropwhile(lambda saved: saved is not self, alive):
                later._old[norm] = was
            _SAVED[norm] = [ref(saved) for saved in alive if saved is not self]
        self._old = {}
