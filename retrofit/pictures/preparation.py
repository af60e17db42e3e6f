"""How pictures become the input of a model, where that is not as the model was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from retrofit.errors import RetrofitError

MOST_PIXELS = 16_384  # of a side: such a picture is 3 GB of floats


@dataclass(frozen=True)
class Preparation:
    """Steps that replace those with which a model was trained; None leaves a step as it was.

    Attributes:
        resize: pixels of the shorter side, before the crop.
        crop: pixels of a side of the centre crop.
        mean, std: of each channel, or one for all, of pixels in 0 to 1.

    Raises:
        RetrofitError: a size that no picture can have, a std that is not positive, or numbers
            that are not of pixels in 0 to 1.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[int | float, ...] | None = None
    std: tuple[int | float, ...] | None = None

    def __post_init__(self) -> None:
        for pixels in (self.resize, self.crop):
            if pixels is not None and not (type(pixels) is int and 0 < pixels <= MOST_PIXELS):
                raise RetrofitError(f"{pixels!r} pixels are not between 1 and {MOST_PIXELS}")
        check_numbers("mean", self.mean)
        check_numbers("std", self.std)

    @property
    def given(self) -> dict[str, int | tuple[int | float, ...]]:
        """The steps that are replaced, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, other: Preparation | None) -> Preparation:
        """Add the steps of another, where this has none; a size is of both steps."""
        theirs = other.given if other else {}
        if self.resize or self.crop:
            theirs = {name: value for name, value in theirs.items() if name in ("mean", "std")}
        return Preparation(**{**theirs, **self.given})  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Write the steps as the options of the command have them, without dashes."""
        texts = (
            f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self.given.items()
        )
        return ", ".join(texts)


def check_numbers(name: str, numbers: Sequence[float] | None) -> None:
    """Raise RetrofitError for a mean or std that pixels in 0 to 1 cannot have."""
    if numbers is None:
        return
    listed = isinstance(numbers, (list, tuple)) and len(numbers) > 0
    if not listed or not all(map(_is_finite, numbers)):
        raise RetrofitError(f"the {name} must be finite numbers, not {numbers!r}")
    words = " ".join(map(str, numbers))
    if name == "std" and min(numbers) <= 0:
        raise RetrofitError(f"the std must be positive, not {words}")
    if max(numbers) > 1:
        raise RetrofitError(
            f"--{name} {words} cannot be of pixels in 0 to 1: of 0 to 255, divide by 255"
        )


def _is_finite(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return math.isfinite(number)
