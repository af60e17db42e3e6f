"""Running statistics that follow what passes through the model, batch after batch."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from retrofit.adaptation.norm_inputs import hooked
from retrofit.adaptation.running_statistics import (
    FOLLOWING,
    blend,
    buffers,
    check_prior,
    refuse_as_prior,
    restore,
    share,
    tracking,
    unwrapped,
)
from retrofit.adaptation.saved_statistics import SavedStatistics
from retrofit.errors import RetrofitError
from retrofit.html_tables import html_table, unfolding_list, view
from retrofit.numerics.batch_table import BatchTable
from retrofit.numerics.moments import Moments, merged, pooled
from retrofit.numerics.reductions import finite
from retrofit.option_checks import check_models, check_number
from retrofit.running.modes import eager, evaluating
from retrofit.tables import in_short


@dataclass
class _Stream:
    """What has passed one BatchNorm.

    Attributes:
        moments: of what has passed, the older the lighter.
        images: as how many it counts.
        passed: how many there were.
    """

    moments: Moments | None = None
    images: float = 0.0
    passed: int = 0

    def add(self, new: Moments, images: int, window: float) -> Moments:
        """Add a batch, after what was there has lost some of its weight; return what there is."""
        kept = math.exp(-images / window)
        if self.moments is not None:
            before = self.moments
            lighter = Moments(before.count * kept, before.mean, before.M2 * kept)
            new = pooled(lighter, new)
        self.moments, self.images = new, self.images * kept + images
        self.passed += images
        return new


class Adapting:
    """A model that follows a stream, until `remove()` or the end of `with adapting(...)`.

    Attributes:
        model: what `adapting` was given, without a wrapper.
        layers: paths of the BatchNorms that follow the stream.
    """

    def __init__(self, model: nn.Module, prior: float, window: float) -> None:
        self.model = model
        self._prior, self._window = prior, window
        self._norms = tracking(model)
        self.layers = tuple(self._norms)
        for path, norm in self._norms.items():
            if prior:
                refuse_as_prior(path, norm)
        self._streams = {path: _Stream() for path in self._norms}
        with ExitStack() as stack:
            for context in (evaluating(model), eager(), hooked(self._norms, self._follow)):
                stack.enter_context(context)
            self._until_removed = stack.pop_all()
        self._saved = SavedStatistics(
            {norm: buffers(norm) for norm in self._norms.values()}, goes_on=True
        )
        FOLLOWING.update(self._norms.values())

    @property
    def images(self) -> int:
        """How many images passed since the beginning, or since `reset()`, until `remove()`."""
        return max(stream.passed for stream in self._streams.values())

    def reset(self) -> None:
        """Forget what has passed: the model has the statistics it came with, bit for bit."""
        self._refuse_removed()
        for path, norm in self._norms.items():
            restore(norm, self._saved[norm])
            self._streams[path] = _Stream()

    def remove(self) -> None:
        """Leave the model as it was: statistics, modes and hooks. Once is enough."""
        try:
            self._saved.give_back()
        finally:
            self._until_removed.close()
            for norm in self._norms.values():
                FOLLOWING.discard(norm)
            self._norms = {}

    def __enter__(self) -> Self:
        self._refuse_removed()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return in_short(self, self._summary())

    def _repr_html_(self) -> str:
        """Show itself in a notebook: what has passed, and what follows it."""
        facts = (
            ("images", f"{self.images:,}"),
            ("prior", f"{self._prior:g} images"),
            ("window", "none" if math.isinf(self._window) else f"{self._window:g} images"),
        )
        return view(
            html_table(f"Adapting: {self._summary()}", (), facts),
            unfolding_list("BatchNorms, in the order of the model's modules", self.layers),
        )

    def _summary(self) -> str:
        removed = "" if self._norms else "removed "
        return f"{len(self.layers)} BatchNorms, {removed}after {self.images} images"

    def _refuse_removed(self) -> None:
        if not self._norms:
            raise RetrofitError("this handle was removed, and adapts no more: call adapting() anew")

    def _follow(self, path: str, norm: _BatchNorm, x: Tensor) -> None:
        """Settle a BatchNorm on what has passed, this batch included, before it computes."""
        if norm is not self._norms.get(path):
            return  # a copy of the model, with its hooks
        if norm.training:
            raise RetrofitError(
                f"{path} is in training mode, where it follows no stream: call model.eval() again, "
                "or end adapting before you train"
            )
        if not x.numel():
            return
        stream = self._streams[path]
        with torch.no_grad():
            table = BatchTable.of([[finite(x.detach(), path)]])
            moments = stream.add(merged(table.rows), len(x), self._window)
            if bool((moments.count < 2).any()):
                return  # one value has no variance
            blend(path, norm, self._saved[norm], moments, share(stream.images, self._prior))


def adapting(model: nn.Module, *, prior: float = 64, window: float | None = None) -> Adapting:
    """Let the BatchNorms of `model` follow what passes through it: test-time adaptation.

    From now on each forward pass, of any number of images down to one, is in eval mode, and each
    BatchNorm normalises with a blend of the statistics that it came with and of those of all that
    has passed since, this batch included. A BatchNorm is settled before it computes, so that those
    behind it see what it gives. The first pass gives what `recalibrate(layerwise=True, prior=)` on
    its batch would; later ones add to that, without going through the old data again. No labels are
    needed, and nothing but running_mean and running_var changes meanwhile.

    Args:
        model: any module with BatchNorms that keep running statistics. What DataParallel or
            DistributedDataParallel hold is followed without them.
        prior: the old statistics count as this many images, as for `recalibrate`. 64 is safe from
            the first image on; 0 lets the stream alone count, which for single images is noise.
        window: the older, the less an image counts: 1/e after `window` others, so that all that has
            passed counts as `window` images at most. By default all count alike, for ever. (Where a
            BatchNorm is called several times in a pass, what each call gets counts as images.)

    Returns:
        A handle: `handle.remove()`, or the end of `with adapting(...):`, restores the model bit for
        bit; `handle.reset()` does so for the statistics, and the stream begins anew, as when
        another camera comes on. `handle.images` tells how many have passed.

    Raises:
        RetrofitError: no BatchNorm, or none with running statistics; one that follows a stream
            already; a negative prior, or one for old statistics that are not finite; a window below
            1. In a pass: a BatchNorm in training mode.
        NonFiniteError: in a pass, NaN or Inf at a BatchNorm, which does not learn from it.

    Examples:
        >>> with retrofit.adapting(model, prior=64):
        ...     answers = [model(picture) for picture in camera]
    """
    check_models("adapting", model)
    check_prior(prior)
    if window is not None:
        check_number("window", window, "be a number of images from 1 up", lambda n: n >= 1)
    return Adapting(unwrapped(model), prior, math.inf if window is None else window)
