"""One forward pass of a calibration: in the faster memory format, and no further than needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from retrofit.calibration.feeding import leaving_after
from retrofit.calibration.fused_bias import bias_with_moments, fusable, observed_convolutions
from retrofit.calibration.inplace_relus import relus_behind
from retrofit.calibration.observer import observers_of
from retrofit.calibration.rectified import ReadBetweenError
from retrofit.calibration.site_samples import SiteSamples
from retrofit.errors import NonFiniteError, RetrofitError, warn
from retrofit.plans import Plan
from retrofit.running.call_arguments import Arguments
from retrofit.running.freed_memory import kept_memory
from retrofit.running.memory_format import in_channels_last
from retrofit.tracing.symbolic import defaults


class ForwardPass:
    """Runs a prepared model up to its last site; a context, in which freed memory is reused.

    On a CPU in channels_last, if the model can; on a GPU in as many parts as its memory asks for,
    and with the biases and in-place ReLUs of convolutions computed by a kernel, with the moments.

    Args:
        model, plan: prepared by this plan.
        samples: what the observers of the model fill.
        part_done: called after each part, once its samples are complete and finite.
    """

    channels_last = True  # until the model fails in it

    def __init__(
        self, model: nn.Module, plan: Plan, samples: SiteSamples, part_done: Callable[[], None]
    ) -> None:
        self.model, self.samples, self.part_done = model, samples, part_done
        # None if it is not known which call is the last.
        self.last = next((site for site in plan.inserted if site.path == plan.last), None)
        self.convolutions = observed_convolutions(model, plan)
        self.most: int | None = None  # images at once
        self.held = ExitStack()

    def __enter__(self) -> Self:
        self.held.enter_context(kept_memory())
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def __call__(self, arguments: Arguments) -> None:
        """Run one batch, in parts if need be."""
        images, first = arguments.images, 0
        while True:
            end = images if self.most is None else min(first + self.most, images)
            if not self._try_part(arguments.part(first, end), first, images):
                self.most = (end - first) // 2
                warn(f"out of memory with {end - first} images at once: going on with {self.most}")
                torch.cuda.empty_cache()
                continue
            self.part_done()
            if end == images:
                break
            first = end

    def _try_part(self, arguments: Arguments, first: int, of: int) -> bool:
        """Run a part. False, with nothing learned, if the memory is too small for its images."""
        try:
            self._in_fast_format(arguments)
        except torch.OutOfMemoryError:
            if arguments.images < 2:
                raise
            self.samples.clear()
            return False
        except NonFiniteError as error:
            if error.samples != arguments.images:  # not one for each image
                raise
            raise NonFiniteError(error.site, first + error.item, samples=of) from None
        return True

    def _in_fast_format(self, arguments: Arguments) -> None:
        """Run in channels_last; where the model cannot (`view`), as it came, now and later."""
        if self.channels_last:
            try:
                return self._checked(arguments)
            except (NonFiniteError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception:  # noqa: BLE001 - the model's own; if it remains, it is raised below
                self.samples.clear()
            self.channels_last = False
        return self._checked(arguments)

    def _checked(self, arguments: Arguments) -> None:
        """Look for NaN only at the end: on a GPU, to look at each site's result is to wait for it.

        What is found then is repeated with a look at each.
        """
        try:
            self._run(arguments, checks=False)
        except Exception:
            if self.samples.are_finite():
                raise
        else:
            if self.samples.are_finite():
                return
        self.samples.clear()
        self._run(arguments, checks=True)

    def _run(self, arguments: Arguments, *, checks: bool) -> None:
        # A copy for each run: the model may write to it, and another run may follow.
        copy = in_channels_last if self.channels_last else Tensor.clone
        copied: Arguments = tree_map_only(Tensor, copy, arguments)
        self.samples.checks = checks
        try:
            with self._with_moments(arguments, checks), self._leaving():
                self.model(*copied.args, **copied.kwargs)
        except ReadBetweenError:
            self.relus = {}
            self.samples.clear()
            self._run(arguments, checks=checks)
        finally:
            self.samples.checks = True

    def _with_moments(self, arguments: Arguments, checks: bool) -> AbstractContextManager[None]:
        """Leave the moments to one kernel, but where each activation is looked at."""
        chosen = [] if checks else fusable(self.convolutions)
        if not chosen:
            return nullcontext()
        as_traced = not arguments.kwargs.keys() & defaults(self.model)
        return bias_with_moments(chosen, self.relus if as_traced else {}, self.samples)

    @cached_property
    def relus(self) -> dict[nn.Conv2d, nn.ReLU]:
        """The in-place ReLUs that the kernel may compute along."""
        try:
            return relus_behind(self.model, self.convolutions)
        except (RetrofitError, torch.OutOfMemoryError):  # of the copy that is read
            return {}

    def _leaving(self) -> AbstractContextManager[None]:
        if self.last is None:
            return nullcontext()
        observer = next(o for o in observers_of(self.model) if o.site == self.last.path)
        return leaving_after(observer, self.last.calls)
