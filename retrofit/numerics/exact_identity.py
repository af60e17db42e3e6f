"""Moments to BatchNorm parameters that make it the exact identity.

In eval mode torch's CPU kernel computes, in the parameters' dtype and rounding (fl) each step,

    invstd = fl(1 / fl(sqrt(fl(var + eps))))
    alpha  = fl(gamma * invstd)
    shift  = fl(beta - fl(mean * alpha))
    y      = fl(fl(x * alpha) + shift)

so y == x for every x if alpha == 1 and shift == 0. beta = mean gives the second. For the first,
gamma = fl(sqrt(fl(var + eps))) is right most of the time, a neighbour of it mostly otherwise,
and for the rest there is no such gamma: then fl(var + eps) moves up by one unit in the last
place, and again, at most some dozen times (a relative nudge of the variance below 1e-6).

numpy rounds sqrt and division correctly, as the kernel does; torch's vectorised sqrt does not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrofit.errors import RetrofitError

Floats = NDArray[np.floating]
ROUNDS = 200  # 13 were enough for a million variances; each round helps a third or more of the rest


class Identity(NamedTuple):
    """Parameters of a BatchNorm that returns its input; four arrays of shape (C,)."""

    mean: Floats
    var: Floats
    weight: Floats
    bias: Floats


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def scale_and_shift(
    mean: Floats, var: Floats, weight: Floats, bias: Floats, eps: float
) -> tuple[Floats, Floats]:
    """Compute alpha and shift of an eval-mode BatchNorm, bit for bit as torch's CPU kernel does.

    All arrays have shape (C,) and one dtype, which is the dtype of the arithmetic. What leaves it
    is an Inf or a NaN, as there.
    """
    one, small = mean.dtype.type(1), mean.dtype.type(eps)
    alpha = weight * (one / np.sqrt(var + small))
    return alpha, bias - mean * alpha


def exact_identity(mean: Floats, var: Floats, eps: float) -> Identity:
    """Find BatchNorm parameters with `alpha == 1` and `shift == 0` for channels of these moments.

    Args:
        mean, var: moments of shape (C,), float32 or float64; the arithmetic is done in their dtype.
        eps: BatchNorm's eps, positive.

    Returns:
        `Identity(mean, var, weight, bias)`: weight is sqrt(var + eps) and bias is mean; var and
        weight are moved by a few units in the last place where exactness needs it.

    Raises:
        RetrofitError: moments that are not finite, or whose scale leaves the dtype's range.
    """
    dtype = mean.dtype.type
    if len(odd := np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))):
        raise RetrofitError(
            f"the moments of channel {odd[0]} are not finite in {mean.dtype} (mean "
            f"{mean[odd[0]]:.3g}, variance {var[odd[0]]:.3g}): scale the data down"
        )
    if not eps > 0 or dtype(eps) == 0:
        raise RetrofitError(f"eps must be positive, not {eps}")
    one, small = dtype(1), dtype(eps)
    var, weight = var.copy(), np.empty_like(var)
    open_ = np.arange(len(var))
    if not np.isfinite(var + small).all():
        raise _too_large(int(np.argmax(var)), var)
    for _ in range(ROUNDS):
        total = var[open_] + small
        root = np.sqrt(total)
        invstd = one / root
        found = np.zeros(len(open_), dtype=bool)
        for gamma in _neighbours(root):
            new = ~found & (gamma * invstd == one)
            weight[open_[new]] = gamma[new]
            found |= new
        open_, total = open_[~found], total[~found]
        if not len(open_):
            return Identity(mean, var, weight, mean.copy())
        var[open_] = _variance_of(np.nextafter(total, dtype(np.inf)), small)
    raise _too_large(int(open_[0]), var)


def _too_large(channel: int, var: Floats) -> RetrofitError:
    return RetrofitError(
        f"channel {channel} has variance {var[channel]:.3g}, too large for an exact BatchNorm "
        f"in {var.dtype}"
    )


def _neighbours(x: Floats) -> list[Floats]:
    """List x itself and the floats next to it, the likeliest first."""
    up, down = np.nextafter(x, np.inf, dtype=x.dtype), np.nextafter(x, 0, dtype=x.dtype)
    return [x, up, down, np.nextafter(up, np.inf, dtype=x.dtype)]


def _variance_of(total: Floats, eps: np.floating) -> Floats:
    """Find the nearest variance with fl(variance + eps) >= total."""
    var = total - eps
    for _ in range(4):
        low = var + eps < total
        if not low.any():
            break
        var[low] = np.nextafter(var[low], np.inf, dtype=var.dtype)
    return var
