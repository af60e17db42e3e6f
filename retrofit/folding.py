"""BatchNorm absorbed into the convolution before it: the inverse of the conversion."""

from __future__ import annotations

import copy
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.copies import shared_copy
from retrofit.errors import RetrofitError
from retrofit.identity import scale_and_shift
from retrofit.layers import is_conv, is_transposed
from retrofit.modes import evaluating
from retrofit.plans import Plan
from retrofit.record import attach, record_of
from retrofit.rewrite import find_site, replace, take_out
from retrofit.trace import Call, trace

M = TypeVar("M", bound=nn.Module)


def fold_weights(
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    shift: Tensor,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution that computes alpha * conv(x) + shift.

    W' = W * alpha and b' = b * alpha + shift, in the dtype of alpha, rounded to that of W.
    Channels with alpha == 1 and shift == 0 keep their bits, and a missing bias stays missing
    when no channel is shifted.

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


def fold(model: M, plan: Plan | None = None) -> M:
    """A copy of `model` with BatchNorms absorbed into the convolutions before them.

    The folded network computes, up to rounding, what `model` computes in eval mode. Right after
    the conversion, when each BatchNorm is the identity, the original state dict comes back bit
    for bit.

    Args:
        model: converted by this package, or any other with BatchNorm after convolutions; not
            changed.
        plan: which BatchNorms, and the containers to restore; by default the model's own, so that
            what was there before the conversion stays, even if the conversion added nothing. A
            model without one gets every torch.nn.BatchNorm folded that alone follows a convolution
            (found with torch.fx), and nn.Identity in its place so that no index moves. Subclasses
            of BatchNorm stay, since they may do more.

    Raises:
        RetrofitError: the plan does not fit; a BatchNorm has no running statistics; a convolution
            feeds several BatchNorms; or, where the BatchNorm is not the identity: the weight is
            parametrized, the convolution has a hook, or its output does not follow its weight
            and bias linearly (weight standardisation).
    """
    record = record_of(model)
    plan = plan or (record.plan if record else None)
    result = shared_copy(model)
    if plan is not None:
        pairs = {site.path: find_site(result, site) for site in plan.inserted}
    else:
        pairs = _pairs(result)
    for path, (conv, norm) in pairs.items():
        _absorb(conv, norm, path)
    if plan is not None:
        take_out(result, plan)
    else:
        replace(result, {norm: nn.Identity() for _, norm in pairs.values()})
    attach(result, None)
    return copy.deepcopy(result)


def _absorb(conv: nn.Module, norm: nn.Module, path: str) -> None:
    if not isinstance(norm, _BatchNorm):
        raise RetrofitError(f"after {path} comes a {type(norm).__name__}, not a BatchNorm")
    if norm.running_mean is None or norm.running_var is None:
        raise RetrofitError(
            f"the BatchNorm after {path} has no running statistics (track_running_stats=False): "
            "what it computes depends on the batch and cannot be folded"
        )
    alpha, shift = _scale_and_shift(norm)
    if bool((alpha == 1).all() and (shift == 0).all()):
        return
    if "weight" not in conv._parameters:
        raise RetrofitError(
            f"the weight of {path} is parametrized: remove the parametrization (or weight_norm) "
            "before folding"
        )
    folded = _absorbed(conv, alpha, shift)
    if not _computes(folded, conv, alpha, shift):
        raise RetrofitError(
            f"the output of {path}, a {type(conv).__name__}, does not follow its weight and bias "
            "linearly (or has a hook): the BatchNorm after it cannot be folded"
        )
    conv.weight, conv.bias = folded.weight, folded.bias


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """alpha and shift, in float32 or, for a float64 BatchNorm, in float64."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    arrays = [t.to(dtype).cpu().numpy() for t in (mean, var, gamma, beta)]
    alpha, shift = scale_and_shift(arrays[0], arrays[1], arrays[2], arrays[3], norm.eps)
    return torch.from_numpy(alpha).to(mean.device), torch.from_numpy(shift).to(mean.device)


def _absorbed(conv: nn.Module, alpha: Tensor, shift: Tensor) -> nn.Module:
    """A copy of `conv` that computes alpha * conv(x) + shift."""
    weight: nn.Parameter = conv.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = conv.bias  # type: ignore[assignment]
    new_weight, new_bias = fold_weights(
        weight.detach(),
        None if bias is None else bias.detach(),
        alpha,
        shift,
        transposed=is_transposed(conv),
        groups=int(conv.groups),  # type: ignore[arg-type]
    )
    folded = shared_copy(conv)
    folded.weight = nn.Parameter(new_weight, weight.requires_grad)
    if new_bias is not None:
        learns = weight.requires_grad if bias is None else bias.requires_grad
        folded.bias = nn.Parameter(new_bias, learns)
    return folded


def _computes(folded: nn.Module, conv: nn.Module, alpha: Tensor, shift: Tensor) -> bool:
    """Whether `folded` computes alpha * conv(x) + shift. torch's own convolutions do; a subclass
    with a forward of its own (weight standardisation, an activation) is asked by trying."""
    if conv._forward_hooks or conv._forward_pre_hooks:
        return False
    if type(conv).__module__ == "torch.nn.modules.conv":
        return True
    generator = torch.Generator().manual_seed(0)
    size = [32 + kernel for kernel in conv.kernel_size]  # type: ignore[union-attr]
    x = torch.randn(2, int(conv.in_channels), *size, generator=generator)  # type: ignore[arg-type]
    weight: Tensor = conv.weight  # type: ignore[assignment]
    try:
        with torch.no_grad(), evaluating(conv, folded):
            x = x.to(weight.device, weight.dtype)
            scale, offset = (t.view(-1, *[1] * len(size)) for t in (alpha, shift))
            expected = conv(x) * scale + offset
            error = (folded(x) - expected).norm() / expected.norm()
    except Exception:  # noqa: BLE001 - its forward takes something else
        return False
    return bool(error < (1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2))


def _is_batchnorm(module: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """One of torch's own; a subclass may do more, such as timm's BatchNormAct2d."""
    own = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return isinstance(module, _BatchNorm) and own and not module._forward_hooks


def _pairs(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Convolutions and the BatchNorm that alone reads each: by path of the convolution."""
    calls: dict[nn.Module, list[Call]] = {}
    for call in trace(model).calls:
        if call.module is not None:
            calls.setdefault(call.module, []).append(call)
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for conv, made in calls.items():
        if not is_conv(conv):
            continue
        users = [user for call in made for user in call.users]
        norms = {user.module: user.path for user in users if _is_batchnorm(user.module)}
        if len(norms) > 1:
            raise RetrofitError(
                f"{made[0].path} feeds several BatchNorms, {' and '.join(norms.values())}: its one "
                "weight cannot absorb them"
            )
        for norm in norms:
            if norm is not None and len(users) == len(made) == len(calls[norm]):
                pairs[made[0].path] = (conv, norm)
    return pairs
