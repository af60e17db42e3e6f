"""The rules: which layers get a BatchNorm, after what, and why. One set for every source of calls
and both layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from retrofit.calls import Call, Trace
from retrofit.errors import RetrofitError
from retrofit.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FLATTENINGS,
    HIDDEN_ACTIVATIONS,
    NORMS,
    VIEWS,
    WEIGHTED_FUNCTIONS,
    channels,
    dims,
    is_conv,
    is_leaf,
    is_linear,
    is_norm,
    is_weighted,
)
from retrofit.plans import LayoutName, Placement, Site


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `plan`."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: LayoutName = "native"
    placement: Placement = "pre_activation"
    linear: bool = False


def occurrences(calls: Iterable[Call], options: Options) -> Iterator[tuple[str, Call]]:
    """Each call of a layer that could get a BatchNorm, and the path of its site.

    In the native layout the calls of one module share a site; functions, and in the graph layout
    all calls, are told apart by a number.
    """
    calls = list(calls)
    modules = {call.path for call in calls if call.module is not None}
    counted: dict[str, int] = {}
    for call in calls:
        if call.module is not None:
            if call.name == "unknown" or not _is_candidate(call.module, options):
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


def decide(model: nn.Module, traced: Trace, options: Options) -> list[Site]:
    """A site for each layer of `model` in the order of execution, those never called last.

    Raises RetrofitError for a pattern that matches none of them.
    """
    calls: dict[str, list[Call]] = {}
    for path, call in occurrences(traced.calls, options):
        calls.setdefault(path, []).append(call)
    called = {call.path for made in calls.values() for call in made if call.module is not None}
    for path, module in model.named_modules():
        if _is_candidate(module, options) and path not in called:
            calls[path] = []
    _refuse_idle_patterns(model, calls, options)
    rules = _Rules(model, traced, options)
    return [rules.site(path, made) for path, made in calls.items()]


def activation_after(call: Call) -> Call | None:
    """The activation that alone reads this call's result, and reads nothing else."""
    if len(call.users) == 1 and call.users[0].name in HIDDEN_ACTIVATIONS:
        return call.users[0]
    return None


def _is_candidate(module: nn.Module, options: Options) -> bool:
    return is_conv(module) or (options.linear and is_linear(module))


@dataclass(frozen=True)
class _Rules:
    model: nn.Module
    traced: Trace
    options: Options

    @cached_property
    def _to_output(self) -> _Ways:
        return _Ways("output")

    @cached_property
    def _to_unknown(self) -> _Ways:
        return _Ways("unknown")

    @cached_property
    def _calls_of(self) -> dict[nn.Module, list[Call]]:
        made: dict[nn.Module, list[Call]] = {}
        for call in self.traced.calls:
            if call.module is not None:
                made.setdefault(call.module, []).append(call)
        return made

    def site(self, path: str, calls: list[Call]) -> Site:
        layer = calls[0].module if calls else self.model.get_submodule(path)
        skip = self._reason_to_skip(path, layer, calls)
        hosts = [] if skip else self._hosts(calls)
        host = hosts[0].path if hosts and hosts[0].module is not None else ""
        pooled = f"called {len(calls)} times: one BatchNorm, moments pooled"
        if layer is None:
            name = calls[0].name
            kind, width = name, calls[0].channels
            axes = 0 if name == "linear" else int(name[-2])
        else:
            kind, width, axes = type(layer).__name__, channels(layer), dims(layer)
        return Site(
            path=path,
            kind=kind,
            channels=width,
            dims=axes,
            calls=len(calls),
            decision="skip" if skip else "insert",
            reason=skip or (pooled if len(calls) > 1 else "no norm follows"),
            host=host,
            layer="" if skip or layer is None else calls[0].path,
            last_axis=axes == 0 and not all(c.shape and len(c.shape) == 2 for c in calls),
        )

    def _hosts(self, calls: list[Call]) -> list[Call]:
        """The calls after which the BatchNorm comes; empty if an activation is missing."""
        if self.options.placement == "pre_activation":
            return calls
        found = [activation for call in calls if (activation := activation_after(call))]
        return found if len(found) == len(calls) else []

    def _reason_to_skip(self, path: str, layer: nn.Module | None, calls: list[Call]) -> str | None:
        options, hosts = self.options, self._hosts(calls)
        included = _matches(path, options.include)
        if excluded := next((p for p in options.exclude if fnmatchcase(path, p)), None):
            return f"excluded by {excluded!r}"
        if options.include and not included:
            return "not among those included"
        if not calls:
            return self._unreached(path)
        if layer is not None and (inner := _norm_inside(layer)):
            return f"already normalised by {path}.{inner}"
        if options.layout == "graph" and layer is None and calls[0].channels == 0:
            return "a function whose weight is computed: the number of channels is not known"
        if layer is not None and _has_complex_weight(layer):
            return "complex weights"
        activations = [after for call in calls if (after := activation_after(call))]
        if norm := next((n for call in (*calls, *activations) if (n := _norm_after(call))), None):
            return f"already normalised by {norm}"
        if not hosts:
            return "no activation follows it directly"
        if options.layout == "native" and (obstacle := self._obstacle(hosts)):
            return obstacle
        if not included and any(map(self._to_output.lead, calls)):
            return "output head"
        if not included and any(map(self._to_unknown.lead, calls)):
            return "its values go where torch.fx cannot follow: pass example_inputs"
        if not included and any(map(_is_lost, calls)):
            return "its values go where they cannot be followed"
        if not included and any(map(_is_single_pixel, calls)):
            return "its feature map is a single pixel: training would fail on a batch of one"
        return None

    def _obstacle(self, hosts: list[Call]) -> str | None:
        """Why the module tree has no place after these calls of one module."""
        module, path = hosts[0].module, hosts[0].path
        if module is None:
            what = "a" if self.options.placement == "pre_activation" else "its activation is a"
            return f"{what} function: only layout='graph' has a place after it"
        if any(call.module is not module for call in hosts) or any(
            call not in hosts for call in self._calls_of[module]
        ):
            return f"its activation {path} serves other layers too: only layout='graph' has a place"
        if not all(call.alone for call in hosts):
            return "called with more than its input"
        if read := sorted(self.traced.reads.get(path, ())):
            return f"the model's own code reads its {', '.join(f'.{name}' for name in read)}"
        return None

    def _unreached(self, path: str) -> str:
        if not path and self.options.layout == "native":
            return "the model itself is this layer: wrap it in nn.Sequential"
        module = self.model.get_submodule(path)
        above = [path[:i] for i, letter in enumerate(path) if letter == "."]
        if leaf := next((p for p in above if is_leaf(self.model.get_submodule(p))), None):
            return f"inside {leaf}, which counts as one layer"
        for opaque, place in self.traced.opaque.items():
            if any(inner is module for inner in self.model.get_submodule(opaque).modules()):
                return (
                    f"inside {opaque or 'code'}, which torch.fx cannot trace ({place}): pass "
                    "example_inputs"
                )
        return "not called in eval mode"


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _refuse_idle_patterns(model: nn.Module, calls: dict[str, list[Call]], options: Options) -> None:
    for pattern in (*options.include, *options.exclude):
        matched = [path for path in calls if fnmatchcase(path, pattern)]
        if not matched:
            raise RetrofitError(
                f"the pattern {pattern!r} matches none of the {len(calls)} convolutions of "
                f"{type(model).__name__}: patterns are globs over module paths, such as "
                f"{next(iter(calls), 'features.*')!r}"
            )
        functions = [path for path in matched if calls[path] and calls[path][0].module is None]
        if pattern in options.include and options.layout == "native" and functions == matched:
            raise RetrofitError(
                f"{functions[0]} is a function: the native layout has no place after it; pass "
                "layout='graph'"
            )


