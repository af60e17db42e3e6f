"""The rules: which layers get a BatchNorm, after what, and why; what counts as an output head.

One set of rules for every way of reading a model, and for both layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.planning.scripted import scripted_sites
from retrofit.planning.seats import seat_after
from retrofit.plans import ASKED, UNCALLED, Options, Site
from retrofit.tracing.calls import Call, Trace, activation_after, is_candidate, occurrences
from retrofit.tracing.operations import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FLATTENINGS,
    NORMS,
    OUTPUT_ACTIVATIONS,
    VIEWS,
    WEIGHTED_FUNCTIONS,
    channels,
    dims,
    is_frozen,
    is_leaf,
    is_linear,
    is_norm,
    is_weighted,
)
from retrofit.tracing.symbolic import defaults

DIMS: dict[str, Literal[1, 2, 3]] = {"1": 1, "2": 2, "3": 3}  # of functions, by their names
PLAIN = (bool, int, float, str, tuple, type(None))


def decide(
    model: nn.Module, trace: Trace, options: Options, original: nn.Module | None = None
) -> list[Site]:
    """Make a site for each layer of `model` in the order of execution, those never called last.

    `original` is what `model` is a graph of, whose modules may have several names.

    Raises RetrofitError for a pattern that matches none of them.
    """
    calls: dict[str, list[Call]] = {}
    for path, call in occurrences(model, trace.calls, options):
        calls.setdefault(path, []).append(call)
    called = {call.path for made in calls.values() for call in made if call.module is not None}
    for path, module in model.named_modules():
        if is_candidate(module, options) and path not in called:
            calls[path] = []
    rules = _Rules(model, trace, options, original or model)
    scripted = scripted_sites(model, options)
    rules.refuse_idle_patterns({**calls, **{site.path: [] for site in scripted}})
    return [rules.site(path, made) for path, made in calls.items()] + scripted


@dataclass(frozen=True)
class _Rules:
    model: nn.Module
    trace: Trace
    options: Options
    original: nn.Module

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

    @cached_property
    def _to_nowhere(self) -> _PathsTo:
        return _PathsTo("nowhere")

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """All paths of each module, by its first: one that is registered twice has several."""
        names: dict[int, list[str]] = {}
        for path, module in self.original.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(path)
        return {paths[0]: paths for paths in names.values()}

    def _matches(self, path: str, pattern: str) -> bool:
        """Tell whether a pattern means the site at `path`, by whichever name of its module."""
        module = path.partition("@")[0]  # of which this may be one call of several
        names = self._names.get(module)
        if names is None:  # a function, of a module that may have several names
            owner, _, function = path.rpartition(".")
            names = [f"{name}.{function}".lstrip(".") for name in self._names.get(owner, ())]
        return any(fnmatchcase(name, pattern) for name in (path, *names))

    def site(self, path: str, calls: list[Call]) -> Site:
        """Decide for the layer or function that makes `calls`."""
        layer = calls[0].module if calls else self.model.get_submodule(path)
        skip, overridden = self._reasons(path, layer, calls)
        hosts = [] if skip else self._hosts(calls)
        host = hosts[0].path if hosts and hosts[0].module is not None else ""
        seat = "" if skip else self._seat(calls)
        reason = f"takes the seat of {seat}, an nn.Identity" if seat else "no norm follows"
        if overridden:
            reason = f"included, although {overridden.partition('; include=')[0]}"
        elif len(calls) > 1:
            reason = f"called {len(calls)} times: one BatchNorm, moments pooled"
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
            reason=skip or reason,
            host=host,
            layer="" if skip or layer is None else calls[0].path,
            last_axis=axes == 0 and not all(c.shape and len(c.shape) == 2 for c in calls),
            frozen=is_frozen(layer or self.model),
            forwarded=tuple(sorted(self.trace.reads.get(host, ()))) if host and not seat else (),
            seat=seat,
        )

    def _seat(self, calls: list[Call]) -> str:
        """Find the nn.Identity whose place a BatchNorm takes; a graph has one after any call."""
        if self.options.layout == "graph" or self.options.placement != "pre_activation":
            return ""
        seat = seat_after(self.model, calls)
        only = seat and self._calls_of[self.model.get_submodule(seat)]
        return seat if only and len(only) == len(calls) else ""

    def _hosts(self, calls: list[Call]) -> list[Call]:
        """List the calls after which the BatchNorm comes; none if an activation is missing."""
        if self.options.placement == "pre_activation":
            return calls
        found = [activation for call in calls if (activation := activation_after(call))]
        return found if len(found) == len(calls) else []

    def _reasons(self, path: str, layer: nn.Module | None, calls: list[Call]) -> tuple[str, str]:
        """Say why there will be no BatchNorm, if so, and else what `include` had to override."""
        options = self.options
        if excluded := next((p for p in options.exclude if self._matches(path, p)), None):
            return f"excluded by {excluded!r}", ""
        included = any(self._matches(path, pattern) for pattern in options.include)
        if options.include and not included:
            return "not among those included", ""
        overridden = ""
        for objection, can_be_asked in self._objections(path, layer, calls):
            if not included:
                return objection, ""
            if not can_be_asked:
                return f"{ASKED}{objection}", ""
            overridden = overridden or objection
        return "", overridden

    def _objections(
        self, path: str, layer: nn.Module | None, calls: list[Call]
    ) -> Iterator[tuple[str, bool]]:
        """List what speaks against a BatchNorm, and whether it can be asked for all the same.

        Nothing is looked at after what is impossible.
        """
        options, hosts = self.options, self._hosts(calls)
        if not calls:
            yield self._unreached(path), False
        if layer is not None and (inner := _norm_inside(layer)):
            yield f"already normalised by {path}.{inner}", True
        if options.layout == "graph" and layer is None and calls[0].channels == 0:
            yield "a function whose weight is computed: the number of channels is not known", False
        if layer is not None and _has_complex_weight(layer):
            yield "complex weights", False
        if norm := _norm_after(calls):
            yield f"already normalised by {norm}", True
        if not hosts:
            yield "no activation follows it directly", False
        if any(map(_is_unbatched, calls)):
            yield "called on samples without a batch axis, which BatchNorm does not take", False
        if options.layout == "native" and (obstacle := self._obstacle(hosts)):
            yield obstacle, False
        if reason := self._reason_to_be_asked(path, calls, hosts):
            yield reason, True

    def _reason_to_be_asked(self, path: str, calls: list[Call], hosts: list[Call]) -> str | None:
        """Say why a BatchNorm, which is possible here, has to be asked for."""
        asked = f"; include={path!r} asks for it"
        if self.options.layout == "native" and (read := self._read(hosts[0].path)):
            return f"the model's own code reads its {read}{asked}"
        if any(map(self._to_output.lead, calls)):
            return f"output head: the model returns its values{asked}"
        if any(map(self._to_unknown.lead, calls)):
            return "its values go where torch.fx cannot follow: pass example (--data)"
        if any(map(self._to_nowhere.all_lead, calls)):
            return "its values go where they cannot be followed"
        if any(map(_is_single_pixel, calls)):
            return "its feature map is a single pixel: training would fail on a batch of one"
        return None

    def _read(self, path: str) -> str:
        """Name what the model's own code reads of a layer."""
        return ", ".join(f".{name}" for name in sorted(self.trace.reads.get(path, ())))

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
        read = self.trace.reads.get(path, ())
        if not all(is_forwardable(module, name) for name in read):
            return f"the model's own code reads its {self._read(path)}"
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
                    "example (--data)"
                )
        if read := self._read(path):
            return f"not called: the model's own code reads its {read}"
        if self.trace.way == "run":
            return UNCALLED[0]
        kept = defaults(self.model)
        return UNCALLED[1] + (f" with {_written(kept)}" if kept else "")

    def refuse_idle_patterns(self, calls: dict[str, list[Call]]) -> None:
        """Raise RetrofitError for a pattern that matches no layer, or none that has a place."""
        for pattern in (*self.options.include, *self.options.exclude):
            matched = [path for path in calls if self._matches(path, pattern)]
            if not matched:
                raise RetrofitError(
                    f"the pattern {pattern!r} matches none of the {len(calls)} convolutions of "
                    f"{type(self.model).__name__}{self._matched_instead(pattern)}: patterns are "
                    "globs over module paths, such as "
                    f"{next(iter(calls), 'features.*')!r}"
                )
            functions = [path for path in matched if calls[path] and calls[path][0].module is None]
            if (
                pattern in self.options.include
                and self.options.layout == "native"
                and functions == matched
            ):
                raise RetrofitError(
                    f"{functions[0]} is a function: the native layout has no place after it; pass "
                    "layout='graph'"
                )

    def _matched_instead(self, pattern: str) -> str:
        """Say what a pattern matches that gets no BatchNorm; "" if it is nothing."""
        named = self.original.named_modules(remove_duplicate=False)
        found = {path: module for path, module in named if path and fnmatchcase(path, pattern)}
        for path, module in sorted(found.items(), key=lambda one: not is_linear(one[1])):
            if is_linear(module):
                return f" ({path} is a Linear layer, which gets one with linear=True, --linear)"
            inside = f", and '{path}.*' is what is in it" if module._modules else ""
            return f" ({path} is a {type(module).__name__}{inside})"
        return ""


