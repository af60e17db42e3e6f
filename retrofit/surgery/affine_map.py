"""What a BatchNorm computes in eval mode: scale and shift of each channel, and what follows.

torch's own are read off their buffers. Of others (timm's BatchNormAct2d, torchvision's
FrozenBatchNorm2d, detectron2's) nobody knows but by trying.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod

from retrofit.errors import RetrofitError
from retrofit.numerics.exact_identity import scale_and_shift
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.running.modes import evaluating
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.batchnorm import LastAxisBatchNorm

OWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SIZES = (5, 6, 7)  # of the spatial axes that are tried
TOLERANCE = 1e-5  # of the largest value: some compute in float32 whatever they get


class UnfoldableError(RetrofitError):
    """A BatchNorm cannot be folded; in the reason, "{layer}" stands for the layer before it."""

    def after(self, layer: str) -> str:
        """Give the reason, with the layer by this name."""
        return str(self).replace("{layer}", layer)


class AffineMap(NamedTuple):
    """What a BatchNorm computes in eval mode: rest(alpha * x + shift).

    Attributes:
        alpha, shift: (C,), on the device of the running statistics.
        rest: takes the place of the BatchNorm once alpha and shift are absorbed.
    """

    alpha: Tensor
    shift: Tensor
    rest: nn.Module

    @property
    def is_identity(self) -> bool:
        """Tell whether alpha and shift change nothing."""
        return bool((self.alpha == 1).all() and (self.shift == 0).all())


def is_batchnorm(module: nn.Module) -> bool:
    """Tell whether this is a BatchNorm: torch's, a subclass, or named and built like one.

    Those in TorchScript too.
    """
    if isinstance(module, torch.jit.ScriptModule):
        names = [str(module.original_name)]
    else:
        names = [kind.__name__ for kind in type(module).__mro__]
    built = all(
        isinstance(getattr(module, n, None), Tensor) for n in ("running_mean", "running_var")
    )
    return isinstance(module, _BatchNorm) or (built and any("BatchNorm" in name for name in names))


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """List the BatchNorms of a model, by path."""
    return {path: module for path, module in model.named_modules() if is_batchnorm(module)}


def affine_map(norm: nn.Module) -> AffineMap:
    """Find what a BatchNorm (or a LastAxisBatchNorm) computes in eval mode; it is not changed.

    Raises UnfoldableError where that is no scale and shift of each channel, with a reason.
    """
    inner = norm.bn if isinstance(norm, LastAxisBatchNorm) else norm
    for module in (norm, inner):
        refuse_hooks(module)
    _refuse_statistics(inner)
    if type(inner) in OWN and not is_patched(inner):
        found = AffineMap(*_read(inner), nn.Identity())
    else:
        found = _tried(inner)
    if not (found.alpha.isfinite().all() and found.shift.isfinite().all()):
        raise _divides_by_zero(inner) or _not_finite()
    return found


def _refuse_statistics(norm: nn.Module) -> None:
    """Raise UnfoldableError for running statistics that are missing or no numbers."""
    missing = [name for name in ("running_mean", "running_var") if getattr(norm, name) is None]
    if len(missing) == 2:
        raise UnfoldableError(
            "the BatchNorm after {layer} has no running statistics (track_running_stats=False): "
            "what it computes depends on the batch and cannot be folded"
        )
    if missing:
        raise UnfoldableError(
            f"the BatchNorm after {{layer}} has no {missing[0]}, without which it does not run in "
            "eval mode: set it"
        )
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    if mean.is_meta:
        raise UnfoldableError(
            "the BatchNorm after {layer} is on the meta device and has no numbers"
        )
    if not are_statistics(mean, norm.running_var):  # type: ignore[arg-type]
        raise _not_finite()


def refuse_hooks(norm: nn.Module) -> None:
    """Raise UnfoldableError for a BatchNorm with hooks, which folding would lose."""
    refuse_pruned(norm, "the BatchNorm after {layer}")
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(norm, table) for table in tables):
        raise UnfoldableError(
            "the BatchNorm after {layer} has a hook, which folding would lose: remove it"
        )


def refuse_pruned(module: nn.Module, name: str) -> None:
    """Raise UnfoldableError for tensors that torch.nn.utils.prune masks at each call."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            raise UnfoldableError(
                f"the {hook._tensor_name} of {name} is pruned at each call: make that lasting with "
                f"torch.nn.utils.prune.remove(module, {hook._tensor_name!r})"
            )


def is_patched(module: nn.Module) -> bool:
    """Tell whether somebody gave this one module, not its class, another forward."""
    return not vars(module).keys().isdisjoint(("forward", "_conv_forward"))


