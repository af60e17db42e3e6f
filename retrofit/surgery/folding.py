"""BatchNorm absorbed into weight and bias of the layer before it: the inverse of the conversion.

What is computed for weight and bias stands in `numerics.folded_weights`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.errors import RetrofitError
from retrofit.numerics.exact_identity import scale_and_shift
from retrofit.numerics.folded_weights import fold_weights
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.plans import Plan
from retrofit.running.modes import evaluating
from retrofit.running.shared_copy import refuse_inference_mode, shared_copy, uncollected
from retrofit.surgery.batchnorm import LastAxisBatchNorm
from retrofit.surgery.native import find_site, replace, take_out
from retrofit.surgery.record import attach, record_of
from retrofit.tracing.calls import Call, Trace
from retrofit.tracing.operations import channels, is_affine, is_conv, is_transposed
from retrofit.tracing.read_model import read

M = TypeVar("M", bound=nn.Module)


@uncollected()
def fold(model: M, plan: Plan | None = None, *, example: Any = None) -> M:
    """Absorb the BatchNorms of a copy of `model` into the layers before them.

    The folded network computes, up to rounding, what `model` computes in eval mode. Right after
    the conversion, when each BatchNorm is the identity, the original state dict comes back bit
    for bit.

    Args:
        model: converted by this package, or any other with BatchNorm after convolutions or Linear
            layers; not changed.
        plan: which BatchNorms, and the containers to restore; by default the model's own, so that
            what was there before the conversion stays, even if the conversion added nothing. A
            model without one gets every torch.nn.BatchNorm folded that alone follows a layer
            (found with torch.fx, as far as it can follow), and nn.Identity in its place so that no
            index moves. Subclasses of BatchNorm stay, since they may do more; so does what the
            model's own code reads (`self.bn.weight`). A BatchNorm1d after a Linear layer is taken
            to get (N, F).
        example: without a plan, one batch, as for `plan`: the pairs are then read off a run,
            for models that torch.fx cannot follow.

    Raises:
        RetrofitError: the plan does not fit; without one, torch.fx cannot trace the model; a
            BatchNorm has no running statistics, or some that are no numbers; a layer feeds several
            BatchNorms; or, where the BatchNorm is not the identity: it comes after an activation or
            a function, the weight is parametrized or serves a function too, the layer has a hook,
            or its output does not follow its weight and bias linearly (weight standardisation).
    """
    refuse_inference_mode()
    record = record_of(model)
    plan = plan or (record.plan if record else None)
    result = shared_copy(model)
    if plan is not None:
        pairs = {site.path: _Pair(*find_site(result, site), site.host) for site in plan.inserted}
        activated = plan.placement == "post_activation"
    else:
        pairs, activated = _pairs(model, result, example), False
    _absorb_all(result, pairs, activated=activated)
    if plan is not None:
        take_out(result, plan)
    else:
        replace(result, {pair.norm: nn.Identity() for pair in pairs.values()})
    attach(result, None)
    return copy.deepcopy(result)


class _Pair(NamedTuple):
    """A BatchNorm and what it follows.

    Attributes:
        layer: None for a function.
        host: path of the layer or activation right before the BatchNorm.
    """

    layer: nn.Module | None
    norm: nn.Module
    host: str


def _absorb_all(model: nn.Module, pairs: dict[str, _Pair], *, activated: bool) -> None:
    """Give the layers new weights; those whose BatchNorm is the identity keep theirs.

    `activated`: an activation stands between each layer and its BatchNorm.
    """
    changing: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    for path, pair in pairs.items():
        alpha, shift = _scale_and_shift(_foldable(pair.norm, path), path)
        if bool((alpha == 1).all() and (shift == 0).all()):
            continue
        if activated:
            activation = f"its activation {pair.host}" if pair.host else "an activation"
            raise RetrofitError(
                f"the BatchNorm of {path} comes after {activation}: the weights before the "
                "activation cannot absorb it (placement='pre_activation' can be folded)"
            )
        if pair.layer is None:
            raise RetrofitError(
                f"{path} is a function: there is no layer that could absorb its BatchNorm"
            )
        if isinstance(model, fx.GraphModule) and _is_read(model, pair.layer):
            raise RetrofitError(
                f"the weight of {path} serves a function too: it cannot absorb the BatchNorm"
            )
        sharing = [p for p, other in pairs.items() if other.layer is pair.layer]
        if len(sharing) > 1:
            raise RetrofitError(
                f"one layer feeds the BatchNorms of {' and '.join(sharing)}: its one weight cannot "
                "absorb them"
            )
        changing[path] = (pair.layer, alpha, shift)
    for path, (layer, alpha, shift) in changing.items():
        _absorb(layer, alpha, shift, path)


def _is_read(model: fx.GraphModule, layer: nn.Module) -> bool:
    """Tell whether a graph uses this layer's parameters other than by calling it."""
    own = {id(parameter) for parameter in layer.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    return any(node.op == "get_attr" and node.target in names for node in model.graph.nodes)


def _foldable(norm: nn.Module, path: str) -> _BatchNorm:
    """Return the BatchNorm that `norm` is or holds; RetrofitError if it cannot be folded."""
    norm = norm.bn if isinstance(norm, LastAxisBatchNorm) else norm
    if not isinstance(norm, _BatchNorm):
        raise RetrofitError(f"after {path} comes a {type(norm).__name__}, not a BatchNorm")
    if norm.running_mean is None or norm.running_var is None:
        raise RetrofitError(
            f"the BatchNorm after {path} has no running statistics (track_running_stats=False): "
            "what it computes depends on the batch and cannot be folded"
        )
    return norm


def _absorb(layer: nn.Module, alpha: Tensor, shift: Tensor, path: str) -> None:
    """Give `layer` the weight and bias of alpha * layer(x) + shift."""
    if "weight" not in layer._parameters:
        raise RetrofitError(
            f"the weight of {path} is parametrized: remove the parametrization (or weight_norm) "
            "before folding"
        )
    folded = _absorbed(layer, alpha, shift)
    if not _computes(folded, layer, alpha, shift):
        raise RetrofitError(
            f"the output of {path}, a {type(layer).__name__}, does not follow its weight and bias "
            "linearly (or has a hook): the BatchNorm after it cannot be folded"
        )
    layer.weight, layer.bias = folded.weight, folded.bias


def _scale_and_shift(norm: _BatchNorm, path: str) -> tuple[Tensor, Tensor]:
    """Compute alpha and shift, in float32 or, for a float64 BatchNorm, in float64."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    device = mean.device
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    mean, var, gamma, beta = (t.to("cpu", dtype) for t in (mean, var, gamma, beta))
    if not (are_statistics(mean, var) and gamma.isfinite().all() and beta.isfinite().all()):
        raise RetrofitError(
            f"the BatchNorm after {path} has a NaN, an Inf or a negative running_var: folded, it "
            "would spoil the weights"
        )
    alpha, shift = scale_and_shift(mean.numpy(), var.numpy(), gamma.numpy(), beta.numpy(), norm.eps)
    return torch.from_numpy(alpha).to(device), torch.from_numpy(shift).to(device)


def _absorbed(layer: nn.Module, alpha: Tensor, shift: Tensor) -> nn.Module:
    """Make a copy of `layer` that computes alpha * layer(x) + shift."""
    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    new_weight, new_bias = fold_weights(
        weight.detach(),
        None if bias is None else bias.detach(),
        alpha,
        shift,
        transposed=is_transposed(layer),
        groups=int(getattr(layer, "groups", 1)),
    )
    folded = shared_copy(layer)
    folded.weight = nn.Parameter(new_weight, weight.requires_grad)
    if new_bias is not None:
        learns = weight.requires_grad if bias is None else bias.requires_grad
        folded.bias = nn.Parameter(new_bias, learns)
    return folded


def _computes(folded: nn.Module, layer: nn.Module, alpha: Tensor, shift: Tensor) -> bool:
    """Tell whether `folded` computes alpha * layer(x) + shift.

    torch's own layers do; a subclass with a forward of its own (weight standardisation, an
    activation) is asked by trying.
    """
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.linear"):
        return True
    generator = torch.Generator().manual_seed(0)
    if is_conv(layer):
        size = [
            32 + dilation * (kernel - 1) + 1
            for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        ]
        shape = [2, int(layer.in_channels), *size]  # type: ignore[arg-type]
    else:
        size, shape = [], [64, int(layer.in_features)]  # type: ignore[arg-type]
    weight: Tensor = layer.weight  # type: ignore[assignment]
    try:
        with torch.no_grad(), evaluating(layer, folded):
            x = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
            scale, offset = (t.view(-1, *[1] * len(size)) for t in (alpha, shift))
            expected = layer(x) * scale + offset
            error = (folded(x) - expected).norm() / expected.norm()
    except Exception:  # noqa: BLE001 - its forward takes something else
        return False
    return bool(error < (1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2))


def _is_foldable(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Tell whether this is torch's own; a subclass may do more, such as timm's BatchNormAct2d."""
    own = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return isinstance(module, _BatchNorm) and own and not hooked