def _has_complex_weight(layer: nn.Module) -> bool:
    return any(p.is_complex() for p in layer.parameters())


def _is_single_pixel(call: Call) -> bool:
    """A convolution's result of shape (N, C, 1, ...): in training one image is one sample."""
    linear = call.name == "linear" or (call.module is not None and is_linear(call.module))
    return call.shape is not None and not linear and set(call.shape[2:]) == {1}


def _norm_inside(layer: nn.Module) -> str | None:
    """The norm that a convolution of its own class brings along, as detectron2's."""
    return next((name for name, child in layer.named_children() if is_norm(child)), None)


def _is_lost(call: Call) -> bool:
    """Nothing is seen to read its values: they go to TorchScript or to numpy, say."""
    return all(user.name in VIEWS and _is_lost(user) for user in call.users)


def _norm_after(call: Call) -> str | None:
    """The norm that this call feeds, directly or through other views of its values."""
    for user in call.users:
        if user.module is not None and is_norm(user.module):
            return user.path
        if user.module is None and user.name in NORMS:
            return user.name
        if user.name in VIEWS and (norm := _norm_after(user)):
            return norm
    return None


# A call, and whether the values met a nonlinearity, were pooled, and were flattened after that.
State = tuple[Call, bool, bool, bool]
_READ, _STRAIGHT, _FLATTENED = 1, 2, 4


class _Ways:
    """The ways to an end, "output" or "unknown". What is known of a call serves all before it."""

    def __init__(self, end: str) -> None:
        self.end = end
        self.known: dict[State, int] = {}

    def lead(self, call: Call) -> bool:
        """Some path from `call` to the end meets no weighted layer, and no nonlinearity (softmax
        and its like do not count); or all paths end there without a weighted layer, and this is
        pooled and then flattened. To "output", the call is an output head."""
        found = 0
        for user in call.users:
            found |= self._from((user, False, False, False))
        return bool(found & _STRAIGHT) or found & (_FLATTENED | _READ) == _FLATTENED

    def _from(self, start: State) -> int:
        """What the paths from here on meet. A stack, since networks are deeper than recursion."""
        stack, opened = [start], set()
        while stack:
            state = stack[-1]
            found, following = self._step(state)
            ahead = [s for s in following if s not in self.known and s not in opened]
            if ahead and state not in opened:
                opened.add(state)
                stack += ahead
                continue
            for one in following:
                found |= self.known.get(one, 0)
            self.known[state] = found
            stack.pop()
        return self.known[start]

    def _step(self, state: State) -> tuple[int, list[State]]:
        """What a call itself is, and what follows it."""
        user, nonlinear, pooled, flat = state
        if user.name == self.end:
            return (_FLATTENED * flat if nonlinear else _STRAIGHT), []
        if user.name in WEIGHTED_FUNCTIONS if user.module is None else is_weighted(user.module):
            return _READ, []
        nonlinear |= user.name in ACTIVATIONS
        flat |= pooled and user.name in FLATTENINGS
        if user.name in ("mean", "amax"):
            pooled, flat = True, flat or not user.keepdim
        pooled |= "pool" in user.name
        return 0, [(after, nonlinear, pooled, flat) for after in user.users]
