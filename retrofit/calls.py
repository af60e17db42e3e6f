"""What a forward pass does: the calls it makes, in order, and which feeds which.

Read with torch.fx (`trace`), or off a real run (`watch`); the rules in `sites` see no difference.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from retrofit.layers import is_activation, is_affine, is_norm

_ONE_AT_A_TIME = threading.RLock()


@dataclass(eq=False)
class Call:
    """One operation of the forward pass.

    Attributes:
        name: the operation as `retrofit.layers` names it; "input", "output" and "attribute" too,
            and "unknown" for a module that could not be followed and for the end of one that was
            followed on its own.
        path: module path of the called module; of the calling module for a function.
        module: the called module, None for a function.
        inside: paths of the modules whose forward makes this call, outermost first.
        alone: it is called with its one input and nothing more, as an nn.Sequential can be.
        keepdim: the function's keepdim argument.
        channels: of a function's weight, as a convolution has it; 0 where unknown.
        shape: of its result, if that is one tensor and known.
        arguments: of a traced function, or of the output, as they are written, but for tensors.
        users: the calls this one feeds, in order.
    """

    name: str
    path: str
    module: nn.Module | None = None
    inside: tuple[str, ...] = ()
    alone: bool = True
    keepdim: bool = False
    channels: int = 0
    shape: tuple[int, ...] | None = None
    arguments: str = ""
    users: list[Call] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Trace:
    """What the forward pass does.

    Attributes:
        calls: all calls, in order.
        static: the calls are the same for every input, and these are all.
        opaque: modules that could not be followed: path to the reason.
        reads: what the model's own code reads of its layers that a Sequential in their place
            would lack: path to attribute names.
        outputs: of a run, the tensors in what the model returned, by their place.
    """

    calls: list[Call]
    static: bool
    opaque: dict[str, str]
    reads: dict[str, set[str]]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def is_inside_opaque(self, path: str) -> bool:
        """The module at `path` is, or is part of, one that could not be followed."""
        return any(not o or f"{path}.".startswith(f"{o}.") for o in self.opaque)


class Reads:
    """Notes what is read of a model's layers that an nn.Sequential in their place would lack.

    Attributes:
        by_path: path of the layer to the names of attributes.
        muted: set while a layer's own code runs.
    """

    def __init__(self, model: nn.Module, candidates: Collection[nn.Module]) -> None:
        self.paths = {id(m): path for path, m in model.named_modules() if m in candidates}
        self.by_path: dict[str, set[str]] = {}
        self.muted = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """While this lasts. It changes nn.Module, so that other threads have to wait."""
        kept = set(dir(nn.Sequential()))

        def spy(module: nn.Module, name: str) -> Any:
            if name not in kept and not self.muted and id(module) in self.paths:
                self.by_path.setdefault(self.paths[id(module)], set()).add(name)
            return object.__getattribute__(module, name)

        with _ONE_AT_A_TIME:
            nn.Module.__getattribute__ = spy  # type: ignore[assignment]
            try:
                yield
            finally:
                del nn.Module.__getattribute__


def hosts(model: nn.Module) -> set[nn.Module]:
    """The modules that something may be put after, or that may be put elsewhere."""
    kinds = (is_affine, is_activation, is_norm)
    return {module for module in model.modules() if any(kind(module) for kind in kinds)}


def is_alone(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A call with these arguments has one input and nothing more."""
    return len(args) + len(kwargs) == 1 and kwargs.keys() <= {"input"}
