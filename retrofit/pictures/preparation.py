"""How pictures become the input of a model, where that is not as the model was trained."""

from __future__ import annotations

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
        RetrofitError: a size that no picture can have.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[int | float, ...] | None = None
    std: tuple[int | float, ...] | None = None

    def __post_init__(self) -> None:
        for pixels in (self.resize, self.crop):
            if pixels is not None and not 0 < pixels <= MOST_PIXELS:
                raise RetrofitError(f"{pixels} pixels are not between 1 and {MOST_PIXELS}")

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
