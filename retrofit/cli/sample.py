"""The pictures that a command runs a model on."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import Compose

from retrofit.cli.requests import PictureOptions
from retrofit.cli.terminal import Terminal
from retrofit.errors import NonFiniteError
from retrofit.files.model_sources import transforms
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preprocessing import Transform, black, preprocessing
from retrofit.pictures.sources import Pictures, open_pictures
from retrofit.running.call_arguments import home
from retrofit.running.devices import usable
from retrofit.running.input_channels import input_channels, input_dtype
from retrofit.running.signatures import takes_lists


@dataclass(frozen=True)
class Sample:
    """Pictures in an order, as input of a model.

    Attributes:
        model: takes them.
        pictures: where they come from.
        transform: from a picture to the model's input.
        channels: that the model takes.
        order: indices of all pictures, shuffled.
        options: as the command was given them.
    """

    model: nn.Module
    pictures: Pictures
    transform: Transform
    channels: int
    order: Sequence[int]
    options: PictureOptions

    @property
    def chosen(self) -> Sequence[int]:
        """The first pictures, as many as were asked for."""
        return self.order[: self.options.images]

    @property
    def source(self) -> str:
        """Where the pictures are, how they were drawn, and a mean and std that were given."""
        text = f"{self.options.data}, seed {self.options.seed}"
        for name, numbers in (("mean", self.options.mean), ("std", self.options.std)):
            if numbers is not None:
                text += f", {name} {' '.join(map(str, numbers))}"
        return text

    @property
    def kind(self) -> str:
        """What the model sees: "pictures", and how many channels and bits if not 3 and 32."""
        kinds = {1: "grey pictures", 3: "pictures"}
        kind = kinds.get(self.channels, f"pictures ({self.channels} channels)")
        dtype = input_dtype(self.model)
        return kind if dtype == torch.float32 else f"{kind} as {str(dtype).removeprefix('torch.')}"

    @property
    def size(self) -> str:
        """How large the pictures are that the model gets."""
        square, wide = (
            tuple(self.transform(black(self.channels, 64, width)).shape[-2:]) for width in (64, 96)
        )
        return f"{square[0]} x {square[1]} pixels" if square == wide else "sizes of their own"

    def announce(
        self,
        terminal: Terminal,
        indices: Sequence[int],
        by: str = "",
        *,
        at_most: bool = False,
    ) -> None:
        """Say how much there is to do before it is begun."""
        device = self.options.device or home(self.model) or "cpu"
        number = f"up to {len(indices):,}" if at_most else f"{len(indices):,}"
        terminal.say(f"{number} {self.kind} of {self.size}, on {device}{by}")

    def batches(self, indices: Sequence[int]) -> PictureBatches:
        """Make batches of some of the pictures."""
        return PictureBatches(
            self.pictures,
            indices,
            self.transform,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
            channels=self.channels,
            lists=takes_lists(self.model),
            skip_bad=self.options.skip_bad_images,
            in_random_order=True,
            pin=(self.options.device or "").startswith("cuda") and torch.cuda.is_available(),
        )

    def example(self, indices: Sequence[int]) -> Any:
        """Read two pictures, or one, to plan with."""
        few = dataclasses.replace(
            self.options, batch_size=min(self.options.batch_size, 2), workers=0
        )
        return next(iter(dataclasses.replace(self, options=few).batches(indices)))


def check_device(options: PictureOptions) -> None:
    """Raise RetrofitError for a device that nothing can be computed on, before the work is done."""
    if options.device is not None:
        usable(options.device)


def open_data(options: PictureOptions) -> Pictures:
    """Open the pictures that the options name."""
    return open_pictures(Path(options.data or ""), skip_bad=options.skip_bad_images)


def sample_for(
    model: nn.Module,
    spec: str,
    options: PictureOptions,
    weights: str | None = None,
    pictures: Pictures | None = None,
) -> Sample:
    """Open the pictures and prepare them as the model `spec` with these weights was trained."""
    make = functools.partial(
        preprocessing, transforms(spec, model, weights), resize=options.resize, crop=options.crop
    )
    size = make()(black(3)).shape[-2:]
    pictures = pictures or open_data(options)
    channels = input_channels(model, size) or _channels(pictures, options)
    pictures.check_channels(channels)
    transform = make(mean=options.mean, std=options.std, channels=channels)
    if (dtype := input_dtype(model)) != torch.float32:
        transform = Compose([transform, operator.methodcaller("to", dtype)])
    order = shuffled(len(pictures), options.seed)
    return Sample(model, pictures, transform, channels, order, options)


def _channels(pictures: Pictures, options: PictureOptions) -> int:
    """Choose the number of channels for a model that does not tell: as it was asked for, or 3."""
    asked = max(len(numbers) for numbers in (options.mean or (), options.std or ()))
    if asked > 1:
        return asked
    return 3 if pictures.channels in (None, 1) else pictures.channels


@contextmanager
def naming_pictures(batches: PictureBatches) -> Iterator[None]:
    """Say which picture it was that gave a NaN in the block."""
    try:
        yield
    except NonFiniteError as error:
        name = None if error.image is None else batches.names[error.item]
        raise NonFiniteError(error.site, error.item, error.image, name) from None


def list_bad(terminal: Terminal, pictures: Pictures, names: Sequence[str]) -> None:
    """Tell what was left out: damaged shards, and pictures that could not be read."""
    for shard in pictures.bad:
        terminal.remark(f"used in part or not at all: {shard}")
    if bad := list(dict.fromkeys(names)):
        terminal.remark(f"left out {len(bad)} unreadable pictures: {', '.join(bad)}")
    terminal.tell(damaged_shards=list(pictures.bad), unreadable_pictures=bad)
