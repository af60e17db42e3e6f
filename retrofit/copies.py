"""Copies of a model that share its tensors."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from retrofit.errors import RetrofitError

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """The same modules over the same parameter storage.

    Parameters are new objects, or moving the copy would move the original; ties stay ties.
    Buffers are copied, since forward may write to them. Gradients are left behind.

    Raises RetrofitError when the model holds something that cannot be copied, such as a lock.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter:
                shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                memo.setdefault(id(parameter), shared)
        for value in vars(module).values():  # such as the weight that weight_norm computed
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach())
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise RetrofitError(f"this {type(model).__name__} cannot be copied: {error}") from error
