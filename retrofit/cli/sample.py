"""The data that a command runs a model on: what the commands ask of any kind of it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from retrofit.cli.requests import BATCH_SIZE, DRIFT_IMAGES, TEST_IMAGES, PictureOptions
from retrofit.cli.terminal import Terminal
from retrofit.errors import NonFiniteError, RetrofitError
from retrofit.pictures.preparation import Preparation
from retrofit.running.call_arguments import home
from retrofit.tables import Part


class Batches(Protocol):
    """What a model takes, one after another.

    Attributes:
        names: of what is in the batch yielded last; empty where it has none.
        bad: names of what could not be read, and was left out.
    """

    names: list[str]
    bad: list[str]

    def __iter__(self) -> Iterator[Any]: ...


class Sample(ABC):
    """Data as input of a model.

    Attributes:
        model: takes it.
        options: as the command was given them.
        word: for what the data consists of, in the plural.
        kind: the same, with what there is to say of it.
        source: where it comes from.
        preparation: how pictures are prepared, where that is not as the model was trained.
    """

    word = "samples"
    kind = "samples"
    preparation: Preparation | None = None

    def __init__(self, model: nn.Module, options: PictureOptions) -> None:
        self.model, self.options = model, options
        self.batch_size = options.batch_size or BATCH_SIZE

    @property
    @abstractmethod
    def source(self) -> str: ...

    @abstractmethod
    def amount(self, *, at_most: bool = False) -> str:
        """Say how much was asked for, as far as that is known."""

    def announce(self, terminal: Terminal, by: str = "", *, at_most: bool = False) -> None:
        """Say how much there is to do before it is begun."""
        device = self.options.device or home(self.model) or "cpu"
        terminal.say(f"{self.amount(at_most=at_most)}{self.size}, on {device}{by}")

    @property
    def size(self) -> str:
        """How large it is what the model gets, where that is not the data's own affair."""
        return ""

    @abstractmethod
    def refuse_processes(self, count: int) -> None:
        """Raise RetrofitError if so many processes cannot share it."""

    @abstractmethod
    def example(self) -> Any:
        """Read a batch to plan with."""

    @abstractmethod
    def batches(self, rank: int = 0, processes: int = 1) -> Batches:
        """Make batches of what was asked for, or of the share of one of several processes."""

    @abstractmethod
    def tests(self, used: int) -> tuple[Batches, str]:
        """Choose what a network calibrated on the first `used` is compared on, and say what."""

    @abstractmethod
    def for_drift(self, used: int) -> Batches:
        """Choose what to measure drift on, beyond the first `used` if there is enough, or of them.

        A batch that is much of those has nearly their statistics, and so too little drift.
        """

    def refuse_once_only(self, option: str) -> None:  # noqa: B027 - most can be read again
        """Raise RetrofitError for data that is gone after a pass, where an option needs more."""

    def list_bad(self, terminal: Terminal, names: Sequence[str]) -> None:  # noqa: B027 - most is read
        """Tell what was left out."""

    def warn_of_guess(self, terminal: Terminal) -> None:  # noqa: B027 - most is the user's own
        """Warn of a preparation that nothing told, in statistics that were measured."""

    def worded(self, parts: Iterable[Part]) -> Iterable[Part]:
        """Write the word for this data where the library speaks of images."""
        images = re.compile(r"(?<=\d )images\b")
        return [images.sub(self.word, part) if isinstance(part, str) else part for part in parts]


class OrderedSample(Sample):
    """Data of which each piece can be read by its index.

    Attributes:
        order: indices of all of them, shuffled.
    """

    def __init__(self, model: nn.Module, options: PictureOptions, order: Sequence[int]) -> None:
        super().__init__(model, options)
        self.order = order

    @property
    def chosen(self) -> Sequence[int]:
        """The first ones, as many as were asked for."""
        return self.order[: self.options.images]

    @abstractmethod
    def part(self, indices: Sequence[int], *, batch_size: int, workers: int | None) -> Batches:
        """Make batches of some of it."""

    def amount(self, *, at_most: bool = False) -> str:
        return f"{'up to ' if at_most else ''}{len(self.chosen):,} {self.kind}"

    def refuse_processes(self, count: int) -> None:
        if len(self.chosen) < count:
            raise RetrofitError(
                f"{count} processes cannot share {len(self.chosen)} {self.word}: start fewer, or "
                f"use more {self.word} (--data, --images)"
            )

    def example(self) -> Any:
        two = self.part(self.chosen, batch_size=min(self.batch_size, 2), workers=0)
        return next(iter(two))

    def batches(self, rank: int = 0, processes: int = 1) -> Batches:
        return self._part(self.chosen[rank::processes])

    def tests(self, used: int) -> tuple[Batches, str]:
        others = self.order[min(used, len(self.chosen)) :][:TEST_IMAGES]
        if len(others) == TEST_IMAGES:
            return self._part(others), f"other {self.word}"
        return self._part(self.chosen[:TEST_IMAGES]), f"of the same {self.word}"

    def for_drift(self, used: int) -> Batches:
        used = min(used, len(self.chosen))
        beyond = self.order[used:][:DRIFT_IMAGES]
        few = self.chosen[: min(used // 4, DRIFT_IMAGES)]
        return self._part(beyond if len(beyond) == DRIFT_IMAGES else few)

    def _part(self, indices: Sequence[int]) -> Batches:
        return self.part(indices, batch_size=self.batch_size, workers=self.options.workers)


@contextmanager
def naming(batches: Batches) -> Iterator[None]:
    """Say which picture or sample it was that gave a NaN in the block, if it has a name."""
    try:
        yield
    except NonFiniteError as error:
        named = error.image is not None and error.item < len(batches.names)
        name = batches.names[error.item] if named else None
        raise NonFiniteError(error.site, error.item, error.image, name) from None
