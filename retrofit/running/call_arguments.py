"""What a batch is: how a model is called with it (a detector with a list of images, say).

And which tensors are in it, or come out.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from retrofit.errors import RetrofitError

_TAKES_LIST = re.compile(r"#\s*type:\s*\(\s*([Ll]ist|Sequence)\[")
ForwardFn = Callable[[nn.Module, Any], object]


class Arguments(NamedTuple):
    """The arguments of one forward pass: `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def images(self) -> int:
        """How many samples: the length of the first tensor, or of a list of images."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, (list, tuple)) and _is_images(first):
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
            if isinstance(value, (list, tuple)) and len(value) == images and not _batched(value):
                return value[first:end]  # images, or what belongs to each, such as targets
            return tree_map_only(
                Tensor, lambda t: t[first:end] if t.dim() and len(t) == images else t, value
            )

        return Arguments(tuple(map(cut, self.args)), {k: cut(v) for k, v in self.kwargs.items()})

    def to(self, device: torch.device | None, *, copy: bool = False) -> Arguments:
        """Move all tensors to a device; `copy` them, since a model may write to its input."""
        return Arguments(
            *tree_map_only(
                Tensor,
                # From pinned memory, while the GPU still computes.
                lambda t: t.to(
                    device, copy=copy, non_blocking=device is not None and device.type == "cuda"
                ),
                (self.args, self.kwargs),
            )
        )


def arguments_of(model: nn.Module, batch: Any) -> Arguments:
    """Decide how `model` is called with a batch, by default.

    - A tensor is the input.
    - A mapping that has all arguments that `forward` requires is passed by name; what `forward`
      does not take (labels, say) is left out.
    - Of a tuple or list, as many leading items as `forward` requires: (images, labels) gives
      `model(images)`, and (image1, image2, flow) gives `model(image1, image2)`.
    - Where `forward` requires one argument, that is the first tensor in the batch; or, if it is
      annotated as a list (torchvision's detectors), the first list of tensors, or all images of the
      first tensor.

    Raises RetrofitError when the batch does not have what `forward` requires; `forward_fn` is for
    every other way of calling a model.
    """
    model, named = _signature(model)
    required = [n for n, p in named.items() if p.default is p.empty]
    if isinstance(batch, Mapping) and set(required) <= batch.keys() and named.keys() & batch.keys():
        return Arguments((), {name: batch[name] for name in named if name in batch})
    if len(required) > 1:
        if isinstance(batch, (list, tuple)) and len(batch) >= len(required):
            return Arguments(tuple(batch[: len(required)]), {})
        raise RetrofitError(
            f"{type(model).__name__} takes {' and '.join(required)}: give batches that are tuples "
            "of these or dicts with these keys, or pass forward_fn= to say how the model is called"
        )
    if takes_lists(model):
        return Arguments((_images(batch),), {})
    if required and named[required[0]].kind is inspect.Parameter.KEYWORD_ONLY:
        return Arguments((), {required[0]: input_of(batch)})
    return Arguments((input_of(batch),), {})


def images_in(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> int:
    """Count the samples in a batch; 0 if that cannot be told."""
    if forward_fn is None:
        return arguments_of(model, batch).images
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (list, tuple)):
        batch = batch[0]  # of images, beside their targets
    return Arguments((batch,), {}).images


def _signature(model: nn.Module) -> tuple[nn.Module, dict[str, inspect.Parameter]]:
    """Find what `forward` takes by name; of a wrapper, such as DataParallel, what is inside."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except ValueError:  # a traced TorchScript module
        return model, {}
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for name in () if named else ("module", "_orig_mod"):
        if isinstance(inside := getattr(model, name, None), nn.Module):
            return _signature(inside)
    return model, named


def takes_lists(model: nn.Module) -> bool:
    """Tell whether `model` is annotated to take a list of images, as torchvision's detectors."""
    model, named = _signature(model)
    parameter = next(iter(named), "")
    try:
        hint = typing.get_type_hints(model.forward).get(parameter)
        source = "" if hint else inspect.getsource(model.forward)
    except Exception:  # noqa: BLE001 - an annotation may be any text, and is evaluated
        return False
    # RetinaNet has its types in a comment, as TorchScript took them.
    return typing.get_origin(hint) in (list, Sequence, Iterable) or bool(_TAKES_LIST.search(source))


def _images(batch: Any) -> list[Tensor]:
    """Find the first list of tensors in a batch, or the images of its first tensor."""
    if isinstance(batch, (list, tuple)) and batch:
        return list(batch) if _is_images(batch) else _images(batch[0])
    return list(input_of(batch))


def _is_images(value: Sequence[Any]) -> bool:
    """Tell whether this is a list of tensors without a batch axis."""
    return all(isinstance(item, Tensor) and item.dim() < 4 for item in value)


def _batched(value: Sequence[Any]) -> bool:
    """Tell whether this is a list of tensors with a batch axis, such as feature maps."""
    return all(isinstance(item, Tensor) and item.dim() > 3 for item in value)


def input_of(batch: Any) -> Tensor:
    """Find the first tensor in a batch; RetrofitError when no convolution could take it."""
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


def first_tensor(value: Any) -> Tensor | None:
    """Find the first tensor in nested values; None if there is none."""
    return next(iter(tensors(value).values()), None)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """List all tensors in nested values by their place: "output", "output[1].boxes".

    Looks into mappings, lists, tuples, dataclasses, and objects with attributes such as
    SimpleNamespace.
    """
    return dict(_walk(value, name, set()))


def _walk(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterable[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = ((f"{name}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"{name}[{i}]", item) for i, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        items = ((f"{name}.{key}", item) for key, item in vars(value).items())
    else:
        return
    if id(value) not in above:  # an object may hold itself
        for place, item in items:
            yield from _walk(item, place, above | {id(value)})


def refuse_single_tensor(data: Iterable[Any]) -> None:
    """Raise RetrofitError for a tensor: it is iterable too, and yields unbatched images."""
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise RetrofitError(f"data must be an iterable of batches, not {type(data).__name__}")
    if isinstance(data, Tensor):
        raise RetrofitError(
            f"data is one tensor of shape {tuple(data.shape)}: pass an iterable of batches, "
            "such as [images] or images.split(32)"
        )


def home(model: nn.Module) -> torch.device | None:
    """Find the device of the model's first parameter; None without parameters."""
    first = next(model.parameters(), None)
    return None if first is None else first.device


def call_model(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Any:
    """Call the model with a batch, on the model's device: see `arguments_of`, or `forward_fn`."""
    if forward_fn is not None:
        return forward_fn(model, batch)
    arguments = arguments_of(model, batch).to(home(model), copy=True)
    return model(*arguments.args, **arguments.kwargs)
