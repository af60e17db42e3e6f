"""A tensor as it was at one moment."""

from __future__ import annotations

import weakref

from torch import Tensor


class Remembered:
    """Remembers a tensor without keeping it alive, and whether PyTorch wrote to it since."""

    def __init__(self, x: Tensor) -> None:
        self._tensor, self._version = weakref.ref(x), x._version

    def is_still(self, x: Tensor) -> bool:
        """Tell whether x is that tensor, as it was."""
        return self._tensor() is x and x._version == self._version
