"""Two models compared on data: what the conversion changes (nothing), and what training will."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.batches import (
    ForwardFn,
    images_in,
    input_of,
    refuse_single_tensor,
    run,
    tensors,
)
from retrofit.errors import RetrofitError
from retrofit.feeding import eager
from retrofit.modes import batch_statistics, evaluating
from retrofit.plans import Plan, Site
from retrofit.record import record_of
from retrofit.rewrite import find_site
from retrofit.tables import table


@dataclass(frozen=True)
class Difference:
    """How one tensor of the converted model differs from that of the original.

    Attributes:
        name: module path of a site, or where the tensor stands in the model's output.
        exact: equal everywhere, where NaN equals NaN and 0 equals -0.
        max_abs: largest absolute difference; inf where one has a NaN and the other a number.
        relative: the same divided by the original's root mean square.
        finite: the original has no NaN or Inf there.
    """

    name: str
    exact: bool
    max_abs: float
    relative: float
    finite: bool = True


@dataclass(frozen=True)
class ParityReport:
    """Whether two models compute the same.

    Attributes:
        images: how many they were compared on.
        outputs: one entry for each tensor in the output.
        sites: one for each site of the converted model's plan, in order; what the convolution (or,
            in post-activation placement, the activation) gives in the original against what its
            BatchNorm gives. Functions have none: they count by the outputs alone.
        top1: share of images with the same largest output, where an output of shape (N, classes)
            comes first; else None.
    """

    images: int
    outputs: tuple[Difference, ...]
    sites: tuple[Difference, ...]
    top1: float | None

    @property
    def exact(self) -> bool:
        """All outputs and all sites are equal bit for bit."""
        return all(d.exact for d in (*self.outputs, *self.sites))

    def passed(self, tolerance: float = 0.0) -> bool:
        """No output and no site differs by more than `tolerance` of its root mean square."""
        return all(d.relative <= tolerance for d in (*self.outputs, *self.sites))

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for a file's metadata."""
        worst = max((d.relative for d in (*self.outputs, *self.sites)), default=0.0)
        return {
            "exact": self.exact,
            "images": self.images,
            "max_abs": max(d.max_abs for d in self.outputs),
            "worst_relative": worst,
            "top1_agreement": self.top1,
        }

    def __str__(self) -> str:
        rows = [
            (d.name, "yes" if d.exact else "no", f"{d.max_abs:.3g}", f"{d.relative:.3g}")
            for d in (*self.sites, *self.outputs)
        ]
        top1 = "" if self.top1 is None else f", top-1 agreement {self.top1:.2%}"
        verdict = "equal bit for bit" if self.exact else "NOT equal bit for bit"
        return (
            f"{table(('tensor', 'exact', 'max abs', 'relative'), rows, right='max abs,relative')}\n"
            f"{verdict} on {self.images} images{top1}"
        )


def verify(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
) -> ParityReport:
    """Compare a converted model with its original, at every site and every output.

    Both run in eval mode without gradients on each batch, where they are, and are left as they
    were.

    Args:
        original, converted: the models. Sites are compared when `converted` was made by this
            package; any other two models are compared by their outputs.
        data: batches, as for `calibrate`.
        forward_fn: `forward_fn(model, batch)`, as for `calibrate`; returns the output to compare.

    Raises:
        RetrofitError: no data; outputs of different structure or shape; or an original that is
            random, whose outputs differ between two runs on the same batch.
    """
    refuse_single_tensor(data)
    record = record_of(converted)
    points = _points(record.plan if record else None)
    at_sites = {point.site.path: _Comparison() for point in points}
    at_outputs: dict[str, _Comparison] = {}
    images, top1 = 0, _Top1()
    with evaluating(original, converted), torch.no_grad(), eager():
        for batch in data:
            with _recorded(original, points) as seen:
                expected = tensors(run(original, batch, forward_fn), "output")
            try:
                with _compared(converted, points, seen, at_sites):
                    actual = tensors(run(converted, batch, forward_fn), "output")
                exact = _compare(expected, actual, at_outputs)
            except RetrofitError:  # other shapes, other calls: the original's fault, perhaps
                _refuse_random(original, batch, forward_fn, expected)
                raise
            if not exact:
                _refuse_random(original, batch, forward_fn, expected)
            count = images_in(original, batch, forward_fn)
            images += count
            top1.add(expected, actual, count)
    if not at_outputs:
        raise RetrofitError(
            "there is no data, or no tensor in the output, to compare the models on"
        )
    return ParityReport(
        images=images,
        outputs=tuple(c.difference(name) for name, c in at_outputs.items()),
        sites=tuple(c.difference(name) for name, c in at_sites.items()),
        top1=top1.share,
    )


