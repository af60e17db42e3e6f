"""Data of the user's own code, `--data file.py:loader`: a Dataset, or batches as they come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset

from retrofit.cli.requests import DRIFT_IMAGES, TEST_IMAGES, PictureOptions, default_workers
from retrofit.cli.sample import Batches, OrderedSample, Sample
from retrofit.errors import RetrofitError
from retrofit.files.user_code import named, said
from retrofit.pictures.batches import shuffled
from retrofit.pictures.workers import loaded
from retrofit.running.batch_checks import check_data
from retrofit.running.call_arguments import images_in
from retrofit.running.progress import images_in_all
from retrofit.running.random_order import in_random_order

OF_PICTURES = ("resize", "crop", "mean", "std", "skip_bad_images")
OF_DATASETS = ("batch_size", "workers", "seed")


class OwnData:
    """What the code of that name gives.

    Attributes:
        spec: `file.py:name` or `package.module:name`.
        data: what it is, or what it returned when it was called.
        is_dataset: it gives single samples by their index.

    Raises RetrofitError for what gives no data.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._named = named(spec, "loader")
        self._is_called = callable(self._named) and (
            isinstance(self._named, type) or not _gives_items(self._named)
        )
        self.data = self._made()
        self._unused = True
        # Of torch, or with its protocol, as Hugging Face's.
        indexed = isinstance(self.data, Dataset) or hasattr(self.data, "__getitems__")
        self.is_dataset = indexed and not isinstance(self.data, IterableDataset)
        if self.is_dataset and not hasattr(self.data, "__len__"):
            raise RetrofitError(f"{spec} gives a {type(self.data).__name__} without __len__")
        self.count = self._length() if self.is_dataset else None

    def _made(self) -> Any:
        data = self._named
        if self._is_called:
            with self.telling():
                data = self._named()
        try:
            check_data(data)
        except RetrofitError as error:
            verb = "returned" if self._is_called else "is"  # which type, the error says
            raise RetrofitError(f"{self.spec} {verb} no data: {error}") from error
        return data

    def _length(self) -> int:
        with self.telling():
            return len(self.data)

    @property
    def once_only(self) -> bool:
        """Whether it can be gone through once, and no function gives it anew."""
        return isinstance(self.data, Iterator) and not self._is_called

    def iterator(self) -> Iterator[Any]:
        """Begin to go through it; what a function returned, and is used up, is asked for anew."""
        if isinstance(self.data, Iterator) and not self._unused:
            anew = self._made() if self._is_called else self.data
            if anew is self.data:
                raise RetrofitError(
                    f"{self.spec} gives a {type(anew).__name__} that is used up, and its batches "
                    "are needed once more: let a function return a new one at each call, or give a "
                    "list, a DataLoader or a Dataset"
                )
            self.data = anew
        self._unused = False
        with self.telling():
            return iter(self.data)

    def telling(self) -> _Telling:
        """Say in a line what the code raises in the block, and where."""
        return _Telling(self.spec)


class _Telling:
    """Turns what the user's code raises into a RetrofitError."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # Of those that end the process one is torchrun's, at whatever the code is doing.
        told = isinstance(error, RetrofitError) or str(error).startswith("retrofit: ")
        if isinstance(error, (Exception, SystemExit)) and not told:
            hint = ""
            if "stack expects each tensor to be equal size" in str(error):
                hint = "; samples of several sizes need a DataLoader with a collate_fn of yours"
            raise RetrofitError(f"{self.spec} failed: {said(error, self.spec)}{hint}") from error


def _gives_items(thing: Any) -> bool:
    return hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")


def own_sample(model: nn.Module, options: PictureOptions, data: OwnData) -> Sample:
    """Take data as it is; RetrofitError for options that it cannot follow."""
    refused = dict.fromkeys(OF_PICTURES, f"is for pictures: {data.spec} gives its own, prepared")
    if not data.is_dataset:
        why = f"is for a Dataset: {data.spec} gives batches, made and in an order of its own"
        refused |= dict.fromkeys(OF_DATASETS, why)
    for name, why in refused.items():
        if name in options.typed:
            raise RetrofitError(f"--{name.replace('_', '-')} {why}")
    if data.count == 0:
        raise RetrofitError(f"{data.spec} gives a {type(data.data).__name__} of no samples")
    return (DatasetSample if data.is_dataset else LoaderSample)(model, options, data)


class _Chosen(Dataset[Any]):
    """Some of the samples of a Dataset."""

    bar_unit = "sample"

    def __init__(self, data: OwnData, indices: Sequence[int]) -> None:
        self.data, self.indices = data.data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.data[self.indices[position]]


class DatasetSample(OrderedSample):
    """A Dataset, shuffled, put together into batches as torch's DataLoader does by default."""

    def __init__(self, model: nn.Module, options: PictureOptions, data: OwnData) -> None:
        super().__init__(model, options, shuffled(data.count or 0, options.seed or 0))
        self.data = data

    @property
    def source(self) -> str:
        return f"{self.data.spec}, seed {self.options.seed or 0}"

    def part(self, indices: Sequence[int], *, batch_size: int, workers: int | None) -> Batches:
        most = default_workers() if workers is None else workers
        return _DatasetBatches(self, indices, batch_size, most)


