"""BatchNorm parameters for the identity, and for the identity plus a bias that moves into it."""

from __future__ import annotations

import numpy as np

from retrofit.numerics.exact_identity import Floats, Identity, exact_identity


def shifted_identity(mean: Floats, var: Floats, shift: Floats | None, eps: float) -> Identity:
    """Find BatchNorm parameters that give x + shift for x of moments mean - shift and var.

    alpha is exactly 1, as for `exact_identity`. What the kernel adds, fl(bias - running_mean), is
    the shift where the floats near the mean can express it, and else the nearest of two choices:
    bias is the mean, or running_mean is the mean less the shift. Either is off by half a unit in
    the last place of the mean at most.

    Args:
        mean, var: moments of what comes out, (C,), float32 or float64.
        shift: (C,) of the same dtype; None for the identity.
        eps: BatchNorm's eps, positive.

    Raises:
        RetrofitError: as for `exact_identity`.
    """
    found = exact_identity(mean, var, eps)
    if shift is None:
        return found
    choices = [(mean - shift, (mean - shift) + shift), (mean - shift, mean)]
    errors = [np.abs((bias - running_mean) - shift) for running_mean, bias in choices]
    first = errors[0] <= errors[1]
    running_mean, bias = (np.where(first, one, other) for one, other in zip(*choices, strict=True))
    return Identity(running_mean, found.var, found.weight, bias)