def _compare(
    expected: dict[str, Tensor], actual: dict[str, Tensor], pooled: dict[str, _Comparison]
) -> bool:
    """Add the outputs for one batch to what is pooled; whether these are equal."""
    if expected.keys() != actual.keys():
        raise RetrofitError(
            f"the outputs differ in structure: {', '.join(expected)} against {', '.join(actual)}"
        )
    exact = True
    for name, tensor in expected.items():
        exact &= pooled.setdefault(name, _Comparison()).add(tensor, actual[name], name)
    return exact


def _refuse_random(
    original: nn.Module, batch: Any, forward_fn: ForwardFn | None, first: dict[str, Tensor]
) -> None:
    """Raise if the original does not even agree with itself."""
    second = tensors(run(original, batch, forward_fn), "output")
    try:
        repeats = _compare(first, second, {})
    except RetrofitError:
        repeats = False
    if not repeats:
        raise RetrofitError(
            f"this {type(original).__name__} is random in eval mode, its outputs differ between "
            "two runs on the same batch (a functional dropout without training=self.training, "
            "say): there is nothing to compare with"
        )


@dataclass(frozen=True)
class BatchDrift:
    """Attributes:
    batch_size, images: images are whole batches of that size.
    error: root mean square of the difference from the original's outputs, divided by their
        standard deviation.
    top1: share of images with the same largest output; None if the output is not (N, classes).
    """

    batch_size: int
    images: int
    error: float
    top1: float | None


@dataclass(frozen=True)
class DriftReport:
    """What batch statistics change.

    Attributes:
        rows: one for each batch size measured.
        left_out: batch sizes for which there were too few images.
    """

    rows: tuple[BatchDrift, ...]
    left_out: tuple[int, ...]

    def __str__(self) -> str:
        cells = [
            (
                str(r.batch_size),
                str(r.images),
                f"{r.error:.3f}",
                "" if r.top1 is None else f"{r.top1:.2%}",
            )
            for r in self.rows
        ]
        head = ("batch size", "images", "error", "same top-1")
        text = table(head, cells, right=",".join(head))
        if self.left_out:
            text += f"\ntoo few images for batches of {', '.join(map(str, self.left_out))}"
        return text


