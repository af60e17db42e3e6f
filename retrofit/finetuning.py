"""What a training loop needs to know of BatchNorm."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(model: nn.Module) -> None:
    """Let the BatchNorms of `model` use their running statistics, in train mode too.

    They are put in eval mode and stay there through `.train()` of the model or of any module above
    them. weight and bias still learn. Undone by `unfreeze_statistics`. Freeze after
    `SyncBatchNorm.convert_sync_batchnorm`, which makes new layers.
    """
    for norm in _batchnorms(model):
        vars(norm)["train"] = _StayInEval(norm)
        norm.training = False


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`: the BatchNorms take on the mode of `model` and follow it again."""
    for norm in _batchnorms(model):
        if isinstance(vars(norm).get("train"), _StayInEval):
            del vars(norm)["train"]
            norm.train(model.training)


def param_groups(model: nn.Module, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer: no weight decay on BatchNorm and biases.

    BatchNorm's weight and bias, and every other bias, go without, as is usual. A retrofitted
    BatchNorm's weight is the standard deviation of its channel, not 1, so that decay pulls it
    away from what the network has learned; over some hundred steps that did no harm either
    (docs/results.md).

    Args:
        model: parameters that require no gradient are left out.
        weight_decay: of the weights of all other layers. Ten times the default cost two points of
            accuracy there.

    Returns:
        Two groups, `[{"params": ..., "weight_decay": weight_decay}, {..., "weight_decay": 0.0}]`.

    Example:
        >>> torch.optim.SGD(retrofit.param_groups(model), lr=0.01, momentum=0.9)
    """
    norms = {id(p) for norm in _batchnorms(model) for p in norm.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.rpartition(".")[2] == "bias"
            (free if bias or id(parameter) in norms else decayed).append(parameter)
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
