"""One forward pass of a calibration: in the faster memory format, and no further than needed."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from retrofit.batches import Arguments
from retrofit.errors import NonFiniteError
from retrofit.feeding import leaving_after
from retrofit.heap import kept_memory
from retrofit.observer import MomentObserver
from retrofit.plans import Plan

States = list[dict[str, Tensor]]  # of each observer


class OnePass:
    """Runs a prepared model up to its last site; a context, in which freed memory is reused.

    On a CPU in channels_last, if the model can; on a GPU in as many parts as its memory asks for.
    """

    def __init__(self, model: nn.Module, plan: Plan, observers: list[MomentObserver]) -> None:
        self.model, self.observers = model, observers
        # None if it is not known which call is the last.
        self.last = next((site for site in plan.inserted if site.path == plan.last), None)
        self.channels_last = True  # until the model fails in it
        self.most: int | None = None  # images at once
        self.held = ExitStack()
        self.first = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def __call__(self, arguments: Arguments) -> None:
        self._in_parts(arguments)
        if self.first:  # what it leaves behind, such as packed weights, should not lie in between
            self.held.enter_context(kept_memory())
            self.first = False

    def _in_parts(self, arguments: Arguments) -> None:
        images, first = arguments.images, 0
        while True:
            end = images if self.most is None else min(first + self.most, images)
            if not self._fits(arguments.part(first, end), first, images):
                self.most = (end - first) // 2
                warnings.warn(
                    f"out of memory with {end - first} images at once: going on with {self.most}",
                    stacklevel=2,
                )
                torch.cuda.empty_cache()
            elif end == images:
                return
            else:
                first = end

    def _fits(self, arguments: Arguments, first: int, of: int) -> bool:
        """Run a part. False, with nothing learned, if the memory is too small for its images."""
        before = [observer.state() for observer in self.observers]
        try:
            self._part(arguments, before)
        except torch.OutOfMemoryError:
            if arguments.images < 2:
                raise
            self._restore(before)
            return False
        except NonFiniteError as error:
            if error.samples != arguments.images:  # not one for each image
                raise
            raise NonFiniteError(error.site, first + error.item, samples=of) from None
        return True

    def _part(self, arguments: Arguments, before: States) -> None:
        if self.channels_last:
            try:
                return self._forward(arguments, before)
            except (NonFiniteError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                # Such as that of a .view() on an activation; what a model cannot do in this memory
                # format its first batch shows, but for the shapes of others.
                if not (self.first or "view size is not compatible" in str(error)):
                    raise
            self._restore(before)
            self.channels_last = False
        return self._forward(arguments, before)

    def _forward(self, arguments: Arguments, before: States) -> None:
        """Look for NaN only at the end: on a GPU, to look at each site's result is to wait for it.

        What is found then is repeated with a look at each.
        """
        try:
            self._run(arguments, checks=False)
        except Exception:
            if self._is_sound():
                raise
        else:
            if self._is_sound():
                return
        self._restore(before)
        self._run(arguments, checks=True)

    def _restore(self, before: States) -> None:
        for observer, state in zip(self.observers, before, strict=True):
            observer.restore(state)

    def _run(self, arguments: Arguments, *, checks: bool) -> None:
        # A copy for each run: the model may write to it, and another run may follow.
        copied: Arguments = tree_map_only(Tensor, self._copy, arguments)
        for observer in self.observers:
            observer.checks = checks
        try:
            with self._leaving():
                self.model(*copied.args, **copied.kwargs)
        finally:
            for observer in self.observers:
                observer.checks = True

    def _copy(self, x: Tensor) -> Tensor:
        """In the memory format that is the faster one on a CPU, where x has pictures."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        fast = self.channels_last and x.device.type == "cpu" and x.dim() in formats
        return x.clone(memory_format=formats[x.dim()]) if fast else x.clone()

    def _is_sound(self) -> bool:
        sums = [(observer.mean.abs() + observer.M2).sum() for observer in self.observers]
        return bool(torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all())

    def _leaving(self) -> AbstractContextManager[None]:
        if self.last is None:
            return nullcontext()
        observer = next(o for o in self.observers if o.site == self.last.path)
        return leaving_after(observer, self.last.calls)
