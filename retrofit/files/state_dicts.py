"""State dicts in what a weights file holds: where they are, and which of several to take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retrofit.errors import RetrofitError, warn

State = dict[str, Any]  # tensors, and what modules keep as their extra state
# Names, of wrappers in files and of modules around a network, that say nothing but "the network".
PLAIN = (
    *("state_dict", "model_state_dict", "model_state", "net_state_dict", "params", "weights"),
    *("model", "module", "net", "network", "_orig_mod"),
)
AVERAGES = {"ema", "swa", "averaged"}


def state_dicts(content: object) -> dict[str, State]:
    """Find the state dicts in nested mappings, by the path of their keys, dotted; "" for the whole.

    An optimizer's state is none. Tensors among other things are one if nothing else is.
    """
    found: dict[str, State] = {}
    mixed: dict[str, State] = {}
    waiting, seen = [("", content)], set()
    while waiting:
        path, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen or _is_optimizers(path, value):
            continue
        seen.add(id(value))  # it may contain itself
        state = {str(key): item for key, item in value.items() if _is_entry(str(key), item)}
        if any(isinstance(item, Tensor) for item in state.values()):
            (found if len(state) == len(value) else mixed).setdefault(path, state)
        texts = ((key, inner) for key, inner in value.items() if isinstance(key, str))
        waiting += [(f"{path}.{key}".lstrip("."), inner) for key, inner in texts]
    return found or mixed


def described(content: object) -> str:
    """Say in a few words what a file holds instead of a state dict."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    kinds = {key: type(item) for key, item in list(content.items())[:3]}
    names = {
        k: "numpy" if v.__module__.startswith("numpy") else v.__name__ for k, v in kinds.items()
    }
    items = ", ".join(f"{key}: {name}" for key, name in names.items())
    return f"{{{items}{', ...' if len(content) > 3 else ''}}}"


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


def preferred(paths: Sequence[str], file: str, option: str) -> str:
    """Choose between state dicts, with a warning: the network itself before its moving average.

    The warning, and the error, name the `option` that chooses another.

    Raises RetrofitError where nothing speaks for one of them.
    """
    ranked = sorted(paths, key=_rank)
    best, *others = ranked
    if not others:
        return best
    listed = ", ".join(map(repr, paths[:5])) + ", ..." * (len(paths) > 5)
    if _rank(best) > 0 and _rank(best) == _rank(others[0]):
        raise RetrofitError(f"{file} holds several state dicts, {listed}: choose one with {option}")
    warn(
        f"{file} holds several state dicts, {listed}: {best!r} is used; choose another with "
        f"{option}"
    )
    return best


def _rank(path: str) -> int:
    if AVERAGES & set(re.split(r"[^a-z]+", path.lower())):
        return 2
    return int(bool(path) and not all(part in PLAIN for part in path.split(".")))


def _is_entry(key: str, value: object) -> bool:
    return isinstance(value, Tensor) or key.endswith("_extra_state")


def _is_optimizers(path: str, value: Mapping[Any, Any]) -> bool:
    return "optim" in path.rpartition(".")[2].lower() or {"state", "param_groups"} <= value.keys()


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
