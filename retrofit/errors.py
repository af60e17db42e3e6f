"""The one exception this package raises on purpose."""

from __future__ import annotations


class RetrofitError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what to do."""


class NonFiniteError(RetrofitError):
    """A NaN or Inf reached a site.

    Attributes:
        site: module path of the layer whose output is not finite.
        item: index of the first offending sample within its batch.
    """

    def __init__(self, site: str, item: int, where: str | None = None) -> None:
        self.site = site
        self.item = item
        where = where or f"item {item} of the batch"
        super().__init__(
            f"the output of {site} has NaN or Inf for {where}: "
            "check the weights and that input, or leave it out"
        )
