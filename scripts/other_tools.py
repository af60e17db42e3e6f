"""What other tools do with a BatchNorm's statistics, for `benchmark.py` and `peers.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)
MomentsOf = MutableMapping[K, tuple[Tensor, Tensor]]


def repvgg_moving_average(running: MomentsOf[K], layer: K, x: Tensor) -> None:
    """Do as RepVGG's insert_bn: mean, then mean squared difference, in a moving average."""
    mean = x.mean((0, 2, 3))
    var = (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    old_mean, old_var = running.get(layer, (mean, var))
    running[layer] = 0.9 * old_mean + 0.1 * mean, 0.9 * old_var + 0.1 * var


def fvcore_update_bn_stats() -> Callable[..., Any]:
    """Import fvcore's function: ModuleNotFoundError where that is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses torch.jit.script
        from fvcore.nn import update_bn_stats  # noqa: PLC0415 - optional
    found: Callable[..., Any] = update_bn_stats
    return found