def _not_finite() -> UnfoldableError:
    return UnfoldableError(
        "the BatchNorm after {layer} has a NaN, an Inf or a negative running_var: folded, it would "
        "spoil the weights"
    )


def _divides_by_zero(norm: nn.Module) -> UnfoldableError | None:
    var: Tensor = norm.running_var  # type: ignore[assignment]
    eps = getattr(norm, "eps", None)
    if not isinstance(eps, (int, float)) or bool((var + eps).all()):
        return None
    return UnfoldableError(
        f"the BatchNorm after {{layer}} divides by zero: a running_var of 0, and eps={eps:g}"
    )


def _read(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute alpha and shift as torch's kernel does, in float32, or float64 for float64."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    var: Tensor = norm.running_var  # type: ignore[assignment]
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()  # type: ignore[operator]
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()  # type: ignore[operator]
    device, dtype = mean.device, torch.float64 if mean.dtype == torch.float64 else torch.float32
    mean, var, gamma, beta = (t.to("cpu", dtype) for t in (mean, var, gamma, beta))
    eps: float = norm.eps  # type: ignore[assignment]
    alpha, shift = scale_and_shift(mean.numpy(), var.numpy(), gamma.numpy(), beta.numpy(), eps)
    return torch.from_numpy(alpha).to(device), torch.from_numpy(shift).to(device)


# --- by trying ---------------------------------------------------------------------------------


def _tried(norm: nn.Module) -> AffineMap:
    """Find alpha and shift of a BatchNorm with a forward of its own, in float64.

    What it has inside (dropout, an activation) must come after them, in the order of registration.
    """
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    whole = shared_copy(norm).to("cpu", torch.float64)
    bare = shared_copy(whole)
    for name in _parts(bare):
        bare._modules[name] = nn.Identity()
    after = nn.Sequential(*_parts(whole).values())
    with torch.no_grad(), evaluating(whole, bare, after):
        for axes in (2, 1, 0, 3):
            measured = _measured(bare, whole, after, len(mean), axes)
            if measured is not None:
                alpha, shift = (tensor.to(mean.device) for tensor in _exact(norm, measured))
                return AffineMap(alpha, shift, _rest(norm))
    raise UnfoldableError(
        f"the BatchNorm after {{layer}}, a {type(norm).__name__}, computes something else than a "
        "scale and a shift, dropout and an activation"
    )


def _measured(
    bare: nn.Module, whole: nn.Module, after: nn.Module, channels: int, axes: int
) -> tuple[Tensor, Tensor] | None:
    """Measure alpha and shift on inputs of so many spatial axes; None where they are not all."""
    x = torch.randn(
        (4, channels, *SIZES[:axes]),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        device="cpu",
    )
    try:
        at_zero, at_one = bare(torch.zeros_like(x)), bare(torch.ones_like(x))
        shift = at_zero.movedim(1, 0).flatten(1)[:, 0]
        alpha = at_one.movedim(1, 0).flatten(1)[:, 0] - shift
        scale, offset = (tensor.view(-1, *[1] * axes) for tensor in (alpha, shift))
        expected = x * scale + offset
        fits = _close(bare(x.clone()), expected) and _close(whole(x.clone()), after(expected))
    except Exception:  # noqa: BLE001 - its forward takes something else
        return None
    return (alpha, shift) if fits else None


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    )


def _exact(norm: nn.Module, measured: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take what torch's kernel would compute if it is the same, so that an identity is exact."""
    if not isinstance(norm, _BatchNorm):
        return measured
    read = _read(norm)
    alpha, shift = (tensor.to("cpu", torch.float64) for tensor in read)
    sizes = measured[0].abs(), (norm.running_mean.cpu() * alpha).abs() + shift.abs()  # type: ignore[union-attr]
    errors = (alpha - measured[0]).abs(), (shift - measured[1]).abs()
    return (
        read if all((e <= 1e-6 * s).all() for e, s in zip(errors, sizes, strict=True)) else measured
    )


def _rest(norm: nn.Module) -> nn.Module:
    """Take what stays of `norm` under the names that it has there, so that keys stay too."""
    kept = {n: m for n, m in _parts(norm).items() if not isinstance(m, nn.Identity)}
    return nn.Sequential(OrderedDict(kept)) if kept else nn.Identity()


def _parts(norm: nn.Module) -> dict[str, nn.Module]:
    """List the modules inside, without those that parametrize its own weight."""
    return {name: module for name, module in norm.named_children() if name != "parametrizations"}
