"""The exceptions that this package raises on purpose, and its warnings."""

from __future__ import annotations

import contextlib
import sys
import warnings
from itertools import count
from pathlib import Path
from types import FrameType

# Where calls pass through on their way from a user's line; contextlib's decorators lie in between.
_OURS = (str(Path(__file__).parent), contextlib.__file__)


class RetrofitError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what to do."""


class NonFiniteError(RetrofitError):
    """A NaN or Inf reached a site.

    Attributes:
        site: module path of the layer where it was seen.
        item: index of the first offending sample within what the layer got.
        image: index of the image in the data; None if the layer does not get one sample for each.
        samples: how many the layer got; 0 where that is not told.
    """

    def __init__(
        self,
        site: str,
        item: int,
        image: int | None = None,
        name: str | None = None,
        samples: int = 0,
    ) -> None:
        self.site, self.item, self.image, self.samples = site, item, image, samples
        known = f"image {image} of the data" if image is not None else f"item {item} of the batch"
        super().__init__(
            f"there is a NaN or Inf at {site} for {name or known}: check the weights and that "
            "input, or leave it out"
        )


class PeerError(RetrofitError):
    """Another process has failed, or is gone: of the group, or one that reads pictures."""


class UnequalError(RetrofitError):
    """What was made computes something else than what it was made from."""


class UnfinishedError(RetrofitError):
    """Something was written as asked, and then the rest could not be done."""


def warn(message: str) -> None:
    """Warn at the line outside of this package that led here: Python names it to the user."""
    frame: FrameType | None = sys._getframe(1)
    for level in count(2):  # Python 3.12 has skip_file_prefixes
        if frame is None or not frame.f_code.co_filename.startswith(_OURS):
            warnings.warn(message, stacklevel=level)
            return
        frame = frame.f_back


class NeitherTrueNorFalse:
    """Base of results whose truth nobody should guess: an object is true by default."""

    ask_for = ""

    def __bool__(self) -> bool:
        raise RetrofitError(
            f"a {type(self).__name__} is neither true nor false: ask for {self.ask_for}"
        )