class _DatasetBatches:
    in_random_order = True

    def __init__(
        self, sample: DatasetSample, indices: Sequence[int], batch_size: int, workers: int
    ) -> None:
        self.spec, self.telling = sample.data.spec, sample.data.telling
        self.dataset = _Chosen(sample.data, indices)
        self.batch_size, self.workers = batch_size, workers
        self.seed = sample.options.seed or 0
        self.pin = (sample.options.device or "").startswith("cuda") and torch.cuda.is_available()
        self.names: list[str] = []
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            self.batch_size,
            num_workers=min(self.workers, -(-len(self.dataset) // self.batch_size)),
            pin_memory=self.pin,
            generator=torch.Generator().manual_seed(self.seed),  # of which workers have their seeds
        )
        batches = loaded(loader, "samples")
        for first in itertools.count(step=self.batch_size):
            with self.telling():
                batch = next(batches, None)
            if batch is None:
                return
            indices = self.dataset.indices[first : first + self.batch_size]
            self.names = [f"sample {index} of {self.spec}" for index in indices]
            yield batch


class LoaderSample(Sample):
    """Batches that come in an order of their own, and whose number may not be known."""

    def __init__(self, model: nn.Module, options: PictureOptions, data: OwnData) -> None:
        super().__init__(model, options)
        self.data = data
        self._begun: tuple[list[Any], Iterator[Any]] | None = None
        self._first: list[Any] = []
        self._complete = False  # as many as a verification takes, or all that there are

    @property
    def source(self) -> str:
        return self.data.spec

    def amount(self, *, at_most: bool = False) -> str:  # noqa: ARG002
        most = "" if self.options.images is None else f"up to {self.options.images:,} "
        return f"{most}samples"

    @property
    def size(self) -> str:
        return f" of {self.data.spec}"

    def refuse_processes(self, count: int) -> None:
        if count > 1:
            raise RetrofitError(
                f"{count} processes cannot share the batches of {self.data.spec}: let it give a "
                "torch Dataset, of which each takes its share"
            )

    def refuse_once_only(self, option: str) -> None:
        if self.data.once_only:
            raise RetrofitError(
                f"{option} needs the batches once more, and {self.data.spec} is a "
                f"{type(self.data.data).__name__}, which can be gone through once: let a function "
                "return a new one, or give a list, a DataLoader or a Dataset"
            )

    def example(self) -> Any:
        """Read the first batch, with which the next pass begins."""
        batches = self._read()
        first = next(batches)
        self._begun = [first], batches
        return _copied(first)

    def batches(self, rank: int = 0, processes: int = 1) -> Batches:  # noqa: ARG002
        return _LoaderBatches(self, self.options.images)

    def tests(self, used: int) -> tuple[Batches, str]:  # noqa: ARG002
        """Take the first batches, which were kept while the network was calibrated on them."""
        # With a --state that was complete there was no need to read them.
        kept = _Kept(self.model, self._first)
        tests = kept if self._complete else _LoaderBatches(self, TEST_IMAGES)
        return tests, "samples, the first of them"

    def for_drift(self, used: int) -> Batches:
        return _LoaderBatches(self, max(1, min(used // 4, DRIFT_IMAGES)))

    def go_through(self, most: int | None) -> Iterator[Any]:
        """Yield whole batches until there are `most` samples; the first ones are kept."""
        (head, rest), self._begun = self._begun or ([], self._read()), None
        self._first, self._complete, count = [], False, 0
        for batch in itertools.chain(head, rest):
            images = images_in(self.model, batch, None)
            if not self._complete:
                self._first.append(_copied(batch))
            count += max(1, images)
            self._complete = self._complete or count >= TEST_IMAGES
            yield batch
            if most is not None and count >= most:
                break
        self._complete = True

    def _read(self) -> Iterator[Any]:
        batches = self.data.iterator()
        for number in itertools.count():
            with self.data.telling():
                batch = next(batches, _END)
            if batch is not _END:
                yield batch
            elif number:
                return
            else:
                raise RetrofitError(f"{self.data.spec} gives no batches: it is empty, or used up")


_END = object()


def _copied(batch: Any) -> Any:
    """Copy the tensors of a batch, whose memory a loader may use for the next one."""
    return tree_map_only(Tensor, Tensor.clone, batch)


class _Counted:
    """Stands for the data set of a loader, which a progress bar asks for its length."""

    bar_unit = "sample"

    def __init__(self, model: nn.Module, data: Any, most: int | None = None) -> None:
        self.model, self.data, self.most = model, data, most

    def __len__(self) -> int:
        count = images_in_all(self.model, self.data, None)
        if count is None:
            raise TypeError("their number is not known")
        return count if self.most is None else min(count, self.most)


class _LoaderBatches:
    def __init__(self, sample: LoaderSample, most: int | None) -> None:
        self.sample, self.most = sample, most
        self.dataset = _Counted(sample.model, sample.data.data, most)
        self.in_random_order = in_random_order(sample.data.data)
        self.names: list[str] = []
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        return self.sample.go_through(self.most)


class _Kept:
    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.kept, self.dataset = batches, _Counted(model, batches)
        self.names: list[str] = []
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kept)
