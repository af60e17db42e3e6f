"""Batches taken apart, and put together anew in other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import described
from retrofit.running.call_arguments import ForwardFn, arguments_of, call_model
from retrofit.running.nested import tensors


@dataclass(frozen=True)
class Images:
    """Images that can be regrouped, and what the original gives for each.

    Attributes:
        inputs: tensors with one entry for each image.
        form: how a batch is put together of them.
        forward_fn: as for `drift`.
        expected: tensors with one entry for each image, too; none where the outputs are not so.
    """

    inputs: tuple[Tensor, ...]
    form: TreeSpec
    forward_fn: ForwardFn | None
    expected: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def shape(self) -> tuple[object, ...]:
        """What all images have in common."""
        return self.form, *(tensor.shape[1:] for tensor in self.inputs)

    @property
    def batch(self) -> Any:
        """Put a batch together; a model may write to it, so one that is needed again is copied."""
        return tree_unflatten(list(self.inputs), self.form)

    def copied(self, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> Images:
        """Return copies of the images."""
        return replace(self, inputs=tuple(map(copy, self.inputs)))

    def run(self, model: nn.Module) -> dict[str, Tensor]:
        """List what a model returns for them, in the mode that it is in; it may write to them."""
        with torch.no_grad():
            return tensors(call_model(model, self.batch, self.forward_fn), "output")

    def part(self, first: int, end: int | None) -> Images:
        """Take the images from `first` up to `end`, exclusive; None for the last one."""
        expected = {name: tensor[first:end] for name, tensor in self.expected.items()}
        inputs = tuple(tensor[first:end] for tensor in self.inputs)
        return replace(self, inputs=inputs, expected=expected)


def joined(parts: list[Images]) -> Images:
    """Put copies of images together to one batch."""
    inputs = tuple(map(torch.cat, zip(*(part.inputs for part in parts), strict=True)))
    names = parts[0].expected
    expected = {name: torch.cat([part.expected[name] for part in parts]) for name in names}
    return replace(parts[0], inputs=inputs, expected=expected)


def regroupable(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Images:
    """Take a batch apart: the one tensor that the model takes, or all that `forward_fn` may want.

    Raises RetrofitError for what cannot be put together anew.
    """
    if forward_fn is None:
        arguments = arguments_of(model, batch)
        values = (*arguments.args, *arguments.kwargs.values())
        if len(values) != 1 or not isinstance(values[0], Tensor):
            raise RetrofitError(
                f"{type(model).__name__} takes more than one tensor: drift regroups pictures, and "
                "does so for models of one input alone; pass forward_fn= to call it with more"
            )
        (batch,) = values
    leaves, form = tree_flatten(batch)
    lengths = {len(x) if isinstance(x, Tensor) and x.dim() else None for x in leaves}
    if len(lengths) != 1 or None in lengths:
        raise RetrofitError(
            "drift regroups batches, and can only where all that is in them are tensors with one "
            f"entry for each image; it got {described(batch)}: leave out what forward_fn does not "
            "need"
        )
    return Images(tuple(leaves), form, forward_fn)
