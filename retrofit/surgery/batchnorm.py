"""The BatchNorm that goes after a layer: the exact identity for channels of given moments."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.errors import RetrofitError
from retrofit.numerics.exact_identity import Identity, exact_identity
from retrofit.numerics.moments import ChannelMoments
from retrofit.plans import Site

CLASSES = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class LastAxisBatchNorm(nn.Module):
    """BatchNorm over the last axis, for what nn.Linear gives: (N, ..., C), of any rank.

    Every vector of C features is a sample. Flattening rather than transposing keeps the tensor
    contiguous, for which torch's kernel is exact, and the child an ordinary nn.BatchNorm1d.

    Args:
        bn: the child, over C features.

    Examples:
        >>> retrofit.LastAxisBatchNorm(nn.BatchNorm1d(8))(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, bn: _BatchNorm) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, ..., C) over all axes but the last; returns the same shape."""
        y: Tensor = self.bn(x.reshape(-1, x.shape[-1]))
        return y.reshape(x.shape)


def matching_batchnorm(
    site: Site,
    layer: nn.Module | None,
    model: nn.Module,
    own: ChannelMoments,
    target: ChannelMoments | None = None,
    *,
    eps: float,
    momentum: float | None,
    batches: int = 0,
) -> nn.Module:
    """Make the BatchNorm that gives channels of moments `own` those of `target`.

    By default `target` is `own`, and the BatchNorm the identity, bit for bit. Its parameters
    require a gradient if the layer's weight does.

    Args:
        site: where it goes.
        layer: the module before it; None for a function.
        model: around it.
        own, target: moments, (C,) each.
        eps, momentum: of the BatchNorm.
        batches: how many the moments are of, for `num_batches_tracked`.

    Raises:
        RetrofitError: moments that are not finite, or leave the dtype's range; with the site.
    """
    weight = weight_of(layer, model)
    # float32 whatever the network's precision: 16 bits cannot hold the exact identity.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    batchnorm = CLASSES[site.dims](
        site.channels, eps=eps, momentum=momentum, device=weight.device, dtype=dtype
    )
    try:
        normal = _identity(own, dtype, eps)
        back = normal if target is None else _identity(target, dtype, eps)
    except RetrofitError as error:
        raise RetrofitError(f"{site.path}: {error}") from error
    arrays = {
        "running_mean": normal.mean,
        "running_var": normal.var,
        "weight": back.weight,
        "bias": back.bias,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["num_batches_tracked"] = torch.tensor(batches, device="cpu")
    batchnorm.load_state_dict(tensors)
    weights = [p for n, p in (layer or model).named_parameters() if not n.endswith("bias")]
    batchnorm.requires_grad_(any(p.requires_grad for p in weights))
    return LastAxisBatchNorm(batchnorm) if site.last_axis else batchnorm


def weight_of(layer: nn.Module | None, model: nn.Module) -> Tensor:
    """Find the tensor that says device and precision; for a function, any parameter does."""
    if layer is not None:
        return layer.weight  # type: ignore[return-value]
    return next(model.parameters(), torch.empty(0))


def _identity(moments: ChannelMoments, dtype: torch.dtype, eps: float) -> Identity:
    numbers: type[np.floating] = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):
        mean, var = (tensor.detach().cpu().numpy().astype(numbers) for tensor in moments)
        return exact_identity(mean, var, eps)
