"""What batch statistics change: the first step of fine-tuning will see it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.checking.verify import no_outputs, refuse_random
from retrofit.errors import RetrofitError, warn
from retrofit.numerics.comparison import (
    Comparison,
    Top1,
    Variation,
    refuse_other_structure,
    rms_over_std,
)
from retrofit.option_checks import check_count, check_models
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import arguments_of, call_model
from retrofit.running.modes import batch_statistics, evaluating
from retrofit.running.nested import tensors
from retrofit.tables import table


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
        text = table(head, cells, right=",".join(head))
        if self.left_out:
            text += f"\ntoo few images for batches of {', '.join(map(str, self.left_out))}"
        return text


def drift(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    batch_sizes: Iterable[int] = (8, 32, 128),
) -> Drift:
    """Measure how far the outputs move when BatchNorm uses the statistics of the batch.

    That is what the first step of fine-tuning sees. Dropout stays off, and modes and running
    statistics are afterwards as they were.

    Args:
        original: as for `verify`.
        converted: as for `verify`.
        data: batches, as for `calibrate`; all images together, regrouped for each batch size. A
            last batch that is not full is left out.
        batch_sizes: those with more images than there are come back in `left_out`.

    Returns:
        A `Drift`, one row for each batch size, the smallest first.

    Raises:
        RetrofitError: no data; too few images for the smallest batch size; no batch size, or one
            below 1, or too small to train on; images of several sizes; a model that takes more
            than one tensor, or whose original is random or gives NaN or Inf.
    """
    check_models("drift", original, converted)
    check_data(data)
    sizes = sorted(_checked_sizes(batch_sizes))
    batches = [_picture_batch(original, batch) for batch in data]
    if not batches:
        raise RetrofitError(nothing_in(data))
    total = sum(map(len, batches))
    if len({x.shape[1:] for x in batches}) > 1:
        raise RetrofitError("the images have several sizes: they cannot be regrouped into batches")
    if total < sizes[0]:
        raise RetrofitError(f"{total} images are too few for the batch sizes {sizes}")
    images = torch.cat(batches)
    _refuse_unfit(original, images[: sizes[0]])
    if not any(isinstance(module, _BatchNorm) for module in converted.modules()):
        warn(f"this {type(converted).__name__} has no BatchNorm: batch statistics change nothing")
    fitting = [size for size in sizes if size <= total]
    rows = [
        _measured(original, converted, images[: total // size * size], size) for size in fitting
    ]
    return Drift(tuple(rows), tuple(size for size in sizes if size > total))


def _refuse_unfit(original: nn.Module, images: Tensor) -> None:
    """Raise RetrofitError for a model that returns no tensors, or others each time."""
    with torch.no_grad(), evaluating(original):
        outputs = tensors(call_model(original, images, None), "output")
        if not any(tensor.numel() for tensor in outputs.values()):
            raise no_outputs(original)
        refuse_random(original, images, None, outputs)


def _measured(
    original: nn.Module, converted: nn.Module, images: Tensor, batch_size: int
) -> BatchDrift:
    """Measure the drift for batches of one size, of which `images` are a multiple."""
    errors: dict[str, Comparison] = defaultdict(Comparison)
    variations: dict[str, Variation] = defaultdict(Variation)
    top1 = Top1()
    for x in images.split(batch_size):
        with torch.no_grad(), evaluating(original):
            expected = tensors(call_model(original, x, None), "output")
        actual = _under_batch_statistics(converted, x)
        refuse_other_structure(expected, actual)
        for name, tensor in expected.items():
            errors[name].add(tensor, actual[name], name)
            variations[name].add(tensor)
        top1.add(expected, actual, len(x))
    if not all(one.finite for one in errors.values()):
        raise RetrofitError(
            f"the outputs of this {type(original).__name__} hold NaN or Inf: check its weights and "
            "the images; the drift of such outputs has no size"
        )
    error = rms_over_std(errors.values(), variations.values())
    return BatchDrift(batch_size, len(images), error, top1.share)


def _under_batch_statistics(converted: nn.Module, x: Tensor) -> dict[str, Tensor]:
    try:
        with torch.no_grad(), batch_statistics(converted):
            return tensors(call_model(converted, x, None), "output")
    except ValueError as error:  # torch's, for a single value of each channel
        if isinstance(error, RetrofitError):
            raise
        raise RetrofitError(
            f"this {type(converted).__name__} cannot train on a batch of {len(x)}: {error}"
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


def _picture_batch(model: nn.Module, batch: Any) -> Tensor:
    """Return the one tensor that the model takes; RetrofitError if it takes more."""
    arguments = arguments_of(model, batch)
    values = (*arguments.args, *arguments.kwargs.values())
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise RetrofitError(
            f"{type(model).__name__} takes more than one tensor: drift regroups pictures, and does "
            "so for models of one input alone"
        )
    return values[0]
