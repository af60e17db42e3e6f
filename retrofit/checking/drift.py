"""What batch statistics change: the first step of fine-tuning will see it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.checking.regrouping import Images, joined, regroupable
from retrofit.checking.verify import no_outputs, refuse_random
from retrofit.errors import RetrofitError, warn
from retrofit.html_tables import Bar, html_table, of_largest, paragraph, view
from retrofit.numerics.comparison import (
    Comparison,
    Top1,
    Variation,
    refuse_other_structure,
    rms_over_std,
)
from retrofit.option_checks import check_count, check_flags, check_forward_fn, check_models
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.devices import on_device
from retrofit.running.freed_memory import give_back
from retrofit.running.memory_format import in_channels_last
from retrofit.running.modes import batch_statistics, evaluating
from retrofit.running.progress import images_bar
from retrofit.tables import Table, in_short


@dataclass(frozen=True)
class BatchDrift:
    """What batch statistics of one size change.

    Attributes:
        batch_size: images in a batch.
        images: how many were measured, in whole batches.
        error: root mean square of the difference from the original's outputs, divided by their
            standard deviation; of several outputs each varies about a mean of its own.
        top1: share of images with the same largest output; None if the output is not (N, classes).
    """

    batch_size: int
    images: int
    error: float
    top1: float | None


@dataclass(frozen=True)
class Drift:
    """What `drift` found: what batch statistics change.

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
        text = str(Table(head, cells, right=head))
        return f"{text}\n{self._too_few()}" if self.left_out else text

    def __repr__(self) -> str:
        told = [
            f"of {r.batch_size}: error {r.error:.3f}"
            + ("" if r.top1 is None else f", same top-1 {r.top1:.2%}")
            for r in self.rows[:3]
        ]
        more = "; print it for all" if len(self.rows) > 3 or self.left_out else ""
        return in_short(self, f"batches {'; '.join(told) or 'of no size'}{more}")

    def _repr_html_(self) -> str:
        """Show itself in a notebook: the error by batch size, with bars."""
        errors = [r.error for r in self.rows]
        rows = [
            (
                str(r.batch_size),
                Bar(f"{r.error:.3f}", of_largest(r.error, errors)),
                "" if r.top1 is None else Bar(f"{r.top1:.2%}", r.top1),
                str(r.images),
            )
            for r in self.rows
        ]
        head = ("batch size", "error", "same top-1", "images")
        caption = (
            "Drift: how far batch statistics move the outputs, in standard deviations of these "
            "(bars of error: against the largest)"
        )
        left_out = paragraph(self._too_few()) if self.left_out else ""
        return view(html_table(caption, head, rows, right=head), left_out)

    def _too_few(self) -> str:
        return f"too few images for batches of {', '.join(map(str, self.left_out))}"


def drift(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    batch_sizes: Iterable[int] = (8, 32, 128),
    *,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
) -> Drift:
    """Measure how far the outputs move when BatchNorm uses the statistics of the batch.

    That is what the first step of fine-tuning sees. Dropout stays off, and modes and running
    statistics are afterwards as they were. The original runs once over the data, and the converted
    model once for each batch size, on a CPU in channels_last if both can; no more images are held
    than are in the largest batch.

    Args:
        original: the model without the BatchNorms.
        converted: the model with them.
        data: batches, as for `calibrate`; all images together, regrouped for each batch size. A
            last batch that is not full is left out.
        batch_sizes: those with more images than there are come back in `left_out`.
        device: where both run, as torch names it, to be put back afterwards; by default they run
            where they are. As for `calibrate`, a `forward_fn` moves its batches itself.
        max_images: stop after so many; all by default.
        forward_fn: `forward_fn(model, batch)`, as for `verify`. It gets regrouped batches, of the
            structure that those of the data have, so these may hold nothing but tensors, each with
            one entry for each image.
        progress: show a bar over the images.

    Returns:
        A `Drift`, one row for each batch size, the smallest first.

    Raises:
        RetrofitError: no data; too few images for the smallest batch size; no batch size, or one
            below 1, or too small to train on; a device that cannot be used; images of several
            sizes; batches that cannot be regrouped; a model that takes more than one tensor,
            without `forward_fn`; an original that is random or gives NaN or Inf.
    """
    check_models("drift", original, converted)
    check_data(data)
    check_forward_fn(forward_fn)
    check_flags(progress=progress)
    if max_images is not None:
        check_count("max_images", max_images)
    sizes = sorted(_checked_sizes(batch_sizes))
    measures = [_Measure(original, converted, s, largest=s == sizes[-1]) for s in sizes]
    total, first, kept, fast = 0, None, False, False
    with (
        images_bar("drift", original, data, max_images, forward_fn, shown=progress) as bar,
        on_device(device, original, converted),
    ):
        for batch in data:
            most = None if max_images is None else max_images - total
            images = regroupable(original, batch, forward_fn).part(0, most)
            if first is None:
                first = images
                fast = _run_in_channels_last(images, original, converted)
            elif images.shape != first.shape:
                raise RetrofitError(
                    "the images have several sizes: they cannot be regrouped into batches"
                )
            if fast:
                images = images.copied(in_channels_last)
            expected = _outputs(original, images.copied())
            if total == 0:
                _refuse_unfit(original, images, expected)
                _warn_without_batchnorm(converted)
                kept = _are_for_each(original, images, expected)
            for measure in measures:
                measure.add(replace(images, expected=expected) if kept else images)
            total += len(images)
            bar.update(len(images))
            if total == max_images:
                break
    if first is None:
        raise RetrofitError(nothing_in(data))
    if total < sizes[0]:
        raise RetrofitError(f"{total} images are too few for the batch sizes {sizes}")
    return Drift(
        tuple(measure.drift() for measure in measures if measure.images),
        tuple(size for size in sizes if size > total),
    )


