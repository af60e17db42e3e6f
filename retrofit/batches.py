"""What a batch is: how the model is called with one, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import RetrofitError

ForwardFn = Callable[[nn.Module, Any], object]


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor of nested tuples, lists and dicts; None if there is none."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((x for item in batch if (x := first_tensor(item)) is not None), None)


def input_of(batch: Any) -> Tensor:
    """The model's input in a batch; RetrofitError when there is none to feed to a convolution."""
    x = first_tensor(batch)
    if x is None:
        raise RetrofitError(
            f"a batch of type {type(batch).__name__} holds no tensor: pass forward_fn= to say how "
            "the model is called"
        )
    if not x.is_floating_point():
        raise RetrofitError(
            f"the batches are {x.dtype} of shape {tuple(x.shape)}: convert them to float and "
            "normalise them as the model was trained"
        )
    return x


def refuse_single_tensor(data: Iterable[Any]) -> None:
    """A tensor is iterable too, and yields images without a batch axis."""
    if isinstance(data, Tensor):
        raise RetrofitError(
            f"data is one tensor of shape {tuple(data.shape)}: pass an iterable of batches, "
            "such as [images] or images.split(32)"
        )


def home(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter; None without parameters."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


def run(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Any:
    """Call the model with a batch: with its first tensor, on the model's device, by default.

    The tensor is a copy, since a model may write to its input.
    """
    if forward_fn is not None:
        return forward_fn(model, batch)
    return model(input_of(batch).to(home(model), copy=True))
