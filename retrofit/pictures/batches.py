"""Pictures to batches of tensors: read by worker processes, prepared, put together."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate
from torchvision.transforms import Compose, InterpolationMode, Resize
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

from retrofit.errors import RetrofitError
from retrofit.pictures.eight_bits import counted, eight_bits
from retrofit.pictures.preprocessing import Transform
from retrofit.pictures.sources import Pictures
from retrofit.pictures.workers import loaded


def _first_resize(transform: Transform) -> Any:
    """Find the torchvision Resize that a transform begins with; None if it is not a smooth one."""
    from torchvision.transforms import v2  # noqa: PLC0415 - slow to import

    step: Any = transform
    while isinstance(step, (Compose, v2.Compose)) and step.transforms:
        step = step.transforms[0]
    if isinstance(step, (ImageClassification, SemanticSegmentation)) and step.resize_size:
        step = Resize(step.resize_size, step.interpolation)
    nearest = (InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT, Image.Resampling.NEAREST)
    known = (
        isinstance(step, (Resize, v2.Resize)) and step.size and step.interpolation not in nearest
    )
    return step if known else None


def _resized(resize: Any, width: int, height: int) -> tuple[int, int]:
    """Compute the size that torchvision's Resize gives a picture of that size."""
    size = [resize.size] if isinstance(resize.size, int) else resize.size
    if len(size) == 2:
        return size[1], size[0]
    short, long = size[0], int(size[0] * max(width, height) / min(width, height))
    if resize.max_size is not None and long > resize.max_size:
        short, long = int(resize.max_size * short / long), resize.max_size
    return (short, long) if width <= height else (long, short)


