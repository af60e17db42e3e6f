"""Feed the batches of `data` through a model: counted, on a device, with a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
from retrofit.running.progress import ProgressBar, images_bar

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
        may_end_early: before the data does.
    """

    data: Iterable[Any]
    device: torch.device | str | None = None
    max_images: int | None = None
    forward_fn: ForwardFn | None = None
    progress: bool = True
    stage: str = "calibrate"
    may_end_early: bool = False

    def run(
        self,
        model: nn.Module,
        samples: SiteSamples,
        *,
        call: Callable[[Arguments], object] | None = None,
        start: Fed = Fed(),
        needed: Callable[[Fed], float] = lambda _: math.inf,
    ) -> Fed:
        """Run all batches through `model`, without gradients; modes are the caller's.

        Images are counted by the structure of the batch; where that tells nothing, by what the
        first site got.

        Args:
            model: what is run.
            samples: what hooks or observers in it fill.
            call: runs the model on arguments, in another way than to pass them.
            start: what was fed before; the rest is counted on from there.
            needed: asked after each batch, with all that was fed, how many images that takes; it
                ends when there were as many, and the bar expects no more.

        Raises:
            NonFiniteError: with the image's place in the data, if the site gets one sample for
                each image.
        """
        check_data(self.data)
        if self.max_images is not None:
            check_count("max_images", self.max_images)
        fed, began = start, time.perf_counter()
        with (
            self.bar(model, self.stage, shown=self.progress, done=start.images) as bar,
            self.opened(model) as device,
        ):
            batches, there_are = self.batches(model, device, start.images), bar.total or math.inf
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                fed = replace(fed, waited=fed.waited + time.perf_counter() - asked)
                if batch is None:
                    break
                samples.clear()
                try:
                    batch.run(call)
                except NonFiniteError as error:
                    raise batch.placed(error, samples.length) from None
                batch.images = batch.images or samples.length
                fed = Fed(fed.images + batch.images, fed.batches + 1, fed.waited)
                share = (fed.waited - start.waited) / max(1e-9, time.perf_counter() - began)
                bar.set_postfix_str(f"waiting {share:.0%}", refresh=False)
                bar.update(batch.images)
                enough = needed(fed)
                expected = min(enough, there_are)
                bar.expect(math.ceil(expected) if math.isfinite(expected) else None)
                if fed.images >= enough:
                    break
        return fed

    def bar(self, model: nn.Module, stage: str, *, shown: bool, done: int = 0) -> ProgressBar:
        """Make a bar over the images."""
        data, most, forward_fn = self.data, self.max_images, self.forward_fn
        return images_bar(
            stage, model, data, most, forward_fn,
            shown=shown, done=done, at_most=self.may_end_early,
        )  # fmt: skip

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[torch.device | None]:
        """Keep the model on the device, without gradients and uncompiled, for the block."""
        with on_device(self.device, model) as device, torch.no_grad(), eager():
            yield device

    def batches(
        self, model: nn.Module, device: torch.device | None, earlier: int = 0
    ) -> Iterator[FedBatch]:
        """Make the batches ready one by one; each has its `images` when the next is asked for."""
        batches = iter(self.data)
        while self.max_images is None or earlier < self.max_images:
            batch = next(batches, _END)
            if batch is _END:
                return
            ready = self._ready(model, batch, device, earlier)
            yield ready
            earlier += ready.images

    def _ready(
        self, model: nn.Module, batch: Any, device: torch.device | None, earlier: int
    ) -> FedBatch:
        if self.forward_fn is not None:
            images = images_in(model, batch, self.forward_fn)
            return FedBatch(model, batch, images, earlier, self.forward_fn)
        most = None if self.max_images is None else self.max_images - earlier
        arguments = arguments_of(model, batch).head(most)
        copied = arguments.to(device, copy=True)  # a model may write to its input
        return FedBatch(model, copied, arguments.images, earlier)


@dataclass
class FedBatch:
    """One batch, ready to go through a model.

    Attributes:
        model: what it goes through.
        batch: arguments of the model; with a `forward_fn` the batch as it came.
        images: how many it has; 0 where its structure does not tell.
        earlier: images in the data before it.
        forward_fn: as for `calibrate`.
    """

    model: nn.Module
    batch: Any
    images: int
    earlier: int
    forward_fn: ForwardFn | None = None

    def run(self, call: Callable[[Arguments], object] | None = None) -> None:
        """Run the model, where there is no `forward_fn` by `call` if that is given."""
        with explained(self.model, self.batch):
            if self.forward_fn is not None:
                self.forward_fn(self.model, self.batch)
            elif call is not None:
                call(self.batch)
            else:
                self.model(*self.batch.args, **self.batch.kwargs)

    def head(self, most: int) -> FedBatch:
        """Copy the first `most` images; a batch for a `forward_fn` comes whole, and as it is."""
        if self.forward_fn is not None:
            return replace(self)
        copied = self.batch.head(most).to(None, copy=True)
        return replace(self, batch=copied, images=min(self.images, most))

    def placed(self, error: NonFiniteError, samples: int) -> NonFiniteError:
        """Say where in the data it is, if the site gets a sample for each image.

        Args:
            error: with a place in the batch.
            samples: what the first site got, the number of images if nothing else tells it.
        """
        if error.samples != (self.images or samples):
            return error
        return NonFiniteError(error.site, error.item, self.earlier + error.item)


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