def _pairs(model: nn.Module, copied: nn.Module, example: Any) -> dict[str, _Pair]:
    """Find layers of `copied`, and the BatchNorm that alone reads each: by path of the layer."""
    trace = read(model, example)
    if "" in trace.opaque:
        raise RetrofitError(
            f"torch.fx cannot trace this {type(model).__name__} ({trace.opaque['']}), so that "
            "nobody knows which layer a BatchNorm follows: pass example"
        )
    calls: dict[nn.Module, list[Call]] = {}
    for call in trace.calls:
        # What is inside of an opaque module may be called by code that nobody has seen.
        if call.module is not None and not trace.is_inside_opaque(call.path):
            calls.setdefault(copied.get_submodule(call.path), []).append(call)
    pairs: dict[str, _Pair] = {}
    for layer, made in calls.items():
        pair = _pair(copied, layer, calls, trace) if is_affine(layer) else None
        if pair is not None:
            pairs[made[0].path] = pair
    return pairs


def _pair(
    copied: nn.Module, layer: nn.Module, calls: dict[nn.Module, list[Call]], trace: Trace
) -> _Pair | None:
    """Pair `layer` with the one BatchNorm that reads it, if nothing else does and it fits."""
    made = calls[layer]
    users = [user for call in made for user in call.users]
    norms = {
        copied.get_submodule(user.path): user.path
        for user in users
        if user.module is not None and _is_foldable(user.module)
    }
    if len(norms) > 1:
        raise RetrofitError(
            f"{made[0].path} feeds several BatchNorms, {' and '.join(norms.values())}: its one "
            "weight cannot absorb them"
        )
    for norm, norm_path in norms.items():
        # A BatchNorm1d over (N, T, C) normalises T, which is not what a Linear gives C of.
        fits = is_conv(layer) or norm.num_features == channels(layer)
        alone = len(users) == len(made) == len(calls.get(norm, ()))
        is_read = {made[0].path, norm_path} & trace.reads.keys()
        if fits and alone and not is_read:
            return _Pair(layer, norm, made[0].path)
    return None
