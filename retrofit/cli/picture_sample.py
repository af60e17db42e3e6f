"""Pictures, as a model was trained to get them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torchvision.transforms import Compose

from retrofit.cli.requests import PictureOptions, default_workers
from retrofit.cli.sample import OrderedSample
from retrofit.cli.terminal import Terminal
from retrofit.files.model_sources import transforms
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preprocessing import Transform, black, preprocessing
from retrofit.pictures.sources import Pictures
from retrofit.running.input_channels import input_channels, input_dtype
from retrofit.running.signatures import takes_lists
from retrofit.tables import Part


class PictureSample(OrderedSample):
    """Pictures in an order.

    Args:
        model, options, order: as for `OrderedSample`.
        pictures: where they come from.
        transform: from a picture to the model's input.
        channels: that the model takes.
    """

    word = "images"

    def __init__(
        self,
        model: nn.Module,
        options: PictureOptions,
        order: Sequence[int],
        pictures: Pictures,
        transform: Transform,
        channels: int,
    ) -> None:
        super().__init__(model, options, order)
        self.pictures, self.transform, self.channels = pictures, transform, channels
        self.kind = self._kind()

    @property
    def source(self) -> str:
        """Where the pictures are, how they were drawn, and a mean and std that were given."""
        text = f"{self.options.data}, seed {self.options.seed or 0}"
        for name, numbers in (("mean", self.options.mean), ("std", self.options.std)):
            if numbers is not None:
                text += f", {name} {' '.join(map(str, numbers))}"
        return text

    def _kind(self) -> str:
        """Say what the model sees, and how many channels and bits if not 3 and 32."""
        kinds = {1: "grey images", 3: "images"}
        kind = kinds.get(self.channels, f"images ({self.channels} channels)")
        dtype = input_dtype(self.model)
        return kind if dtype == torch.float32 else f"{kind} as {str(dtype).removeprefix('torch.')}"

    @property
    def size(self) -> str:
        return f" of {size_in_words(self.transform, self.channels)}"

    def part(
        self, indices: Sequence[int], *, batch_size: int, workers: int | None
    ) -> PictureBatches:
        return PictureBatches(
            self.pictures,
            indices,
            self.transform,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            channels=self.channels,
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
) -> PictureSample:
    """Prepare pictures as the model `spec` with these weights was trained."""
    make = functools.partial(
        preprocessing, transforms(spec, model, weights), resize=options.resize, crop=options.crop
    )
    size = make()(black(3)).shape[-2:]
    channels = input_channels(model, size) or _channels(pictures, options)
    pictures.check_channels(channels)
    transform = make(mean=options.mean, std=options.std, channels=channels)
    if (dtype := input_dtype(model)) != torch.float32:
        transform = Compose([transform, operator.methodcaller("to", dtype)])
    order = shuffled(len(pictures), options.seed or 0)
    return PictureSample(model, options, order, pictures, transform, channels)


def size_in_words(transform: Transform, channels: int) -> str:
    """Say how large the pictures are that the model gets."""
    square, wide = (tuple(transform(black(channels, 64, width)).shape[-2:]) for width in (64, 96))
    return f"{square[0]} x {square[1]} pixels" if square == wide else "sizes of their own"


def _channels(pictures: Pictures, options: PictureOptions) -> int:
    """Choose the number of channels for a model that does not tell: as it was asked for, or 3."""
    asked = max(len(numbers) for numbers in (options.mean or (), options.std or ()))
    if asked > 1:
        return asked
    return 3 if pictures.channels in (None, 1) else pictures.channels
