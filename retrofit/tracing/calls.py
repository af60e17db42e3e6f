"""What a forward pass does: the calls it makes, in order, and which feeds which.

Read with torch.fx (`symbolic`) or off a real run (`example_run`); the rules see no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from retrofit.plans import Options
from retrofit.tracing.operations import (
    CONVOLUTIONS,
    HIDDEN_ACTIVATIONS,
    is_conv,
    is_linear,
)

Way = Literal["symbolic", "run"]


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of the forward pass.

    Attributes:
        name: the operation as `operations` names it; "input", "output" and "attribute" too, and
            "unknown" for a module that could not be followed, and for both ends of one that was
            followed on its own.
        path: module path of the called module; of the calling module for a function.
        module: the called module, None for a function.
        inside: paths of the modules whose forward makes this call, outermost first.
        alone: it is called with its one input and nothing more, as an nn.Sequential can be.
        keepdim: the function's keepdim argument.
        channels: of a function's weight, as a convolution has it; 0 where unknown.
        shape: of its result, if that is one tensor and known.
        weighted: a function that multiplies by parameters or buffers, as a layer does (x @ self.w).
        arguments: of a traced function, or of the output, as they are written, but for tensors.
        users: the calls that its values reach, in order; one that reads the shape alone is none.
    """

    name: str
    path: str
    module: nn.Module | None = None
    inside: tuple[str, ...] = ()
    alone: bool = True
    keepdim: bool = False
    channels: int = 0
    shape: tuple[int, ...] | None = None
    weighted: bool = False
    arguments: str = ""
    users: tuple[Call, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Trace:
    """All calls of a forward pass. Nothing in it changes once it is made.

    Attributes:
        calls: in order, so that each comes before its users.
        way: how they were read, with torch.fx ("symbolic") or off a run on an example ("run").
        opaque: modules that could not be followed: path to the reason.
        reads: what the model's own code reads of its layers that an nn.Sequential in their place
            would lack: path to attribute names.
        asks_mode: the model's own code reads `training`, so that it may do something else in train
            mode.
        changed: paths of layers that the model's own code changes before it calls them.
        outputs: of a run, the tensors in what the model returned, by their place.
    """

    calls: tuple[Call, ...]
    way: Way
    opaque: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, frozenset[str]] = field(default_factory=dict)
    asks_mode: bool = False
    changed: frozenset[str] = frozenset()
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("opaque", "reads", "outputs"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def static(self) -> bool:
        """The calls are the same for every input, and these are all."""
        return self.way == "symbolic" and not self.opaque

    @property
    def modules_called(self) -> list[str]:
        """Paths of the called modules, in order."""
        return [call.path for call in self.calls if call.module is not None]

    def without(self, paths: Collection[str]) -> Trace:
        """Leave out the calls of (or in) the modules at `paths`: what feeds them feeds their users.

        The others are new objects.
        """
        new: dict[Call, Call] = {}
        reached: dict[Call, tuple[Call, ...]] = {}
        for call in reversed(self.calls):
            users = tuple(dict.fromkeys(u for user in call.users for u in reached[user]))
            if call.path in paths:
                reached[call] = users
            else:
                new[call] = replace(call, users=users)
                reached[call] = (new[call],)
        return replace(self, calls=tuple(reversed(new.values())))

    def is_inside_opaque(self, path: str) -> bool:
        """Tell whether the module at `path` is, or is part of, one that could not be followed."""
        return any(not o or f"{path}.".startswith(f"{o}.") for o in self.opaque)


def rebuilt(calls: Sequence[Call], change: Callable[[Call], Call]) -> tuple[Call, ...]:
    """Copy `calls`, each changed by `change`, such that the copies feed each other as these do."""
    new: dict[Call, Call] = {}
    for call in reversed(calls):
        new[call] = replace(change(call), users=tuple(new[user] for user in call.users))
    return tuple(reversed(new.values()))


def is_alone(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call with these arguments has one input and nothing more."""
    return len(args) + len(kwargs) == 1 and kwargs.keys() <= {"input"}


def is_candidate(module: nn.Module, options: Options) -> bool:
    """Tell whether a module could get a BatchNorm: a convolution, or where asked for a Linear."""
    return is_conv(module) or (options.linear and is_linear(module))


def activation_after(call: Call) -> Call | None:
    """Find the activation that alone reads this call's result, and reads nothing else."""
    if len(call.users) == 1 and call.users[0].name in HIDDEN_ACTIVATIONS:
        return call.users[0]
    return None


def occurrences(
    model: nn.Module, calls: Iterable[Call], options: Options
) -> Iterator[tuple[str, Call]]:
    """Yield each call of a layer that could get a BatchNorm, with the path of its site.

    In the native layout the calls of one module share a site; functions, and in the graph layout
    all calls, are told apart by a number.
    """
    calls = list(calls)
    modules = {call.path for call in calls if call.module is not None}
    modules |= {path for path, module in model.named_modules() if is_candidate(module, options)}
    counted: dict[str, int] = {}
    for call in calls:
        if call.module is not None:
            if call.name == "unknown" or not is_candidate(call.module, options):
                continue
            path = call.path
        elif call.name in CONVOLUTIONS or (options.linear and call.name == "linear"):
            path = f"{call.path}.{call.name}".lstrip(".")
            if path in modules:  # self.conv2d, beside F.conv2d
                path += "@function"
        else:
            continue
        counted[path] = counted.get(path, -1) + 1
        told_apart = call.module is None or options.layout == "graph"
        yield f"{path}@{counted[path]}" if told_apart and counted[path] else path, call
