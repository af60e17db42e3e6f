"""Tensors from a weights file of any kind, or from several.

Nothing that is read here is ever unpickled into code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.files.onnx_files import is_onnx
from retrofit.files.other_formats import HEAD, other_format
from retrofit.files.pickled import ARCHIVE, is_pickle, read_pickled
from retrofit.files.provenance import Provenance
from retrofit.files.shards import INDEX, located, shards
from retrofit.files.state_dicts import (
    State,
    described,
    preferred,
    state_dicts,
    under,
    with_weights,
)
from retrofit.files.suffixes import KINDS, READ

PARALLEL = ("module.", "_orig_mod.")  # prefixes that no network gives its own keys


@dataclass(frozen=True)
class WeightsFile:
    """What is in a weights file.

    Attributes:
        path: as it was given; for messages.
        states: its state dicts, by the dotted path of the keys that lead to them.
        provenance: what `save` put there.
        option: what the user chooses one of several state dicts with; for messages.
    """

    path: Path
    states: dict[str, State]
    provenance: Provenance
    option: str = "--weights-key (weights_key=)"

    def under(self, key: str | None) -> dict[str, State]:
        """Select the state dicts under a key; all of them for None."""
        return self.states if key is None else under(self.states, key, str(self.path))

    def preferred(self, places: Sequence[str]) -> str:
        """Choose between places in the file, as `state_dicts.preferred` does."""
        return preferred(places, str(self.path), self.option)

    def tensors(self, key: str | None = None) -> dict[str, Tensor]:
        """Select the tensors under a key, without a model to fit them to.

        Raises RetrofitError where nothing is there, or nothing speaks for one of several.
        """
        states = with_weights(self.under(key))
        state = states[self.preferred(list(states))]
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        while self.provenance == Provenance() and (prefix := _parallel(tensors)):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return tensors


def open_weights(path: Path) -> WeightsFile:
    """Read a weights file: safetensors or pickled, whatever its suffix; an index; or a folder.

    Raises RetrofitError for anything that is no file of tensors.
    """
    file = located(path)
    if file.name.endswith(INDEX):
        return WeightsFile(path, {"": _read_shards(file)}, Provenance())
    return WeightsFile(path, *_read_file(file))


def read_weights(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """Read the tensors of a weights file, and its provenance, without a model to fit them to.

    Raises RetrofitError as `open_weights`, or where nothing speaks for one of several state dicts.
    """
    file = open_weights(path)
    return file.tensors(), file.provenance


def read_provenance(path: Path) -> Provenance:
    """Read where the weights of a file come from, and no tensors; only safetensors say it.

    Raises RetrofitError as `open_weights`, for damage in what is read.
    """
    path = located(path)
    if path.name.endswith(INDEX) or not _is_safetensors(path):
        return Provenance()
    try:
        with path.open("rb") as file:
            length = file.read(8)
            least = min(_header_end(length), path.stat().st_size)  # it may say anything
            metadata = _metadata(length + file.read(least - 8))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return _told(path, metadata)[1]


def _parallel(tensors: dict[str, Tensor]) -> str | None:
    common = (prefix for prefix in PARALLEL if all(name.startswith(prefix) for name in tensors))
    return next(common, None) if tensors else None


def _read_shards(index: Path) -> State:
    """Read the files of an index as one state dict."""
    state: State = {}
    home = {name: file for file, names in shards(index).items() for name in names}
    for file in dict.fromkeys(home.values()):
        states = _read_file(file)[0]
        if list(states) != [""]:
            raise RetrofitError(f"{file} holds no state dict, only some under {', '.join(states)}")
        # What the index does not list is taken too: it is for the model to say what it lacks.
        state |= {name: t for name, t in states[""].items() if home.get(name, file) == file}
    if missing := [name for name in home if name not in state]:
        raise RetrofitError(
            f"{home[missing[0]]} has no {missing[0]}, which {index.name} says is in it "
            f"({len(missing)} of {len(home)} tensors are not where it says)"
        )
    return state


def _read_file(path: Path) -> tuple[dict[str, State], Provenance]:
    if _is_safetensors(path):
        tensors, provenance = _read_safetensors(path)
        return {"": dict(tensors)}, provenance
    content = read_pickled(path)
    states = state_dicts(content)
    if not states:
        raise RetrofitError(
            f"{path} holds no state dict but {described(content)}: expected tensors by name, or "
            "those under a key such as state_dict or model"
        )
    return states, Provenance()


def _is_safetensors(path: Path) -> bool:
    """Tell by the content, or by the suffix if that says nothing; RetrofitError for no weights."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise RetrofitError(f"{path} cannot be read: {error.strerror}") from error
    # A header, after its length of 8 bytes; which may begin like a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return True
    if head.startswith((ARCHIVE, b"\x80")) or is_pickle(path):
        return False
    if other := other_format(head):
        raise RetrofitError(f"{path} is no weights file but {other}")
    if path.suffix == ".safetensors":
        return True
    if is_onnx(path):
        raise RetrofitError(
            f"{path} is an ONNX file, and no file of weights: it can be the MODEL of plan and "
            "convert, or --model of the other commands"
        )
    if path.suffix not in READ:
        raise RetrofitError(
            f"{path} is no weights file, by its content: it must be a {KINDS} file, or a folder "
            "or index of these"
        )
    return False


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    try:
        # Not mapped into memory: a file cut short while it is in use would end the process then.
        content = path.read_bytes()
        tensors, metadata = load(content), _metadata(content)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error
    # safetensors' save_model leaves out a tensor that has two names, and says so here.
    tensors.update(
        {k: tensors[v] for k, v in metadata.items() if v in tensors and k not in tensors}
    )
    told, provenance = _told(path, metadata)
    aliases = told.get("aliases", {})
    if not isinstance(aliases, dict):
        raise _unreadable(path, f"aliases must be an object, not {aliases!r}")
    for alias, key in aliases.items():
        if not isinstance(key, str) or key not in tensors:
            raise _unreadable(path, f"aliases gives {alias} the tensor {key!r}, which is not there")
        tensors[alias] = tensors[key]
    return tensors, provenance


def _metadata(content: bytes) -> dict[str, str]:
    """Read the metadata of safetensors, of which the beginning is enough."""
    found: dict[str, str] = json.loads(content[8 : _header_end(content)]).get("__metadata__") or {}
    return found


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _told(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], Provenance]:
    """Read what `save` wrote beside the tensors: as it is, and what it says of their origin."""
    try:
        told = json.loads(metadata.get("retrofit", "{}"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    try:
        return told, Provenance.from_json(told)
    except RetrofitError as error:
        raise RetrofitError(f"{path}: {error}") from error


def _damaged(path: Path, error: Exception) -> RetrofitError:
    return RetrofitError(
        f"{path} cannot be read as safetensors; it is damaged or cut short ({error})"
    )


def _unreadable(path: Path, why: object) -> RetrofitError:
    return RetrofitError(f"{path} is damaged: its metadata cannot be read: {why}")
