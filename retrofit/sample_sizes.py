"""How many images are enough by default: docs/results.md has what fewer and more of them bring."""

from __future__ import annotations

# Of the channel's standard deviation: standard errors that calibration may end at.
TOLERANCE = 0.05
# The same, above which calibration warns; and recalibration, for which sixteen images may do.
UNCERTAIN = 0.1
UNCERTAIN_RECALIBRATION = 0.25
# To re-estimate statistics on.
RECALIBRATION_IMAGES = 256


def default_tolerance(max_images: int | None) -> float:
    """Choose for images in random order: 0, for all, where their number is asked for."""
    return TOLERANCE if max_images is None else 0.0
