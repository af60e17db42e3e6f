"""Feed the batches of `data` through a model: counted, on a device, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from retrofit.calibration.site_samples import SiteSamples
from retrofit.errors import NonFiniteError
from retrofit.option_checks import check_count
from retrofit.running.batch_checks import check_data, explained
from retrofit.running.call_arguments import Arguments, ForwardFn, arguments_of, images_in
from retrofit.running.devices import on_device
from retrofit.running.modes import eager
from retrofit.running.progress import images_bar

_END = object()


@dataclass(frozen=True)
class Fed:
    """How much was fed, and how many seconds were spent waiting for it."""

    images: int = 0
    batches: int = 0
    waited: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Feed:
    """Batches, and how they go through a model.

    Attributes:
        data, device, max_images, forward_fn, progress: as for `calibrate`.
        stage: what the bar says is being done.
    """

    data: Iterable[Any]
    device: torch.device | str | None = None
    max_images: int | None = None
    forward_fn: ForwardFn | None = None
    progress: bool = True
    stage: str = "calibrate"

    def run(
        self,
        model: nn.Module,
        samples: SiteSamples,
        *,
        call: Callable[[Arguments], object] | None = None,
        start: Fed = Fed(),
        until: Callable[[Fed], bool] = lambda _: False,
    ) -> Fed:
        """Run all batches through `model`, without gradients; modes are the caller's.

        Images are counted by the structure of the batch; where that tells nothing, by what the
        first site got.

        Args:
            model: what is run.
            samples: what hooks or observers in it fill.
            call: runs the model; by default with nothing more than its arguments.
            start: what was fed before; the rest is counted on from there.
            until: asked after each batch, with all that was fed, whether that is enough.

        Raises:
            NonFiniteError: with the image's place in the data, if the site gets one sample for
                each image.
        """
        check_data(self.data)
        if self.max_images is not None:
            check_count("max_images", self.max_images)
        call = call or (lambda arguments: model(*arguments.args, **arguments.kwargs))
        fed, batches, began = start, iter(self.data), time.perf_counter()
        with (
            images_bar(
                self.stage, self.data, self.max_images, shown=self.progress, done=start.images
            ) as bar,
            on_device(self.device, model) as device,
            torch.no_grad(),
            eager(),
        ):
            while self.max_images is None or fed.images < self.max_images:
                asked = time.perf_counter()
                batch = next(batches, _END)
                fed = replace(fed, waited=fed.waited + time.perf_counter() - asked)
                if batch is _END:
                    break
                samples.clear()
                count = self._one(model, batch, samples, call, device, fed.images)
                fed = Fed(fed.images + count, fed.batches + 1, fed.waited)
                share = (fed.waited - start.waited) / max(1e-9, time.perf_counter() - began)
                bar.set_postfix_str(f"waiting for data {share:.0%}", refresh=False)
                bar.update(count)
                if until(fed):
                    break
        return fed

    def _one(
        self,
        model: nn.Module,
        batch: Any,
        samples: SiteSamples,
        call: Callable[[Arguments], object],
        device: torch.device | None,
        earlier: int,
    ) -> int:
        """Run one batch, after so many earlier images; return how many it has."""
        count = 0
        try:
            if self.forward_fn is not None:
                count = images_in(model, batch, self.forward_fn)
                with explained(model, batch):
                    self.forward_fn(model, batch)
            else:
                most = None if self.max_images is None else self.max_images - earlier
                arguments = arguments_of(model, batch).head(most)
                count = arguments.images
                arguments = arguments.to(device, copy=True)
                with explained(model, arguments):
                    call(arguments)
        except NonFiniteError as error:
            if error.samples != (count or samples.length):
                raise
            raise NonFiniteError(error.site, error.item, earlier + error.item) from None
        return count or samples.length


class _Done(BaseException):
    """Leaves a forward pass; a BaseException, so that `except Exception` in the model cannot."""


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
