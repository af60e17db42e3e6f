"""The rules: which layers get a BatchNorm, after what, and why; what counts as an output head.

One set of rules for every way of reading a model, and for both layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.plans import Options, Site
from retrofit.tracing.calls import Call, Trace, is_candidate, occurrences
from retrofit.tracing.operations import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FLATTENINGS,
    HIDDEN_ACTIVATIONS,
    NORMS,
    VIEWS,
    WEIGHTED_FUNCTIONS,
    channels,
    dims,
    is_leaf,
    is_linear,
    is_norm,
    is_weighted,
)

DIMS: dict[str, Literal[1, 2, 3]] = {"1": 1, "2": 2, "3": 3}  # of functions, by their names


def decide(model: nn.Module, trace: Trace, options: Options) -> list[Site]:
    """Make a site for each layer of `model` in the order of execution, those never called last.

    Raises RetrofitError for a pattern that matches none of them.
    """
    calls: dict[str, list[Call]] = {}
    for path, call in occurrences(trace.calls, options):
        calls.setdefault(path, []).append(call)
    called = {call.path for made in calls.values() for call in made if call.module is not None}
    for path, module in model.named_modules():
        if is_candidate(module, options) and path not in called:
            calls[path] = []
    _refuse_idle_patterns(model, calls, options)
    rules = _Rules(model, trace, options)
    return [rules.site(path, made) for path, made in calls.items()]


def activation_after(call: Call) -> Call | None:
    """Find the activation that alone reads this call's result, and reads nothing else."""
    if len(call.users) == 1 and call.users[0].name in HIDDEN_ACTIVATIONS:
        return call.users[0]
    return None


@dataclass(frozen=True)
class _Rules:
    model: nn.Module
    trace: Trace
    options: Options

    @cached_property
    def _to_output(self) -> _PathsTo:
        return _PathsTo("output")

    @cached_property
    def _to_unknown(self) -> _PathsTo:
        return _PathsTo("unknown")

    @cached_property
    def _calls_of(self) -> dict[nn.Module, list[Call]]:
        made: dict[nn.Module, list[Call]] = {}
        for call in self.trace.calls:
            if call.module is not None:
                made.setdefault(call.module, []).append(call)
        return made

    def site(self, path: str, calls: list[Call]) -> Site:
        """Decide for the layer or function that makes `calls`."""
        layer = calls[0].module if calls else self.model.get_submodule(path)
        skip = self._reason_to_skip(path, layer, calls)
        hosts = [] if skip else self._hosts(calls)
        host = hosts[0].path if hosts and hosts[0].module is not None else ""
        pooled = f"called {len(calls)} times: one BatchNorm, moments pooled"
        if layer is None:
            name = calls[0].name
            kind, width = name, calls[0].channels
            axes = DIMS[name[-2]] if name in CONVOLUTIONS else 0
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
        """List the calls after which the BatchNorm comes; none if an activation is missing."""
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
            return "its values go where torch.fx cannot follow: pass example"
        if not included and any(map(_is_lost, calls)):
            return "its values go where they cannot be followed"
        if not included and any(map(_is_single_pixel, calls)):
            return "its feature map is a single pixel: training would fail on a batch of one"
        return None

    def _obstacle(self, hosts: list[Call]) -> str | None:
        """Say why the module tree has no place after these calls of one module."""
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
        if read := sorted(self.trace.reads.get(path, ())):
            return f"the model's own code reads its {', '.join(f'.{name}' for name in read)}"
        return None

    def _unreached(self, path: str) -> str:
        """Say why no call of this layer was seen."""
        if not path and self.options.layout == "native":
            return "the model itself is this layer: wrap it in nn.Sequential"
        module = self.model.get_submodule(path)
        above = [path[:i] for i, letter in enumerate(path) if letter == "."]
        if leaf := next((p for p in above if is_leaf(self.model.get_submodule(p))), None):
            return f"inside {leaf}, which counts as one layer"
        for opaque, place in self.trace.opaque.items():
            if any(inner is module for inner in self.model.get_submodule(opaque).modules()):
                return (
                    f"inside {opaque or 'code'}, which torch.fx cannot trace ({place}): pass "
                    "example_inputs"
                )
        return "not called in eval mode"


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _refuse_idle_patterns(model: nn.Module, calls: dict[str, list[Call]], options: Options) -> None:
    """Raise RetrofitError for a pattern that matches no layer, or none that could be included."""
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
    """Tell whether the result is (N, C, 1, ...): in training one image is then one sample."""
    linear = call.name == "linear" or (call.module is not None and is_linear(call.module))
    return call.shape is not None and not linear and set(call.shape[2:]) == {1}


def _norm_inside(layer: nn.Module) -> str | None:
    """Find the norm that a convolution of its own class brings along, as detectron2's."""
    return next((name for name, child in layer.named_children() if is_norm(child)), None)


def _is_lost(call: Call) -> bool:
    """Tell whether nothing is seen to read its values: they go to TorchScript or numpy, say."""
    return all(user.name in VIEWS and _is_lost(user) for user in call.users)


def _norm_after(call: Call) -> str | None:
    """Find the norm that this call feeds, directly or through other views of its values."""
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


class _PathsTo:
    """Memoised search of the paths from a call to a sink, "output" or "unknown"."""

    def __init__(self, sink: str) -> None:
        self.sink = sink
        self.known: dict[State, int] = {}

    def lead(self, call: Call) -> bool:
        """Tell whether the result of `call` is, in effect, what comes out at the sink.

        Some path to it meets no weighted layer and no nonlinearity (softmax and its like do not
        count); or all paths end there without a weighted layer, pooled and then flattened. A call
        that leads to "output" is an output head.
        """
        found = 0
        for user in call.users:
            found |= self._from((user, False, False, False))
        return bool(found & _STRAIGHT) or found & (_FLATTENED | _READ) == _FLATTENED

    def _from(self, start: State) -> int:
        """Find what the paths from here on meet. A stack: networks are deeper than recursion."""
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
        """Say what a call itself is, and list what follows it."""
        user, nonlinear, pooled, flat = state
        if user.name == self.sink:
            return (_FLATTENED * flat if nonlinear else _STRAIGHT), []
        if user.name in WEIGHTED_FUNCTIONS if user.module is None else is_weighted(user.module):
            return _READ, []
        nonlinear |= user.name in ACTIVATIONS
        flat |= pooled and user.name in FLATTENINGS
        if user.name in ("mean", "amax"):
            pooled, flat = True, flat or not user.keepdim
        pooled |= "pool" in user.name
        return 0, [(after, nonlinear, pooled, flat) for after in user.users]
