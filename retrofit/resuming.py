"""A calibration that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from retrofit.batches import first_tensor
from retrofit.errors import RetrofitError
from retrofit.observer import MomentObserver
from retrofit.plans import Plan

FORMAT = 1
SHARE = 0.05  # of the time, at most, that writing may take


@runtime_checkable
class Stateful(Protocol):
    """Data that knows its place, as torchdata's StatefulDataLoader does."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Replayed:
    """Any other iterable: to go on, it passes over the batches that were used."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.used, self.first = 0, ""
        if hasattr(data, "dataset"):
            self.dataset = data.dataset  # for the progress bar

    def __iter__(self) -> Iterator[Any]:
        used, expected = self.used, self.first
        for number, batch in enumerate(self.data):
            if number == 0:
                self.first = _digest(first_tensor(batch))
                if expected and self.first != expected:
                    raise RetrofitError(
                        "the data begins with another batch than that of the state file: it needs "
                        "the same data in the same order, in batches of the same size"
                    )
            if number >= used:
                self.used = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.used, self.first = state_dict["used"], state_dict["first"]


def stateful(data: Iterable[Any]) -> Stateful:
    return data if isinstance(data, Stateful) else Replayed(data)


def description(prepared: nn.Module, plan: Plan) -> dict[str, Any]:
    """What the moments depend on, besides the data, by the name that messages use."""
    mine = {id(t) for m in prepared.modules() if isinstance(m, MomentObserver) for t in m.buffers()}
    state = prepared.state_dict(keep_vars=True)
    tensors = {k: t for k, t in state.items() if isinstance(t, Tensor) and id(t) not in mine}
    return {
        "class": type(prepared).__name__,
        "plan": [[site.path, site.norm or "", site.calls] for site in plan.inserted],
        "weights": {name: _digest(tensor) for name, tensor in tensors.items()},
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What two descriptions differ in, shortly; "" if in nothing."""
    for name in one:
        if one[name] == other.get(name):
            continue
        if name == "weights":
            theirs = other.get(name, {})
            found = [k for k, v in one[name].items() if theirs.get(k) != v] or [*theirs]
            return f"the weights differ, at {found[0]} for one"
        if name == "plan":
            ours, theirs = ({site[0] for site in side.get(name, ())} for side in (one, other))
            found = sorted(ours ^ theirs) or ["the place of the BatchNorms"]
            return f"the plans differ, at {found[0]} for one"
        return f"the {name} is {one[name]} and {other.get(name)}"
    return ""


class StateFile:
    """What several processes have learned so far, in one file that is never partial."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.written, self.cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return (time.monotonic() - self.written) * SHARE >= self.cost

    def write(self, described: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
        began = time.monotonic()
        content = {"format": FORMAT, "described": dict(described), "ranks": ranks}
        # Always the same name, so that a killed run leaves no more than one behind.
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise RetrofitError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.written = time.monotonic()
        self.cost = self.written - began

    def read(self, described: Mapping[str, Any], processes: int) -> list[dict[str, Any]] | None:
        """What each process had learned; None if there is no such file."""
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            known, ranks = content["described"], content["ranks"]
            readable = content["format"] == FORMAT
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as e:
            raise RetrofitError(
                f"{self.path} is no state file of a calibration: give another name, or remove it"
            ) from e
        if not readable:
            raise RetrofitError(f"{self.path} was written by another version: remove it")
        if problem := difference(known, described):
            raise RetrofitError(
                f"{self.path} is the state of another calibration: {problem} (there and here); "
                "remove it to begin anew"
            )
        if len(ranks) != processes:
            raise RetrofitError(
                f"{self.path} is the state of {len(ranks)} processes, and these are {processes}: "
                "start as many as there were, or remove it to begin anew"
            )
        found: list[dict[str, Any]] = ranks
        return found


def _digest(tensor: Tensor | None) -> str:
    if tensor is None or tensor.is_meta:
        return "-"
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(raw.data)
    return digest.hexdigest()[:32]
