"""Feed the batches of `data` through a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from retrofit.batches import (
    Arguments,
    ForwardFn,
    arguments_of,
    first_tensor,
    home,
    images_in,
    refuse_single_tensor,
)
from retrofit.errors import NonFiniteError, RetrofitError
from retrofit.observer import MomentObserver

_END = object()


@dataclass(frozen=True)
class Fed:
    """How much was fed, and how many seconds were spent waiting for it."""

    images: int = 0
    batches: int = 0
    waited: float = field(default=0.0, compare=False)


def feed(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    call: Callable[[Arguments], object] | None = None,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
    start: Fed = Fed(),
    until: Callable[[Fed], bool] | None = None,
) -> Fed:
    """Run the batches of `data` through `model`, once, without gradients; modes are the caller's.

    Images are counted by the structure of the batch; where that tells nothing, by what the first
    of `layers` to be called got.

    Args:
        layers: what is measured, by path.
        call: runs the model; by default with nothing more than its arguments.
        device, max_images, forward_fn, progress: as for `calibrate`.
        start: what was fed before; the rest is counted on from there.
        until: asked after each batch, with all that was fed, whether that is enough.

    Raises:
        NonFiniteError: from one of `layers`; with the image's place in the data, if the layer gets
            one sample for each image.
    """
    refuse_single_tensor(data)
    if max_images is not None and max_images < 1:
        raise RetrofitError(f"max_images must be positive, not {max_images}")
    call = call or (lambda arguments: model(*arguments.args, **arguments.kwargs))
    fed, batches, first = start, iter(data), time.perf_counter()
    bar = tqdm(
        total=_total(data, max_images), initial=start.images, unit="img", disable=not progress
    )
    lengths = _first_length(layers)
    with bar, _moved(model, device) as target, torch.no_grad(), eager(), lengths as length:
        while max_images is None or fed.images < max_images:
            began = time.perf_counter()
            batch = next(batches, _END)
            fed = replace(fed, waited=fed.waited + time.perf_counter() - began)
            if batch is _END:
                break
            length.clear()
            try:
                if forward_fn is not None:
                    count = images_in(model, batch, forward_fn)
                    forward_fn(model, batch)
                else:
                    most = None if max_images is None else max_images - fed.images
                    arguments = arguments_of(model, batch).head(most)
                    count = arguments.images
                    call(arguments.to(target, copy=True))
            except NonFiniteError as error:
                if error.samples != (count or sum(length)):
                    raise
                raise NonFiniteError(error.site, error.item, fed.images + error.item) from None
            count = count or sum(length)
            fed = Fed(fed.images + count, fed.batches + 1, fed.waited)
            share = (fed.waited - start.waited) / max(1e-9, time.perf_counter() - first)
            bar.set_postfix_str(f"waiting for data {share:.0%}", refresh=False)
            bar.update(count)
            if until is not None and until(fed):
                break
    return fed


class _Done(BaseException):
    """Leaves a forward pass; no Exception, lest a model swallow it."""


class leaving_after:  # noqa: N801 - used like contextmanager's functions
    """End the block, and a forward pass within it, when `layer` has been called that often.

    No generator: from Python 3.12 on, contextlib leaves the exception that one has caught in a
    cycle with its frames, and so the activations that they hold.
    """

    def __init__(self, layer: nn.Module, calls: int) -> None:
        self.layer, self.left = layer, calls

    def __enter__(self) -> None:
        self.handle = self.layer.register_forward_hook(self._count)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.handle.remove()
        return kind is _Done

    def _count(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            raise _Done


@contextmanager
def _first_length(layers: Mapping[str, nn.Module]) -> Iterator[list[int]]:
    """How many samples the first layer to be called got; empty before that, and when cleared."""
    found: list[int] = []

    def note(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        if not found:
            found.append(_length(first_tensor((args, kwargs))))

    with ExitStack() as hooks:
        for layer in layers.values():
            # Before a hook that measures, which may raise.
            handle = layer.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
            hooks.callback(handle.remove)
        yield found


def _length(x: Tensor | None) -> int:
    return len(x) if x is not None and x.dim() else 0


def eager() -> AbstractContextManager[None]:
    """Compiled code would not see the hooks."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return, no-untyped-call]


def _total(data: Iterable[Any], max_images: int | None) -> int | None:
    try:
        known = len(data.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return max_images
    return known if max_images is None else min(known, max_images)


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """The model on `device`, and afterwards every tensor where it was."""
    origin = home(model)
    if origin is not None and origin.type == "meta":
        raise RetrofitError(
            f"this {type(model).__name__} is on the meta device: give it tensors first (to_empty, "
            "load_state_dict)"
        )
    if device is None or origin is None or str(device) == str(origin):
        yield origin
        return
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # meta has no items
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RetrofitError(f"device {device} cannot be used here: {reason}") from error
    parameters = [(p, p.data, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if not isinstance(module, MomentObserver)
    ]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None  # which would move along
        model.to(target)
        yield target
    finally:
        for parameter, data, grad in parameters:
            parameter.data = data
            parameter.grad = grad
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module in model.modules():
            if isinstance(module, MomentObserver):
                module.to(origin)
