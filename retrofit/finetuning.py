"""What a training loop needs to know of BatchNorm."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from retrofit.errors import RetrofitError, warn
from retrofit.option_checks import check_models, check_number

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def freeze_statistics(model: nn.Module) -> None:
    """Let the BatchNorms of `model` use their running statistics, in train mode too.

    They are put in eval mode and stay there through `.train()` of the model or of any module above
    them. weight and bias still learn. Undone by `unfreeze_statistics`. Freeze after
    `SyncBatchNorm.convert_sync_batchnorm`, which makes new layers.

    Args:
        model: any module with BatchNorms; changed in place.
    """
    check_models("freeze_statistics", model)
    if not _batchnorms(model):
        warn(f"this {type(model).__name__} has no BatchNorm: nothing is frozen")
    for norm in _batchnorms(model):
        vars(norm)["train"] = _StayInEval(norm)
        norm.training = False


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`: the BatchNorms take on the mode of `model` and follow it again.

    Args:
        model: the frozen one, or a module above or inside it; changed in place.
    """
    check_models("unfreeze_statistics", model)
    for norm in _batchnorms(model):
        if isinstance(vars(norm).get("train"), _StayInEval):
            del vars(norm)["train"]
            norm.train(model.training)


def param_groups(model: nn.Module, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer: no weight decay on norms, biases and vectors.

    Without decay go every parameter of one axis or none (the weights of norms of any library, layer
    scales), every one that is a bias by name (`bias`, `in_proj_bias`, `bias_ih_l0`,
    `relative_position_bias_table`), and the weights of torch's norms of any shape. That is timm's
    rule, and nanoGPT's. A retrofitted BatchNorm's weight is the standard deviation of its channel,
    not 1, so that decay pulls it away from what the network has learned; over some hundred steps
    that did no harm either (docs/results.md).

    Args:
        model: parameters that require no gradient are left out.
        weight_decay: of all other weights, from 0 up. Ten times the default cost two points of
            accuracy there.

    Returns:
        Always two groups, `[{"params": ..., "weight_decay": weight_decay}, {..., "weight_decay":
        0.0}]`. One of them may be empty, which torch's optimizers take: the first where only the
        BatchNorms learn, say.

    Raises:
        RetrofitError: no parameter requires a gradient, a lazy layer has no shape yet, or
            weight_decay is no number from 0 up.

    Examples:
        >>> torch.optim.SGD(retrofit.param_groups(model), lr=0.01, momentum=0.9)
    """
    check_models("param_groups", model)
    check_number("weight_decay", weight_decay, "be a number from 0 up", lambda w: 0 <= w < math.inf)
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise RetrofitError(f"{name} is lazy and has no shape yet: run one batch first")
        if parameter.requires_grad:
            bias = "bias" in name.rpartition(".")[2]
            vector = parameter.dim() < 2 or id(parameter) in norms
            (free if bias or vector else decayed).append(parameter)
    if not decayed and not free:
        raise RetrofitError(
            f"no parameter of this {type(model).__name__} requires a gradient, so an optimizer has "
            "nothing to learn: call model.requires_grad_(True), or that of the layers to train"
        )
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


class _StayInEval:
    """Stands in for a BatchNorm's `train` method. An object, for a model to pickle and copy."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> _BatchNorm:  # noqa: ARG002
        self.norm.training = False
        return self.norm


def _batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
