"""Feed data through a prepared model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from retrofit.batches import Arguments, ForwardFn
from retrofit.errors import RetrofitError
from retrofit.feeding import Fed, feed, leaving_after
from retrofit.modes import evaluating
from retrofit.observer import MomentObserver
from retrofit.packing import packed
from retrofit.plans import Plan
from retrofit.record import required_record
from retrofit.tables import table

# On the demo's network the halves of well-mixed samples of 256 pictures and more differ by less
# than 0.2, those of samples sorted by class by 0.6 to 1.4.
DISAGREEMENT = 0.3


@dataclass(frozen=True)
class SiteStability:
    """How far the two halves of the sample disagree at one site, in standard deviations.

    Attributes:
        site: module path.
        mean, mean_worst: difference of the halves' means, 99th percentile of the channels and
            worst channel, in units of the channel's standard deviation.
        std, std_worst: the same for the difference of the halves' standard deviations.
    """

    site: str
    mean: float
    mean_worst: float
    std: float
    std_worst: float


@dataclass(frozen=True)
class Calibration:
    """What one calibration pass did, and whether its sample was enough.

    Attributes:
        images, batches, seconds: how many, and how long it took.
        sites: how far the two halves of the sample disagree, for each site in order; without
            those that saw less than two samples.
    """

    images: int
    batches: int
    seconds: float
    sites: tuple[SiteStability, ...]

    @property
    def disagreement(self) -> float:
        """The larger of mean and std disagreement (99th percentile) at the worst site, in sigma."""
        return max((max(s.mean, s.std) for s in self.sites), default=0.0)

    def __str__(self) -> str:
        rows = [
            (s.site, f"{s.mean:.3f}", f"{s.mean_worst:.3f}", f"{s.std:.3f}", f"{s.std_worst:.3f}")
            for s in self.sites
        ]
        head = ("halves differ (sigma)", "mean p99", "mean worst", "std p99", "std worst")
        return (
            f"{table(head, rows, right='mean p99,mean worst,std p99,std worst')}\n"
            f"{self.images} images in {self.seconds:.1f} s "
            f"({self.images / max(self.seconds, 1e-9):.1f} images/s)"
        )


def calibrate(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Calibration:
    """Run data through a prepared model, once, in eval mode and without gradients.

    Only the observers learn; device, modes and parameters are afterwards as they were. A loop of
    your own, `for x, _ in loader: prepared(x)` under `torch.no_grad()`, gives the same moments up
    to rounding; this one reads the activations in the faster memory format and leaves each forward
    pass after the last site.

    Args:
        prepared: made by `prepare`; calling again adds more data.
        data: batches as DataLoaders yield them: tensors of shape (N, C, ...), or tuples, lists or
            dicts that hold them. As many items as the model's `forward` requires are passed to it,
            of a dict those that it names; a detector gets its list of pictures.
        device: where to run; by default where the model is.
        max_images: stop after this many; by default at the end of the data.
        forward_fn: `forward_fn(model, batch)` for any other way of calling the model. It sees the
            batch as it comes, uncut, and the model runs to its end.
        progress: show a progress bar with images/s.

    Returns:
        A `Calibration`, which also says how far the two halves of the sample disagree. A warning
        is given when that is more than 0.3 sigma for more than 1 % of a site's channels.

    Raises:
        RetrofitError: no data or fewer than 2 images, an input without a batch axis, a device
            that cannot be used.
        NonFiniteError: NaN or Inf at a site, with the site and the image.
    """
    plan = required_record(prepared, "prepare").plan
    start, fed = time.perf_counter(), Fed(0, 0)
    observers = [m for m in prepared.modules() if isinstance(m, MomentObserver)]
    if observers:
        with evaluating(prepared), packed(prepared):
            fed = feed(
                prepared,
                data,
                {observer.site: observer for observer in observers},
                call=_Pass(prepared, plan, observers),
                device=device,
                max_images=max_images,
                forward_fn=forward_fn,
                progress=progress,
            )
        if fed.images < 2:
            raise RetrofitError(
                f"calibration got {fed.images} of the at least 2 images that a variance needs "
                "(some hundred make a good one)"
            )
    report = Calibration(
        images=fed.images,
        batches=fed.batches,
        seconds=time.perf_counter() - start,
        sites=tuple(filter(None, map(_stability, observers))),
    )
    if report.disagreement > DISAGREEMENT:
        warnings.warn(
            f"the two halves of the {fed.images} calibration images disagree by "
            f"{report.disagreement:.2f} sigma: use more images, and shuffle them (the usual "
            "cause is a folder sorted by class and cut short)",
            stacklevel=2,
        )
    return report


class _Pass:
    """One forward pass: in the faster memory format, and no further than the last site."""

    def __init__(self, model: nn.Module, plan: Plan, observers: list[MomentObserver]) -> None:
        self.model, self.observers = model, observers
        # None if it is not known which call is the last.
        self.last = next((site for site in plan.inserted if site.path == plan.last), None)
        self.channels_last: bool | None = None  # not known before the first batch

    def __call__(self, arguments: Arguments) -> None:
        if self.channels_last is False:
            return self._forward(arguments)
        fast: Arguments = tree_map_only(Tensor, _in_channels_last, arguments)
        if self.channels_last:
            return self._forward(fast)
        before = [{k: v.clone() for k, v in o.named_buffers()} for o in self.observers]
        try:
            self._forward(fast)
        except RuntimeError as error:
            # A model that calls .view() on an activation cannot run in this memory format.
            if "view size is not compatible" not in str(error):
                raise
        else:
            self.channels_last = True
            return None
        self.channels_last = False
        for observer, buffers in zip(self.observers, before, strict=True):
            observer.load_state_dict(buffers)
        return self._forward(arguments)

    def _forward(self, arguments: Arguments) -> None:
        with self._leaving():
            self.model(*arguments.args, **arguments.kwargs)

    def _leaving(self) -> AbstractContextManager[None]:
        if self.last is None:
            return nullcontext()
        observer = next(o for o in self.observers if o.site == self.last.path)
        return leaving_after(observer, self.last.calls)


def _in_channels_last(x: Tensor) -> Tensor:
    """A copy in the memory format that is the faster one on a CPU, where x has pictures."""
    fast = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x if fast is None or x.device.type != "cpu" else x.clone(memory_format=fast)


def _stability(observer: MomentObserver) -> SiteStability | None:
    """None for a site that saw less than two samples."""
    halves = observer.halves()
    if halves is None:
        return None
    first, second = halves
    sigma = observer.moments().var.sqrt()
    live = sigma > 0
    if not bool(live.any()):
        return SiteStability(observer.site, 0.0, 0.0, 0.0, 0.0)
    sigma = sigma[live]
    mean = (first.mean - second.mean)[live].abs() / sigma
    std = (first.var.sqrt() - second.var.sqrt())[live].abs() / sigma
    return SiteStability(
        observer.site,
        float(mean.quantile(0.99)),
        float(mean.max()),
        float(std.quantile(0.99)),
        float(std.max()),
    )
