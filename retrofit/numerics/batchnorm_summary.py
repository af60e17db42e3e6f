"""What the tensors of a BatchNorm say of its channels: ranges, constant ones, exact identities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.numerics.exact_identity import scale_and_shift
from retrofit.numerics.moments import CONSTANT
from retrofit.numerics.tensor_checks import are_channels

NEAR_CONSTANT = 0.01  # of the median sigma of the layer
NAMES = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class BatchNormSummary:
    """What a BatchNorm holds for each of its C channels.

    Attributes:
        mean, std: the running statistics, float64; nan where a variance is negative.
        constant: the channel does not vary, by more than float32 rounds a constant.
        near: it varies, but by less than a hundredth of what is usual in its layer.
        identity: how many channels come out as they go in, bit for bit.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    constant: NDArray[np.bool_]
    near: NDArray[np.bool_]
    identity: int

    def __len__(self) -> int:
        return len(self.mean)


def batchnorm_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the BatchNorms with statistics, weight and bias in a state dict, by path."""
    found = [key.rpartition(".")[0] for key in tensors if key.endswith("running_var")]
    return [path for path in found if all(key in tensors for key in keys_of(path))]


def keys_of(path: str) -> list[str]:
    """List the keys of the four tensors of the BatchNorm at `path`."""
    return [f"{path}.{name}".lstrip(".") for name in NAMES]


def summarised(tensors: Mapping[str, Tensor], path: str, eps: float) -> BatchNormSummary:
    """Summarise the BatchNorm at `path` of a state dict.

    Raises RetrofitError where its tensors are missing, or not those of a BatchNorm.
    """
    missing = [key for key in keys_of(path) if key not in tensors]
    if missing:
        raise RetrofitError(f"it has no {missing[0]}")
    own = [tensors[key] for key in keys_of(path)]
    if not are_channels(own):
        raise RetrofitError(f"the tensors of {path} are not those of a BatchNorm")
    # Of a BatchNorm in half precision torch computes in float32.
    wide = torch.float64 if own[0].dtype == torch.float64 else torch.float32
    mean, var, weight, bias = (tensor.detach().to("cpu", wide).numpy() for tensor in own)
    with np.errstate(all="ignore"):  # a file may say anything
        alpha, shift = scale_and_shift(mean, var, weight, bias, eps)
        mean, std = mean.astype(np.float64), np.sqrt(var.astype(np.float64))
        constant = std <= CONSTANT * np.abs(mean)
        usual = np.median(std[~constant]) if not constant.all() else 0.0
        near = ~constant & (std < NEAR_CONSTANT * usual)
    identity = int(((alpha == 1) & (shift == 0)).sum())
    return BatchNormSummary(mean, std, constant, near, identity)