def _warn_without_batchnorm(converted: nn.Module) -> None:
    if not any(isinstance(module, _BatchNorm) for module in converted.modules()):
        warn(f"this {type(converted).__name__} has no BatchNorm: batch statistics change nothing")


def _outputs(original: nn.Module, images: Images) -> dict[str, Tensor]:
    with evaluating(original):
        return images.run(original)


def _run_in_channels_last(images: Images, *models: nn.Module) -> bool:
    """Tell whether models take an image in channels_last; those that call `view` may not."""
    if any(tensor.device.type != "cpu" for tensor in images.inputs):
        return False
    try:
        for model in models:
            _outputs(model, images.part(0, 1).copied(in_channels_last))
    except Exception:  # noqa: BLE001 - the model's own: it runs as the images came
        return False
    return True


def _refuse_unfit(original: nn.Module, images: Images, outputs: dict[str, Tensor]) -> None:
    """Raise RetrofitError for a model that returns no tensors, or others each time."""
    if not any(tensor.numel() for tensor in outputs.values()):
        raise no_outputs(original, outputs)
    with torch.no_grad(), evaluating(original):
        refuse_random(original, images.copied().batch, images.forward_fn, outputs)


def _are_for_each(original: nn.Module, images: Images, outputs: dict[str, Tensor]) -> bool:
    """Tell whether outputs are one for each image, and so can be regrouped like these."""
    one = images.part(0, 1)
    few = joined([one, one] if len(images) == 1 else [one])
    try:
        others = _outputs(original, few)
    except Exception:  # noqa: BLE001 - it takes batches of one size alone
        return False
    return others.keys() == outputs.keys() and all(
        t.dim() > 0 and len(t) == len(images) and len(others[name]) == len(few)
        for name, t in outputs.items()
    )


class _Measure:
    """The drift in batches of one size, of images that come in any.

    Attributes:
        images: how many were measured.
    """

    def __init__(
        self, original: nn.Module, converted: nn.Module, size: int, *, largest: bool
    ) -> None:
        self.original, self.converted = original, converted
        self.size, self.largest = size, largest
        self.images = 0
        self.waiting: list[Images] = []
        self.errors: dict[str, Comparison] = defaultdict(Comparison)
        self.variations: dict[str, Variation] = defaultdict(Variation)
        self.top1 = Top1()

    def add(self, images: Images) -> None:
        """Add images, and measure as soon as there are enough."""
        self.waiting.append(images)
        while sum(map(len, self.waiting)) >= self.size:
            self._measure(self._batch())

    def _batch(self) -> Images:
        """Take as many images as make a batch."""
        taken, missing = [], self.size
        while missing:
            part = self.waiting.pop(0)
            taken.append(part.part(0, missing))
            if len(part) > missing:
                self.waiting.insert(0, part.part(missing, None))
            missing -= len(taken[-1])
        return joined(taken)

    def _measure(self, images: Images) -> None:
        if self.largest:  # smaller ones leave pieces of memory behind, where this one has no room
            give_back()
        expected = images.expected or _outputs(self.original, images.copied())
        actual = _under_batch_statistics(self.converted, images)
        refuse_other_structure(expected, actual)
        for name, tensor in expected.items():
            self.errors[name].add(tensor, actual[name], name)
            self.variations[name].add(tensor)
        self.top1.add(expected, actual, len(images))
        self.images += len(images)

    def drift(self) -> BatchDrift:
        """Summarise; RetrofitError where outputs were no numbers."""
        if not all(one.finite for one in self.errors.values()):
            raise RetrofitError(
                f"the outputs of this {type(self.original).__name__} hold NaN or Inf: check its "
                "weights and the images; the drift of such outputs has no size"
            )
        error = rms_over_std(self.errors.values(), self.variations.values())
        return BatchDrift(self.size, self.images, error, self.top1.share)


def _under_batch_statistics(converted: nn.Module, images: Images) -> dict[str, Tensor]:
    try:
        with batch_statistics(converted):
            return images.run(converted)
    except ValueError as error:  # torch's, for a single value of each channel
        if isinstance(error, RetrofitError):
            raise
        raise RetrofitError(
            f"this {type(converted).__name__} cannot train on a batch of {len(images)}: {error}"
        ) from error


def _checked_sizes(batch_sizes: object) -> set[int]:
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Iterable):
        raise RetrofitError(f"batch_sizes must be a list such as [8, 32], not {batch_sizes!r}")
    sizes = list(batch_sizes)
    if not sizes:
        raise RetrofitError("batch_sizes names no size: give some, such as [8, 32]")
    for size in sizes:
        check_count("a batch size", size)
    return set(sizes)
