"""A scale and a shift of the output, absorbed into the weight and bias of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_weights(
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    shift: Tensor,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Compute weight and bias of a convolution that gives alpha * conv(x) + shift.

    W' = W * alpha and b' = b * alpha + shift, in the dtype of alpha, rounded to that of W.
    Channels with alpha == 1 and shift == 0 keep their bits, and a missing bias stays missing
    where all of them are such.

    Args:
        weight: (C, in / groups, ...), or (in, C / groups, ...) when transposed.
        bias: (C,) or None.
        alpha, shift: (C,).
    """
    if transposed:
        grouped = weight.unflatten(0, (groups, -1))  # (groups, in / groups, C / groups, ...)
        scale = alpha.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (grouped * scale).flatten(0, 1)
    else:
        folded = weight * alpha.view(-1, *[1] * (weight.dim() - 1))
    untouched = (alpha == 1) & (shift == 0)
    if bias is None:
        new_bias = None if bool(untouched.all()) else shift.to(weight.dtype)
    else:  # -0 * 1 + 0 would be +0
        new_bias = torch.where(untouched, bias, (bias * alpha + shift).to(bias.dtype))
    return folded.to(weight.dtype), new_bias
