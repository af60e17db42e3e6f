"""Where a model runs for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from retrofit.errors import RetrofitError
from retrofit.running.call_arguments import home


@contextmanager
def on_device(
    device: torch.device | str | None, *models: nn.Module
) -> Iterator[torch.device | None]:
    """Move models to `device`, and afterwards every tensor back to where it was.

    Yields where the first one runs. Without a device they stay where they are.
    """
    homes = [home(model) for model in models]
    for model, origin in zip(models, homes, strict=True):
        if origin is not None and origin.type == "meta":
            raise RetrofitError(
                f"this {type(model).__name__} is on the meta device: give it tensors first "
                "(to_empty, load_state_dict)"
            )
    if device is None or all(origin is None or str(device) == str(origin) for origin in homes):
        yield homes[0]
        return
    target, together = usable(device), nn.ModuleList(models)  # which may have parts in common
    parameters = [(p, p.data, p.grad) for p in together.parameters()]
    # A buffer is replaced on its way, and so is a parameter on some devices.
    places: list[tuple[dict[str, Any], str, Any]] = [
        (tensors, name, tensor)
        for module in together.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
    ]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # which would move along
        together.to(target)
        yield target
    finally:
        for parameter, data, grad in parameters:
            parameter.data = data
            parameter.grad = grad
        for tensors, name, tensor in places:
            tensors[name] = tensor


def usable(device: torch.device | str) -> torch.device:
    """Return the device that this names; RetrofitError if nothing can be computed on it."""
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # meta has no items
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        if not isinstance(device, (str, torch.device)) or str(device).startswith("gpu"):
            reason = 'torch calls its devices "cpu", "cuda", "cuda:1" or "mps"'
        raise RetrofitError(f"device {device} cannot be used here: {reason}") from error
    return target
