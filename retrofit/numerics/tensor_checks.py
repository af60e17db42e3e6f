"""What tensors can be: dense numbers, those of a BatchNorm, statistics of data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Tell whether this is numbers in memory: neither sparse nor quantized nor on meta."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)


def are_channels(tensors: Sequence[Tensor]) -> bool:
    """Tell whether these can be the tensors of one BatchNorm: a number each for every channel."""
    rows = all(is_dense(t) and t.is_floating_point() and t.dim() == 1 and len(t) for t in tensors)
    return rows and len(set(map(len, tensors))) == 1


def are_statistics(mean: Tensor, var: Tensor) -> bool:
    """Tell whether these can be mean and variance of data: finite, and no variance below 0."""
    return bool(mean.isfinite().all() and var.isfinite().all() and (var >= 0).all())
