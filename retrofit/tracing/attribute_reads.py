"""What a model's own code reads of its layers, such as `self.conv.weight`, while it runs.

Tensors are read by other names, too (`parameters()`, `state_dict()`): what is computed with is
read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from retrofit.running.shared_copy import held_tensors
from retrofit.tracing.operations import is_activation, is_affine, is_norm

_ONE_AT_A_TIME = threading.RLock()


class Reads:
    """Notes what a model's own code reads of its modules, and whether it changes them.

    Attributes:
        by_path: of the layers, the names of attributes that were asked for, and that an
            nn.Sequential in their place would not have by itself: path to names.
        mode: `training` of any module was read.
        changed: paths of layers that the code had given other tensors or settings when it called
            them.
        muted: set while a layer's own code runs, which may read what it likes.
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        self.modules = set(map(id, model.modules()))
        self.layers = {path: m for path, m in model.named_modules() if m in layers}
        self.paths = {id(module): path for path, module in self.layers.items()}
        self.tensors = _tensors_of(self.layers, model)
        self.states = {id(module): _state(module) for module in self.layers.values()}
        self.changed: set[str] = set()
        self.by_path: dict[str, set[str]] = {}
        self.mode = False
        self.muted = False

    def frozen(self) -> dict[str, frozenset[str]]:
        """Return what was read: code that looks for what is not there reads nothing."""
        found = {
            path: frozenset(name for name in names if hasattr(self.layers[path], name))
            for path, names in self.by_path.items()
        }
        return {path: names for path, names in found.items() if names}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is read in the block.

        nn.Module is changed for that long: another thread that wants to do the same waits.
        """
        with _ONE_AT_A_TIME:
            earlier, before = list(_NOTING), vars(nn.Module).get("__getattribute__")
            _NOTING[:] = [self]
            if before is not _spy:
                _BEFORE[:] = [before or object.__getattribute__]
                nn.Module.__getattribute__ = _spy  # type: ignore[assignment]
            try:
                yield
            finally:
                _NOTING[:] = earlier
                if before is None:
                    del nn.Module.__getattribute__
                else:
                    nn.Module.__getattribute__ = before  # type: ignore[method-assign]

    def note_use(self, value: Any) -> None:
        """Note that something is computed with `value`, which may be a tensor of a layer."""
        for path, name in self.tensors.get(id(value), ()):
            self.by_path.setdefault(path, set()).add(name)

    def note_call(self, module: nn.Module) -> None:
        """Note whether a layer that the code calls is still as it was at the beginning."""
        if id(module) not in self.states:
            return
        muted, self.muted = self.muted, True
        if _state(module) != self.states[id(module)]:
            self.changed.add(self.paths[id(module)])
        self.muted = muted

    def note(self, module: nn.Module, name: str) -> None:
        """Note that `name` was asked for of a module."""
        if name == "training":
            self.mode |= id(module) in self.modules
        elif name not in _KEPT and id(module) in self.paths:
            self.by_path.setdefault(self.paths[id(module)], set()).add(name)


def _state(module: nn.Module) -> dict[str, Any]:
    """Say which tensors and settings a layer has, to be compared with those of another time."""
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    ordinary = (Tensor, nn.Parameter)  # no proxy in the place of one
    tensors = {
        name: (id(value), value.data_ptr() if type(value) in ordinary else None)
        for name, value in held.items()
    }
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
    return plain | tensors


def _tensors_of(
    layers: Mapping[str, nn.Module], model: nn.Module
) -> dict[int, list[tuple[str, str]]]:
    """Map the tensors that layers alone hold to path of the layer and name of the attribute."""
    inside = {module for layer in layers.values() for module in layer.modules()}
    others = [module for module in model.modules() if module not in inside]
    elsewhere = {id(tensor) for module in others for tensor in held_tensors(module)}
    found: dict[int, list[tuple[str, str]]] = {}
    for path, layer in layers.items():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if id(tensor) not in elsewhere:
                found.setdefault(id(tensor), []).append((path, name.partition(".")[0]))
    return found


_KEPT = frozenset(dir(nn.Sequential()))
_NOTING: list[Reads] = []  # one, while something notes
_BEFORE: list[Callable[..., Any]] = []


def _spy(module: nn.Module, name: str) -> Any:
    """Stand in for nn.Module.__getattribute__.

    One function for good: Python 3.11 crashes where another thread is in it as it is freed.
    """
    for reads in _NOTING:
        if not reads.muted:
            reads.note(module, name)
    return _BEFORE[0](module, name)


def united(
    one: Mapping[str, frozenset[str]], other: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    """Take together what was read at two times."""
    none: frozenset[str] = frozenset()
    return {path: one.get(path, none) | other.get(path, none) for path in one.keys() | other.keys()}


def watched_layers(model: nn.Module) -> set[nn.Module]:
    """List the layers that something may be put after, or that may be put elsewhere."""
    kinds = (is_affine, is_activation, is_norm)
    return {module for module in model.modules() if any(kind(module) for kind in kinds)}
