"""Feed data through a prepared model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from retrofit.batches import ForwardFn, home, input_of, refuse_single_tensor
from retrofit.errors import NonFiniteError, RetrofitError
from retrofit.modes import evaluating
from retrofit.moments import MomentObserver
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
        sites: how far the two halves of the sample disagree, for each site in order.
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
        data: batches: tensors of shape (N, C, ...), or tuples, lists or dicts whose first tensor
            is one, as DataLoaders yield them.
        device: where to run; by default where the model is.
        max_images: stop after this many; by default at the end of the data.
        forward_fn: `forward_fn(model, batch)` for any other way of calling the model. It sees the
            batch as it comes, and the model runs to its end.
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
    refuse_single_tensor(data)
    if max_images is not None and max_images < 1:
        raise RetrofitError(f"max_images must be positive, not {max_images}")
    start, images, batches = time.perf_counter(), 0, 0
    observers = [m for m in prepared.modules() if isinstance(m, MomentObserver)]
    if observers:
        bar = tqdm(total=_total(data, max_images), unit="img", disable=not progress)
        with bar, _moved(prepared, device) as target, evaluating(prepared), torch.no_grad():
            feed = _Feed(prepared, plan, observers, target, forward_fn)
            for batch in data:
                left = None if max_images is None else max_images - images
                count = feed(batch, left, images)
                images, batches = images + count, batches + 1
                bar.update(count)
                if max_images is not None and images >= max_images:
                    break
        if images < 2:
            raise RetrofitError(
                f"calibration got {images} of the at least 2 images that a variance needs (some "
                "hundred make a good one)"
            )
    report = Calibration(
        images=images,
        batches=batches,
        seconds=time.perf_counter() - start,
        sites=tuple(_stability(observer) for observer in observers),
    )
    if report.disagreement > DISAGREEMENT:
        warnings.warn(
            f"the two halves of the {images} calibration images disagree by "
            f"{report.disagreement:.2f} sigma: use more images, and shuffle them (the usual "
            "cause is a folder sorted by class and cut short)",
            stacklevel=2,
        )
    return report


class _Done(BaseException):
    """Leaves the forward pass after the last site; no Exception, lest a model swallow it."""


class _Feed:
    """Runs one batch after another."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        observers: list[MomentObserver],
        device: torch.device | None,
        forward_fn: ForwardFn | None,
    ) -> None:
        self.model, self.observers = model, observers
        self.device, self.forward_fn = device, forward_fn
        last = next(site for site in plan.inserted if site.path == plan.last)
        self.last = next(observer for observer in observers if observer.site == last.path)
        self.last_calls = last.calls
        self.channels_last: bool | None = None  # not known before the first batch

    def __call__(self, batch: Any, most: int | None, seen: int) -> int:
        """Run one batch, at most `most` images of it; returns how many."""
        try:
            before = int(self.last.images)
            if self.forward_fn is not None:
                self.forward_fn(self.model, batch)
            else:
                self._run(input_of(batch)[:most].to(self.device))
            return (int(self.last.images) - before) // self.last_calls
        except NonFiniteError as error:
            where = f"image {seen + error.item} of the data"
            raise NonFiniteError(error.site, error.item, where) from None

    def _run(self, x: Tensor) -> None:
        fast = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if fast is None or self.channels_last is False or x.device.type != "cpu":
            return self._forward(x)
        if self.channels_last:
            return self._forward(x.contiguous(memory_format=fast))
        before = [{k: v.clone() for k, v in o.named_buffers()} for o in self.observers]
        try:
            self._forward(x.contiguous(memory_format=fast))
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
        return self._forward(x)

    def _forward(self, x: Tensor) -> None:
        calls = 0

        def leave(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == self.last_calls:
                raise _Done

        handle = self.last.register_forward_hook(leave)
        try:
            self.model(x)
        except _Done:
            pass
        finally:
            handle.remove()


def _stability(observer: MomentObserver) -> SiteStability:
    first, second = observer.halves()
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


def _total(data: Iterable[Any], max_images: int | None) -> int | None:
    try:
        known = len(data.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return max_images
    return known if max_images is None else min(known, max_images)


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """The model on `device`, and afterwards every tensor where it was."""
    origin = home(model)
    if device is None or origin is None or str(device) == str(origin):
        yield origin
        return
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # meta has no items
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise RetrofitError(f"device {device} cannot be used here: {reason}") from error
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if not isinstance(module, MomentObserver)
    ]
    try:
        model.to(target)
        yield target
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module in model.modules():
            if isinstance(module, MomentObserver):
                module.to(origin)
