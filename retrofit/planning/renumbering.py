"""Sequentials in which a BatchNorm becomes a child of its own, and later children move up."""

from __future__ import annotations

from torch import nn
from torchvision.models import VGG

from retrofit.errors import RetrofitError
from retrofit.tracing.calls import Trace


def renumbered(
    model: nn.Module, trace: Trace, requested: tuple[str, ...] | None
) -> tuple[str, ...]:
    """List the Sequentials to renumber: the requested ones, or by default `features` of a VGG.

    Raises RetrofitError for a requested one whose children cannot move.
    """
    if requested is None:
        vgg = isinstance(model, VGG) and not _obstacle(model, trace, "features")
        return ("features",) if vgg else ()
    for path in requested:
        if obstacle := _obstacle(model, trace, path):
            raise RetrofitError(
                f"cannot renumber {path or 'the model'}: {obstacle}; leave it out of renumber="
            )
    return requested


def _obstacle(model: nn.Module, trace: Trace, path: str) -> str | None:
    """Say why the children of this Sequential cannot move up; None if they can."""
    try:
        sequential = model.get_submodule(path)
    except AttributeError:
        return f"{type(model).__name__} has no such module"
    if type(sequential).forward is not nn.Sequential.forward:
        return f"it is a {type(sequential).__name__}, not an nn.Sequential"
    if list(sequential._modules) != [str(i) for i in range(len(sequential._modules))]:
        return "its children have names of their own"
    if path and trace.is_inside_opaque(path):
        return "code that torch.fx cannot follow may call its children (pass example)"
    if path:
        for call in trace.calls:
            below = call.module is not None and call.path.startswith(f"{path}.")
            if below and path not in call.inside:
                return f"{call.path} is called from outside its forward"
    return None
