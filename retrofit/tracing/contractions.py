"""Linear layers that are written out: `(x[:, None] * self.weight).sum(-1)`.

A scale by a parameter, `x * self.gamma`, is no layer; it becomes one where a sum or a mean follows
at once over an axis that the parameter spans.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

SCALINGS = {"imul", "mul", "multiply", "rmul"}
SUMS = {"mean", "sum"}


def drops_weights(
    weight: Sequence[int], rank: int | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Tell whether a sum over a product drops an axis that a factor spans.

    Args:
        weight: the factor's shape, whose last axis is that of the product.
        rank: of the product; None where it is not known, nor what an axis from the front is then.
        args, kwargs: of the sum, `sum(x, dim)`.
    """
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if given is None:
        return any(size > 1 for size in weight)
    listed = given if isinstance(given, (tuple, list)) else (given,)
    axes = [axis for axis in listed if isinstance(axis, int) and (axis < 0 or rank)]
    from_behind = [axis if axis < 0 else axis - (rank or 0) for axis in axes]
    return any(-len(weight) <= axis and weight[axis] > 1 for axis in from_behind)


def weight_shape(model: nn.Module, node: fx.Node) -> Sequence[int] | None:
    """Find the shape of what is made of parameters, and perhaps buffers, alone.

    None for anything else, such as a grid of coordinates, and where it is not known.
    """
    learned = False

    @functools.cache
    def value(one: fx.Node) -> Any:
        nonlocal learned
        if one.op == "get_attr":
            found = functools.reduce(getattr, str(one.target).split("."), model)
            learned |= isinstance(found, nn.Parameter)
            return found.detach().to("meta")  # type: ignore[operator]
        args, kwargs = fx.node.map_arg((one.args, one.kwargs), value)
        if one.op == "call_method":
            return getattr(args[0], str(one.target))(*args[1:], **kwargs)
        return one.target(*args, **kwargs)  # type: ignore[operator]

    try:
        found = value(node)
    except Exception:  # noqa: BLE001 - of any function there is, on tensors without numbers
        return None
    return found.shape if learned and isinstance(found, Tensor) else None