def _draft(picture: Image.Image, resize: Any) -> None:
    """Let a JPEG be decoded at 1/8, 1/4 or 1/2 of its size, if `resize` gives nearly the same then.

    As in PIL's thumbnail: no smaller than twice the size that is needed. Rounding of the reduced
    size must not change the size that the transform gives.
    """
    width, height = picture.size
    target = _resized(resize, width, height)
    for scale in (8, 4, 2):
        reduced = -(-width // scale), -(-height // scale)
        enough = reduced[0] >= 2 * target[0] and reduced[1] >= 2 * target[1]
        if enough and _resized(resize, *reduced) == target:
            picture.draft(None, (width // scale, height // scale))
            return


class _Item(NamedTuple):
    name: str
    tensor: Tensor | None
    problem: str


class _Items(Dataset[_Item]):
    """Reads and transforms; an unreadable picture is an item too, for the loader to judge."""

    def __init__(
        self, pictures: Pictures, indices: Sequence[int], transform: Transform, channels: int
    ) -> None:
        self.pictures, self.indices, self.transform = pictures, indices, transform
        self.channels = channels
        self.resize = _first_resize(transform)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = self.indices[position]
        name = self.pictures.name(index)
        try:
            return _Item(name, self._input(index), "")
        except (
            OSError,
            SyntaxError,
            ValueError,
            MemoryError,
            Image.DecompressionBombError,
        ) as error:
            return _Item(name, None, str(error).splitlines()[0] if str(error) else "unreadable")

    def _input(self, index: int) -> Tensor:
        source = self.pictures.read(index)
        if not isinstance(source, Image.Image):
            return self.transform(eight_bits(source, self.channels))
        with source:
            if self.resize is not None:
                _draft(source, self.resize)
            return self.transform(eight_bits(source, self.channels))


class _Batch(NamedTuple):
    """What a worker hands over.

    Pictures of one size are one tensor, hence one piece of shared memory and one open file, of
    which a process may have only some hundreds.
    """

    names: list[str]
    pictures: Tensor | list[Tensor]
    bad: list[tuple[str, str]]  # names, and what is wrong


def _collate(items: list[_Item]) -> _Batch:
    names = [item.name for item in items if item.tensor is not None]
    tensors = [item.tensor for item in items if item.tensor is not None]
    alike = len({tensor.shape for tensor in tensors}) == 1
    bad = [(item.name, item.problem) for item in items if item.tensor is None]
    return _Batch(names, default_collate(tensors) if alike else tensors, bad)


class PictureBatches:
    """Batches of pictures that workers read: tensors (N, C, H, W), or lists of (C, H, W).

    An iteration starts at the beginning, or where `load_state_dict` says.

    Args:
        pictures, indices: which pictures, in which order.
        transform: see `preprocessing`. Where it begins with a resize, a large JPEG is decoded at a
            reduced size.
        batch_size, workers: pictures in a batch, and processes that read ahead two batches each.
        channels: C; see `eight_bits`.
        lists: the model takes pictures of different sizes, as a list; such a batch is one.
        skip_bad: leave unreadable pictures out, and list them in `bad`, instead of raising.
        pin: give batches in pinned memory, from which copies to a GPU need not be waited for.
        in_random_order: the indices are, so that a calibration may end before the last of them.

    Attributes:
        names: of the pictures in the batch yielded last.
        bad: names of the unreadable pictures left out so far.

    Raises RetrofitError, while iterating, with the name of an unreadable picture, when none of all
    can be read, or when pictures have different sizes and the model takes no lists.
    """

    def __init__(
        self,
        pictures: Pictures,
        indices: Sequence[int],
        transform: Transform,
        *,
        batch_size: int,
        workers: int,
        channels: int = 3,
        lists: bool = False,
        skip_bad: bool = False,
        pin: bool = False,
        in_random_order: bool = False,
    ) -> None:
        self.dataset = _Items(pictures, indices, transform, channels)
        self.batch_size, self.workers, self.pin = batch_size, workers, pin
        self.lists, self.skip_bad = lists, skip_bad
        self.in_random_order = in_random_order
        self.names: list[str] = []
        self.bad: list[str] = []
        self._done = 0  # batches of this iteration, those without a readable picture too
        self._start = 0  # where the next iteration begins

    @property
    def left(self) -> int:
        """How many pictures the next iteration reads."""
        return max(0, len(self.dataset) - self._start * self.batch_size)

    def __len__(self) -> int:
        """Count the batches of the next iteration, if each has a readable picture."""
        return math.ceil(self.left / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader[_Item] = DataLoader(
            self.dataset,
            batch_sampler=BatchSampler(
                range(len(self.dataset) - self.left, len(self.dataset)),
                self.batch_size,
                drop_last=False,
            ),
            num_workers=min(self.workers, len(self)),
            collate_fn=_collate,
            pin_memory=self.pin,
        )
        self._done, self._start = self._start, 0
        return self._batches(loader)

    def _batches(self, loader: DataLoader[_Item]) -> Iterator[Any]:
        done = self._done
        given = done  # what came before a resumption has given something
        problems: list[str] = []
        for names, pictures, bad in loaded(loader, "pictures"):
            for name, problem in bad:
                if not self.skip_bad:
                    raise RetrofitError(
                        f"{name} cannot be read: {problem} (--skip-bad-images leaves such pictures "
                        "out)"
                    )
                problems.append(f"{name}: {problem}")
                if name not in self.bad:
                    self.bad.append(name)
            if isinstance(pictures, list) and pictures and not self.lists:
                raise _different_sizes(pictures)
            done += 1
            self._done = done  # before the yield: who has got a batch is to have what follows it
            if len(pictures):
                self.names, given = names, given + 1
                yield pictures
        if problems and not given:
            raise RetrofitError(f"none of {len(problems)} pictures can be read: {problems[0]}")

    def state_dict(self) -> dict[str, Any]:
        """Say where the iteration stands, for JSON: how many batches it has given, and of what."""
        return {"batches": self._done, "bad": list(self.bad), **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where the state was taken; the pictures before are not read.

        RetrofitError if it is of other pictures or another order, batch size or transform.
        """
        if missing := {"batches", "bad", *self._identity} - state.keys():
            raise RetrofitError(f"this is no state of PictureBatches: {min(missing)} is missing")
        differences = [
            f"another {what.replace('_', ' ')}: {state[what]}, not {here}"
            for what, here in self._identity.items()
            if state[what] != here
        ]
        if differences:
            raise RetrofitError(f"the state is of {'; of '.join(differences)} (start without it)")
        self._start = self._done = state["batches"]
        self.bad = list(state["bad"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a state must agree in."""
        order = hashlib.sha256()
        for index in self.dataset.indices:
            name = self.dataset.pictures.name(index)
            order.update(name.encode(errors="surrogateescape") + b"\0")
        transform = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.dataset.transform))
        names = f"whose names in their order (--seed) have SHA-256 {order.hexdigest()}"
        data_set = f"{len(self.dataset)} pictures {names}"
        if self.dataset.channels != 3:
            data_set += f", of {counted(self.dataset.channels)}"
        return {
            "data_set": data_set,
            "batch_size": self.batch_size,
            "transform": " ".join(transform.split()),
        }


def _different_sizes(pictures: list[Tensor]) -> RetrofitError:
    sizes = list(dict.fromkeys(tuple(picture.shape[1:]) for picture in pictures))
    shown = ", ".join(f"{height} x {width}" for height, width in sizes[:3])
    return RetrofitError(
        f"the pictures have different sizes ({shown}{', ...' if len(sizes) > 3 else ''}) "
        "and the model takes them as one tensor: give --crop, or --batch-size 1"
    )


def shuffled(count: int, seed: int) -> list[int]:
    """Shuffle 0 ... count - 1, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Any] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order
