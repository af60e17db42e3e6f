"""Pictures, as a model was trained to get them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.transforms import Compose

from retrofit.cli.requests import PictureOptions, default_workers
from retrofit.cli.sample import OrderedSample
from retrofit.cli.terminal import Terminal
from retrofit.files.model_sources import transforms, untold
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preparation import Preparation
from retrofit.pictures.preprocessing import Transform, black, normalisation, preprocessing
from retrofit.pictures.sources import Pictures
from retrofit.running.input_channels import input_channels, input_dtype
from retrofit.running.signatures import takes_lists
from retrofit.tables import Part


@dataclass(frozen=True)
class Prepared:
    """How pictures become the input of a model.

    Attributes:
        transform: from a picture to that input.
        channels: that the model takes.
        words: what comes of it: its size, mean and std.
        preparation: what of the transform is not as the model was trained; None for nothing.
        guess: a sentence on what of the transform nothing tells; "" if that is nothing.
    """

    transform: Transform
    channels: int
    words: str
    preparation: Preparation | None
    guess: str


class PictureSample(OrderedSample):
    """Pictures in an order.

    Args:
        model, options, order: as for `OrderedSample`.
        pictures: where they come from.
        prepared: how they become the model's input.
    """

    word = "images"

    def __init__(
        self,
        model: nn.Module,
        options: PictureOptions,
        order: Sequence[int],
        pictures: Pictures,
        prepared: Prepared,
    ) -> None:
        super().__init__(model, options, order)
        self.pictures, self.prepared = pictures, prepared
        self.preparation = prepared.preparation
        self.kind = self._kind()

    @property
    def source(self) -> str:
        """Where the pictures are, how they were drawn, and how they were prepared."""
        return f"{self.options.data}, seed {self.options.seed or 0},{self.size}"

    def _kind(self) -> str:
        """Say what the model sees, and how many channels and bits if not 3 and 32."""
        kinds = {1: "grey images", 3: "images"}
        channels = self.prepared.channels
        kind = kinds.get(channels, f"images ({channels} channels)")
        dtype = input_dtype(self.model)
        return kind if dtype == torch.float32 else f"{kind} as {str(dtype).removeprefix('torch.')}"

    @property
    def size(self) -> str:
        return f" of {self.prepared.words}"

    def warn_of_guess(self, terminal: Terminal) -> None:
        if self.prepared.guess:
            terminal.warn(self.prepared.guess)

    def part(
        self, indices: Sequence[int], *, batch_size: int, workers: int | None
    ) -> PictureBatches:
        return PictureBatches(
            self.pictures,
            indices,
            self.prepared.transform,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            channels=self.prepared.channels,
            lists=takes_lists(self.model),
            skip_bad=self.options.skip_bad_images,
            in_random_order=True,
            pin=(self.options.device or "").startswith("cuda") and torch.cuda.is_available(),
        )

    def worded(self, parts: Iterable[Part]) -> Iterable[Part]:
        return parts  # pictures are images

    def list_bad(self, terminal: Terminal, names: Sequence[str]) -> None:
        """Tell what was left out: damaged shards, and pictures that could not be read."""
        for shard in self.pictures.bad:
            terminal.remark(f"used in part or not at all: {shard}")
        if bad := list(dict.fromkeys(names)):
            terminal.remark(f"left out {len(bad)} unreadable pictures: {', '.join(bad)}")
        terminal.tell(damaged_shards=list(self.pictures.bad), unreadable_pictures=bad)


def picture_sample(
    model: nn.Module,
    spec: str,
    options: PictureOptions,
    weights: str | None,
    pictures: Pictures,
    told: Preparation | None,
) -> PictureSample:
    """Prepare pictures as the model `spec` with these weights was trained.

    But as the options say, and where these say nothing as was `told`, by a file.
    """
    preparation = options.preparation.over(told)
    make = functools.partial(
        preprocessing,
        transforms(spec, model, weights),
        resize=preparation.resize,
        crop=preparation.crop,
    )
    size = make()(black(3)).shape[-2:]
    channels = input_channels(model, size) or _channels(pictures, preparation)
    pictures.check_channels(channels)
    transform = make(mean=preparation.mean, std=preparation.std, channels=channels)
    words = prepared_in_words(transform, channels)
    guess = _guess(spec, [step for step in untold(spec, model) if step not in preparation.given])
    if (dtype := input_dtype(model)) != torch.float32:
        transform = Compose([transform, operator.methodcaller("to", dtype)])
    kept = preparation if preparation.given else None
    prepared = Prepared(transform, channels, words, kept, guess)
    order = shuffled(len(pictures), options.seed or 0)
    return PictureSample(model, options, order, pictures, prepared)


def prepared_in_words(transform: Transform, channels: int) -> str:
    """Say how large the pictures are that the model gets, and how they are normalised."""
    square, wide = (tuple(transform(black(channels, 64, width)).shape[-2:]) for width in (64, 96))
    size = f"{square[0]} x {square[1]} pixels" if square == wide else "sizes of their own"
    found = normalisation(transform, channels)
    if found is None:
        return size
    mean, std = map(_numbers, found)
    return f"{size}, mean {mean}, std {std}"


def _numbers(values: Sequence[float]) -> str:
    texts = [f"{value:.4g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _guess(spec: str, steps: Sequence[str]) -> str:
    """Say which steps nothing tells, and what is done then; "" if there are none."""
    if not steps:
        return ""
    options = [f"--{step}" for step in steps]
    named = " and ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return (
        f"nothing tells how {spec} was trained: without {named} the images were prepared as for "
        "torchvision's classifiers of ImageNet, and the statistics are of such images"
    )


def _channels(pictures: Pictures, preparation: Preparation) -> int:
    """Choose the number of channels for a model that does not tell: as it was asked for, or 3."""
    asked = max(len(numbers) for numbers in (preparation.mean or (), preparation.std or ()))
    if asked > 1:
        return asked
    return 3 if pictures.channels in (None, 1) else pictures.channels
