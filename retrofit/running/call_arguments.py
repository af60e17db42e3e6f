"""What a batch is: how a model is called with it (a detector with a list of images, say).

And which tensors are in it, or come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import explained, refuse_single_sample
from retrofit.running.first_argument import first_argument
from retrofit.running.nested import first_tensor
from retrofit.running.signatures import first_kinds, sample_axes, signature_of

ForwardFn = Callable[[nn.Module, Any], object]


class Arguments(NamedTuple):
    """The arguments of one forward pass: `model(*args, **kwargs)`.

    Attributes:
        args, kwargs: what the model is called with.
        axes: of one sample, without the batch: 3 of a picture. It tells lists of pictures from
            lists of feature maps.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: int = 3

    @property
    def images(self) -> int:
        """How many samples: the length of the first tensor, or of a list of images."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, (list, tuple)) and _are_samples(first, self.axes):
            return len(first)
        tensor = first_tensor((self.args, self.kwargs))
        return len(tensor) if tensor is not None and tensor.dim() else 0

    def head(self, most: int | None) -> Arguments:
        """Take the first `most` samples; None for all."""
        return self.part(0, most)

    def part(self, first: int, end: int | None) -> Arguments:
        """Take the samples from `first` up to `end`, exclusive; None for the last one."""
        images = self.images
        if first == 0 and (end is None or end >= images):
            return self

        def cut(value: Any) -> Any:
            listed = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
            if listed and len(value) == images and not _are_batches(value, self.axes):
                return value[first:end]  # images, or what belongs to each, such as targets
            return tree_map_only(
                Tensor, lambda t: t[first:end] if t.dim() and len(t) == images else t, value
            )

        return self._replace(
            args=tuple(map(cut, self.args)), kwargs={k: cut(v) for k, v in self.kwargs.items()}
        )

    def to(self, device: torch.device | None, *, copy: bool = False) -> Arguments:
        """Move all tensors to a device; `copy` them, since a model may write to its input."""
        args, kwargs = tree_map_only(
            Tensor,
            # From pinned memory, while the GPU still computes.
            lambda t: t.to(
                device, copy=copy, non_blocking=device is not None and device.type == "cuda"
            ),
            (self.args, self.kwargs),
        )
        return self._replace(args=args, kwargs=kwargs)


def arguments_of(model: nn.Module, batch: Any) -> Arguments:
    """Decide how `model` is called with a batch, by default.

    - A tensor is the input.
    - A mapping that has all arguments that `forward` requires is passed by name; what `forward`
      does not take (labels, say) is left out.
    - Of a tuple or list, as many leading items as `forward` requires: (images, labels) gives
      `model(images)`, and (image1, image2, flow) gives `model(image1, image2)`. What it takes by
      name alone, as the program of an export with keywords, it gets by name.
    - Where `forward` requires one argument, that is what it is annotated as: a list or tuple of
      tensors (feature maps, or a detector's pictures), a mapping of them, or else the first tensor
      in the batch. A list of tensors is taken from the batch, or is the batch; a detector also gets
      all images of one tensor, as a list.

    Raises RetrofitError when the batch does not have what `forward` requires, or could be meant in
    two ways; `forward_fn` is for every other way of calling a model.
    """
    axes = sample_axes(model)
    forward, named = signature_of(model)
    required = [n for n, p in named.items() if p.default is p.empty]
    kinds = first_kinds(model) if len(required) < 2 else set()
    if isinstance(batch, Mapping) and set(required) <= batch.keys() and named.keys() & batch.keys():
        by_name = {name: batch[name] for name in named if name in batch}
        if kinds != {"mapping"} or isinstance(by_name.get(next(iter(named))), Mapping):
            return _placed(named, by_name, axes, by_place=[Parameter.POSITIONAL_ONLY])
    if len(required) > 1:
        if isinstance(batch, (list, tuple)) and len(batch) >= len(required):
            refuse_single_sample(model, batch)
            return _placed(named, dict(zip(required, batch, strict=False)), axes)
        raise RetrofitError(
            f"{type(forward).__name__} takes {' and '.join(required)}: give batches that are "
            "tuples of these or dicts with these keys, or pass forward_fn= to say how the model is "
            "called"
        )
    value = first_argument(model, batch, kinds, axes)
    return _placed(named, {required[0]: value}, axes) if required else Arguments((value,), {}, axes)


def _placed(
    named: Mapping[str, Parameter],
    values: Mapping[str, Any],
    axes: int,
    by_place: Collection[Any] = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD),
) -> Arguments:
    """Pass values by place, where `forward` takes them so, and by name."""
    args = tuple(value for name, value in values.items() if named[name].kind in by_place)
    by_name = {n: value for n, value in values.items() if named[n].kind not in by_place}
    return Arguments(args, by_name, axes)


def images_in(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> int:
    """Count the samples in a batch; 0 if that cannot be told."""
    if forward_fn is None:
        return arguments_of(model, batch).images
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (list, tuple)):
        batch = batch[0]  # of images, beside their targets
    return Arguments((batch,), {}, sample_axes(model)).images


def _are_samples(value: Sequence[Any], axes: int) -> bool:
    """Tell whether this is a list of samples: tensors without a batch axis, or mappings."""
    tensors_alone = all(isinstance(item, Tensor) and item.dim() <= axes for item in value)
    return tensors_alone or all(isinstance(item, Mapping) for item in value)


def _are_batches(value: Sequence[Any], axes: int) -> bool:
    """Tell whether this is a list of tensors with a batch axis, such as feature maps."""
    return all(isinstance(item, Tensor) and item.dim() > axes for item in value)


def home(model: nn.Module) -> torch.device | None:
    """Find the device of the model's first parameter; None without parameters."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


def call_model(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Any:
    """Call the model with a batch, on the model's device: see `arguments_of`, or `forward_fn`.

    Raises RetrofitError in place of the model's own error where the batch is plainly the cause.
    """
    if forward_fn is not None:
        with explained(model, batch):
            return forward_fn(model, batch)
    arguments = arguments_of(model, batch).to(home(model), copy=True)
    with explained(model, arguments):
        return model(*arguments.args, **arguments.kwargs)
