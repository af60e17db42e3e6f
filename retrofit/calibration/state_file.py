"""The state file, from which a killed calibration goes on; and data that knows its place."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from retrofit.atomic_write import write_whole
from retrofit.calibration.processes import difference, digest
from retrofit.errors import RetrofitError
from retrofit.running.nested import first_tensor

FORMAT = 2
SHARE = 0.05  # of the time, at most, that writing may take


@runtime_checkable
class Stateful(Protocol):
    """Data that knows its place, as torchdata's StatefulDataLoader does."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Replayed:
    """Makes any iterable `Stateful`: to go on, it passes over the batches that were used."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.used, self.first = 0, ""
        self.begun: Iterator[Any] | None = None
        if hasattr(data, "dataset"):
            self.dataset = data.dataset  # for the progress bar

    def __iter__(self) -> Iterator[Any]:
        used = self.used
        batches, self.begun = self.begun or iter(self.data), None
        for number, batch in enumerate(batches):
            if number == 0:
                self.first = digest(first_tensor(batch))
            if number >= used:
                self.used = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        batches = iter(self.data)
        head = list(islice(batches, 1))
        if not state_dict.keys() >= {"used", "first"}:
            raise RetrofitError(
                "the state file is of data with a place of its own (load_state_dict), and this is "
                f"a {type(self.data).__name__}"
            )
        if state_dict["used"] and [state_dict["first"]] != [digest(first_tensor(b)) for b in head]:
            raise RetrofitError(
                "the data begins with another batch than that of the state file: it needs the same "
                "data in the same order, in batches of the same size"
            )
        self.used, self.first = state_dict["used"], state_dict["first"]
        self.begun = chain(head, batches)


def stateful(data: Iterable[Any]) -> Stateful:
    """Return data that knows its place: `data` itself, if it does."""
    return data if isinstance(data, Stateful) else Replayed(data)


class StateFile:
    """What several processes have learned so far, in one file that is never partial."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.written, self.cost = time.monotonic(), 0.0
        self.checked = False  # that what is written can be read again

    @property
    def due(self) -> bool:
        """Whether writing now keeps to its share of the time."""
        return (time.monotonic() - self.written) * SHARE >= self.cost

    def write(self, described: Mapping[str, Any], processes: list[dict[str, Any]]) -> None:
        """Write what each process has learned, and what the calibration must agree in."""
        began = time.monotonic()
        content = {"format": FORMAT, "described": dict(described), "processes": processes}
        if not self.checked:
            _refuse_unreadable([process["data"] for process in processes])
            self.checked = True
        try:
            write_whole(self.path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            raise RetrofitError(f"the state file {self.path} cannot be written: {error}") from error
        self.written = time.monotonic()
        self.cost = self.written - began

    def read(self, described: Mapping[str, Any], processes: int) -> list[dict[str, Any]] | None:
        """Read what each process had learned; None if there is no such file."""
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            version = content["format"]
            found = list(content["processes"]) if version == FORMAT else []
            problem = difference(dict(content["described"]), described)
        except Exception as error:  # what another file makes torch or the lines above raise
            raise RetrofitError(
                f"{self.path} is no state file of a calibration: give another name, or remove it"
            ) from error
        if version != FORMAT:
            raise RetrofitError(f"{self.path} was written by another version: remove it")
        if problem:
            raise RetrofitError(
                f"{self.path} is the state of another calibration: this one has {problem}; remove "
                "it, or give another name"
            )
        if len(found) != processes:
            raise RetrofitError(
                f"{self.path} is the state of {len(found)} processes, and these are {processes}: "
                "start as many as there were, or remove it to begin anew"
            )
        return found


def _refuse_unreadable(places: list[Any]) -> None:
    """Raise RetrofitError before the first write, for what could not be read again."""
    file = io.BytesIO()
    try:
        torch.save(places, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        raise RetrofitError(
            "the data's state_dict() holds more than numbers, strings and tensors, which a state "
            "file cannot keep: give data without one, or a simpler one"
        ) from error
