"""Copies of pictures in the memory format in which convolutions are faster on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_channels_last(x: Tensor) -> Tensor:
    """Copy x, to channels_last where it holds pictures or volumes, (N, C, ...), on a CPU."""
    if x.device.type == "cpu" and x.dim() in _FORMATS:
        return x.clone(memory_format=_FORMATS[x.dim()])
    return x.clone()
