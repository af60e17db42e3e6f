"""Numbers in the words that the commands print."""

from __future__ import annotations

import math


def error_in_words(value: float) -> str:
    """Say what a standard error is of."""
    if math.isinf(value):
        return "not known, from one picture or from equal ones"
    return f"{value:.2%} of sigma (99 % of all channels)"