def drift(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    batch_sizes: Iterable[int] = (8, 32, 128),
) -> DriftReport:
    """How far the outputs move when BatchNorm uses the statistics of the batch.

    That is what the first step of fine-tuning sees. Dropout stays off, and modes and running
    statistics are afterwards as they were.

    Args:
        original, converted: as for `verify`.
        data: batches, as for `calibrate`; all images together, regrouped for each batch size. A
            last batch that is not full is left out.
        batch_sizes: those with more images than there are come back in `left_out`.

    Raises:
        RetrofitError: no data, or too few images for the smallest batch size.
    """
    refuse_single_tensor(data)
    batches = [input_of(batch) for batch in data]
    sizes = sorted(set(batch_sizes))
    total = sum(map(len, batches))
    if sizes and sizes[0] < 1:
        raise RetrofitError(f"a batch size must be positive, not {sizes[0]}")
    if len({x.shape[1:] for x in batches}) > 1:
        raise RetrofitError("the images have several sizes: they cannot be regrouped into batches")
    if not batches or not sizes or total < sizes[0]:
        raise RetrofitError(f"{total} images are too few for the batch sizes {sizes}")
    images = torch.cat(batches)
    rows = []
    for size in (s for s in sizes if s <= total):
        error, top1 = _Comparison(), _Top1()
        for x in images[: total // size * size].split(size):
            with torch.no_grad(), evaluating(original):
                expected = tensors(run(original, x, None), "output")
            with torch.no_grad(), batch_statistics(converted):
                actual = tensors(run(converted, x, None), "output")
            for name, tensor in expected.items():
                error.add(tensor, actual[name], name)
            top1.add(expected, actual, len(x))
        rows.append(BatchDrift(size, total // size * size, error.rms_over_std(), top1.share))
    return DriftReport(tuple(rows), tuple(s for s in sizes if s > total))


class _Comparison:
    """Differences between pairs of tensors, pooled over batches."""

    def __init__(self) -> None:
        self.exact = self.finite = True
        self.max_abs = 0.0
        self.count = 0
        self.sum = self.squares = self.squared_errors = 0.0

    def add(self, expected: Tensor, actual: Tensor, name: str) -> bool:
        """Add a pair; whether it is equal."""
        if expected.shape != actual.shape:
            raise RetrofitError(
                f"{name} has shape {tuple(expected.shape)} in the original and "
                f"{tuple(actual.shape)} in the converted model"
            )
        actual = actual.to(expected.device)
        self.count += expected.numel()
        wide = expected if expected.dtype == torch.float64 else expected.float()
        self.sum += float(wide.sum())
        norm = float(torch.linalg.vector_norm(wide))
        if not math.isfinite(norm):  # infinities, NaN, or an overflow
            finite = wide.isfinite()
            self.finite &= bool(finite.all())
            norm = float(torch.linalg.vector_norm(wide[finite].double()))
        self.squares += norm**2
        if torch.equal(expected, actual):
            return True
        equal = (expected == actual) | (expected.isnan() & actual.isnan())
        if bool(equal.all()):
            return True
        error = expected.double() - actual.double()
        error = error.masked_fill(equal, 0.0).nan_to_num(nan=math.inf).abs()
        self.exact = False
        self.max_abs = max(self.max_abs, float(error.max()))
        self.squared_errors += float(error.square().sum())
        return False

    def difference(self, name: str) -> Difference:
        rms = math.sqrt(self.squares / max(self.count, 1))
        relative = 0.0 if self.max_abs == 0 else self.max_abs / rms if rms > 0 else math.inf
        return Difference(name, self.exact, self.max_abs, relative, self.finite)

    def rms_over_std(self) -> float:
        variance = self.squares / self.count - (self.sum / self.count) ** 2
        return math.sqrt(self.squared_errors / self.count / variance) if variance > 0 else math.inf


class _Top1:
    """How often the largest output is the same, where the first output is (images, classes)."""

    def __init__(self) -> None:
        self.same = self.ranked = 0

    def add(self, expected: dict[str, Tensor], actual: dict[str, Tensor], images: int) -> None:
        name, first = next(iter(expected.items()), ("", None))
        nested = name.count("[") + name.count(".") > 1  # such as a detector's boxes
        if first is not None and not nested and first.dim() == 2 and len(first) == images:
            other = actual[name].to(first.device)
            self.same += int((first.argmax(1) == other.argmax(1)).sum())
            self.ranked += len(first)

    @property
    def share(self) -> float | None:
        return self.same / self.ranked if self.ranked else None


@dataclass(frozen=True)
class _Point:
    """Where both models are compared: what `host` gives at its `number`-th call in the original,
    or at every call, against what `site` gives in the converted model."""

    site: Site
    host: str
    number: int | None


def _points(plan: Plan | None) -> list[_Point]:
    """The sites that have a module to look at in the original.

    In the graph layout each call of a convolution has a site of its own; functions and, after a
    shared activation, the call that belongs to a site cannot be told by looking at modules.
    """
    points = []
    for site in plan.inserted if plan else ():
        if plan is not None and plan.layout == "native":
            points.append(_Point(site, site.host, None))
        elif plan is not None and site.layer and plan.placement == "pre_activation":
            points.append(_Point(site, site.layer, int(site.path.partition("@")[2] or 0)))
    return points


@contextmanager
def _recorded(model: nn.Module, points: Iterable[_Point]) -> Iterator[dict[str, list[Tensor]]]:
    """What each host returns, call by call. Copies, since a ReLU may be in place."""
    seen: dict[str, list[Tensor]] = {point.host: [] for point in points}
    handles = []
    try:
        for path, outputs in seen.items():

            def keep(_m: nn.Module, _i: Any, y: Tensor, to: list[Tensor] = outputs) -> None:
                to.append(y.clone())

            try:
                host = model.get_submodule(path)
            except AttributeError as error:
                raise RetrofitError(
                    f"the original, a {type(model).__name__}, has no {path}: compare the converted "
                    "model with the one that it was made from"
                ) from error
            handles.append(host.register_forward_hook(keep))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compared(
    model: nn.Module,
    points: Iterable[_Point],
    seen: dict[str, list[Tensor]],
    comparisons: dict[str, _Comparison],
) -> Iterator[None]:
    """Compare what each BatchNorm returns with what was seen."""
    handles = []
    calls: Counter[str] = Counter()
    try:
        for point in points:

            def compare(_m: nn.Module, _i: Any, y: Tensor, point: _Point = point) -> None:
                path = point.site.path
                number = calls[path] if point.number is None else point.number
                calls[path] += 1
                if number >= len(seen[point.host]):
                    raise RetrofitError(f"the converted model calls {path} more often")
                comparisons[path].add(seen[point.host][number], y, path)

            handles.append(find_site(model, point.site)[1].register_forward_hook(compare))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for point in points:
        expected = len(seen[point.host]) if point.number is None else 1
        if calls[point.site.path] < expected:
            raise RetrofitError(
                f"the converted model calls the BatchNorm of {point.site.path} "
                f"{calls[point.site.path]} times, not {expected}"
            )
