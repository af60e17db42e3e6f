"""State dicts in what a weights file holds: where they are, and which of several to take."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retrofit.errors import RetrofitError

State = dict[str, Any]  # tensors, and what modules keep as their extra state
# Names, of wrappers in files and of modules around a network, that say nothing but "the network".
PLAIN = (
    *("state_dict", "model_state_dict", "model_state", "net_state_dict", "params", "weights"),
    *("model", "module", "net", "network", "_orig_mod"),
)
AVERAGES = {"ema", "swa", "averaged"}


def state_dicts(content: object) -> dict[str, State]:
    """Find the state dicts in nested mappings, by the path of their keys, dotted; "" for the whole.

    An optimizer's state, and mappings of other things than tensors, are none.
    """
    found: dict[str, State] = {}
    waiting, seen = [("", content)], set()
    while waiting:
        path, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))  # it may contain itself
        if _is_state_dict(value):
            found.setdefault(path, {str(key): tensor for key, tensor in value.items()})
        elif not {"state", "param_groups"} <= value.keys():
            texts = ((k, inner) for k, inner in value.items() if isinstance(k, str))
            waiting += [(f"{path}.{key}".lstrip("."), inner) for key, inner in texts]
    return found


def with_weights(states: Mapping[str, State]) -> dict[str, State]:
    """Leave out counts, metrics and states of random generators, unless there is nothing else."""
    found = {path: state for path, state in states.items() if any(map(_is_weight, state.values()))}
    return found or dict(states)


def under(states: Mapping[str, State], key: str, file: str) -> dict[str, State]:
    """Select what is under `key`: the path of a mapping, or a prefix of keys, dotted.

    Raises RetrofitError naming what there is instead.
    """
    found = {path: s for path, s in states.items() if path == key or path.startswith(f"{key}.")}
    for path, state in states.items():
        if not path or key.startswith(f"{path}."):
            prefix = key[len(path) :].lstrip(".") + "."
            part = {k[len(prefix) :]: tensor for k, tensor in state.items() if k.startswith(prefix)}
            if part:
                found[key] = part
    if not found:
        there = ", ".join(map(repr, with_weights(states))) if "" not in states else ""
        raise RetrofitError(
            f"{file} has no weights under {key!r}: "
            + (f"it has them under {there}" if there else "it is a state dict without wrapper")
        )
    return found


def preferred(paths: Sequence[str], file: str) -> str:
    """Choose between state dicts, with a warning: the network itself before its moving average.

    Raises RetrofitError where nothing speaks for one of them.
    """
    ranked = sorted(paths, key=_rank)
    best, *others = ranked
    if not others:
        return best
    listed = ", ".join(map(repr, paths))
    if _rank(best) > 0 and _rank(best) == _rank(others[0]):
        raise RetrofitError(
            f"{file} holds several state dicts, {listed}: choose one with --weights-key "
            "(weights_key=)"
        )
    warnings.warn(
        f"{file} holds several state dicts, {listed}: {best!r} is used; choose another with "
        "--weights-key (weights_key=)",
        stacklevel=2,
    )
    return best


def _rank(path: str) -> int:
    if AVERAGES & set(re.split(r"[^a-z]+", path.lower())):
        return 2
    return int(bool(path) and not all(part in PLAIN for part in path.split(".")))


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    tensors = [v for k, v in value.items() if not str(k).endswith("_extra_state")]
    return bool(tensors) and all(isinstance(tensor, Tensor) for tensor in tensors)


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