def is_forwardable(layer: nn.Module, name: str) -> bool:
    """Tell whether a Sequential in place of `layer` could have this attribute too: a plain value.

    Its geometry, say, but not its weight, nor what is named as a child of the Sequential.
    """
    value = getattr(layer, name, None)
    return (
        name not in ("act", "bn", "conv", "linear")
        and isinstance(value, PLAIN)
        and all(isinstance(item, PLAIN) for item in (value if isinstance(value, tuple) else ()))
    )


def _written(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _has_complex_weight(layer: nn.Module) -> bool:
    return any(p.is_complex() for p in layer.parameters())


def _is_single_pixel(call: Call) -> bool:
    """Tell whether the result is (N, C, 1, ...): in training one image is then one sample."""
    linear = call.name == "linear" or (call.module is not None and is_linear(call.module))
    return call.shape is not None and not linear and set(call.shape[2:]) == {1}


def _norm_inside(layer: nn.Module) -> str | None:
    """Find the norm that a convolution of its own class brings along, as detectron2's."""
    return next((name for name, child in layer.named_children() if is_norm(child)), None)


def _is_unbatched(call: Call) -> bool:
    """Tell whether a convolution was seen to give (C, ...), one sample without a batch axis."""
    axes = dims(call.module) if call.module is not None else DIMS.get(call.name[-2:-1], 0)
    return bool(axes) and call.shape is not None and len(call.shape) == axes + 1


def _norm_after(calls: Sequence[Call]) -> str | None:
    """Find the norm that these calls feed, if everything that reads their values is one.

    Directly, or behind an activation or other views of the values. A norm on a side branch is none:
    the main path reads what is not normalised.
    """
    found = None
    for user in (user for call in calls for user in call.users):
        if is_norm(user.module) if user.module is not None else user.name in NORMS:
            norm: str | None = user.path if user.module is not None else user.name
        elif user.name in VIEWS | ACTIVATIONS | OUTPUT_ACTIVATIONS:
            norm = _norm_after([user])
        else:
            return None
        if norm is None:
            return None
        found = found or norm
    return found


# A call, and whether the values met a nonlinearity, were pooled, and were flattened after that.
State = tuple[Call, bool, bool, bool]
_READ, _STRAIGHT, _FLATTENED = 1, 2, 4


class _PathsTo:
    """Memoised search of the paths from a call to a sink: "output", "unknown", or "nowhere".

    Values go nowhere that nothing is seen to read: they go to numpy, a list or TorchScript, say.
    """

    def __init__(self, sink: str) -> None:
        self.sink = sink
        self.known: dict[State, int] = {}

    def lead(self, call: Call) -> bool:
        """Tell whether the result of `call` is, in effect, what comes out at the sink.

        Some path to it meets no weighted layer and no nonlinearity (softmax and its like do not
        count); or all paths end there without a weighted layer, pooled and then flattened. A call
        that leads to "output" is an output head.
        """
        found = self._after(call)
        return bool(found & _STRAIGHT) or found & (_FLATTENED | _READ) == _FLATTENED

    def all_lead(self, call: Call) -> bool:
        """Tell whether the result of `call` comes out at the sink and is read nowhere else."""
        found = self._after(call)
        return not call.users or (bool(found & (_STRAIGHT | _FLATTENED)) and not found & _READ)

    def _after(self, call: Call) -> int:
        found = 0
        for user in call.users:
            found |= self._from((user, False, False, False))
        return found

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
        ends = self.sink == "nowhere" and not user.users
        if ends and user.name in ("output", "unknown"):
            return _READ, []
        if ends or user.name == self.sink:
            return (_FLATTENED * flat if nonlinear else _STRAIGHT), []
        weighted = user.weighted or user.name in WEIGHTED_FUNCTIONS
        if weighted if user.module is None else is_weighted(user.module):
            return _READ, []
        nonlinear |= user.name in ACTIVATIONS
        flat |= pooled and user.name in FLATTENINGS
        if user.name in ("mean", "amax"):
            pooled, flat = True, flat or not user.keepdim
        pooled |= "pool" in user.name
        return 0, [(after, nonlinear, pooled, flat) for after in user.users]
