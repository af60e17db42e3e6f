"""A network recalibrated on however few pictures, for studies of what that brings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

import retrofit


def recalibrated(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    layerwise: bool,
    prior: float,
    max_memory: float | None = None,
) -> retrofit.Recalibration:
    """Recalibrate without a warning of too few pictures: `with recalibrated(...):` undoes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the statistics")  # are uncertain: the question here
        return retrofit.recalibrate(
            model, batches,
            layerwise=layerwise, prior=prior, max_memory=max_memory, progress=False,
        )  # fmt: skip
