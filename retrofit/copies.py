"""Copies of a model that share its tensors."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """The same modules over the same storage.

    Parameters are new objects, or moving the copy would move the original; ties stay ties.
    Gradients are left behind.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter:
                shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                memo.setdefault(id(parameter), shared)
        for buffer in module._buffers.values():
            if isinstance(buffer, Tensor):
                memo.setdefault(id(buffer), buffer.detach())
        for value in vars(module).values():  # such as the weight that weight_norm computed
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(model, memo)
