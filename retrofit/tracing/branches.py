"""Other ways through a forward pass than the one with every argument at its default."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.tracing.symbolic import Symbolic, defaults, symbolic, variadic

MOST = 16  # combinations of values that are traced
ANY = object()  # in place of a value: an input, so that a trace holds for every one


class Branches(NamedTuple):
    """Traces with other arguments.

    Attributes:
        traces: how it is called, in words ("forward(mode='b')"), to the trace.
        unknown: names of the arguments with which it may do something that no trace shows, and
            `*args` and `**kwargs` where the code looks into them.
    """

    traces: dict[str, Symbolic]
    unknown: tuple[str, ...]


def branches(model: nn.Module, *, usual: bool = False) -> Branches:
    """Trace `model` with other values of those arguments of forward that have a default.

    A flag is turned; in place of None comes an input, or True; an Enum becomes each member. Any
    other value becomes an input; where the code decides by it, a string becomes each of those that
    it is compared with and each key of an nn.ModuleDict, an index each place in an nn.ModuleList.
    All combinations are traced where they are few, else one other value at a time. `usual`: the
    defaults, too.
    """
    given = defaults(model)
    told = all(isinstance(value, (bool, Enum)) for value in given.values())
    as_usual = None if told else _traced(model, given)
    found = {name: _values(model, given, name, as_usual) for name in given}
    unknown = {name for name, (_, all_of_them) in found.items() if not all_of_them}
    others = {name: values for name, (values, _) in found.items() if values}
    if math.prod(len(values) + 1 for values in others.values()) <= MOST:
        every = itertools.product(*([given[name], *values] for name, values in others.items()))
        ways = [dict(zip(others, way, strict=True)) for way in every]
    else:
        ways = [{}, *({name: value} for name, values in others.items() for value in values)]
        unknown |= others.keys()
    traces: dict[str, Symbolic] = {}
    for way in ways if usual else ways[1:]:
        changed = {name: value for name, value in way.items() if value is not given[name]}
        trace = _traced(model, given | way)
        if trace is None:
            unknown |= changed.keys()
        else:
            traces[_words(changed)] = trace
    named = [name for name in given if name in unknown]
    return Branches(traces, (*named, *_looked_into(model, as_usual)))


def _looked_into(model: nn.Module, as_usual: Symbolic | None) -> list[str]:
    """List `*args` and `**kwargs`, if forward has them and does not just ignore them."""
    names = variadic(model)
    if not names or (found := as_usual or _traced(model, defaults(model))) is None:
        return names
    used = {str(n.target) for n in found.graph.nodes if n.op == "placeholder" and n.users}
    return [name for name in names if name in used]


def _words(changed: Mapping[str, Any]) -> str:
    values = (f"{name}={'...' if v is ANY else repr(v)}" for name, v in changed.items())
    return f"forward({', '.join(values)})"


def _traced(model: nn.Module, values: Mapping[str, Any]) -> Symbolic | None:
    """Trace `model` with these arguments; None where torch.fx, or the model, refuses them."""
    fixed = {name: value for name, value in values.items() if value is not ANY}
    try:
        return symbolic(model, fixed=fixed)
    except RetrofitError:
        return None


def _values(
    model: nn.Module, usual: Mapping[str, Any], name: str, as_usual: Symbolic | None
) -> tuple[list[Any], bool]:
    """List what else an argument can be, and tell whether that is all.

    `as_usual` is the trace for the defaults, where torch.fx can follow that.
    """
    value = usual[name]
    if isinstance(value, bool):
        return [not value], True
    if isinstance(value, Enum):
        return [member for member in type(value) if member is not value], True
    as_input = _traced(model, {**usual, name: ANY})
    if as_input is not None and as_usual is not None and as_input.opaque == as_usual.opaque:
        return [ANY], True
    if value is None:  # a flag, or a name?
        flags = [True] if _traced(model, {**usual, name: True}) is not None else []
        texts, all_known = _compared(model, usual, name)
        if not any(texts):  # it is compared with none
            return flags, bool(flags)
        return [*flags, *texts], bool(flags) and all_known
    if isinstance(value, str):
        return _compared(model, usual, name)
    if isinstance(value, int):
        lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        places = range(min(MOST, max(map(len, lists), default=0)))
        return [place for place in places if place != value], False
    return [], False


def _compared(model: nn.Module, usual: Mapping[str, Any], name: str) -> tuple[list[Any], bool]:
    """List the strings that the code may compare an argument with; not all if it looks it up."""
    known, looked_up = [str(usual[name]), ""], False  # "" passes every comparison by
    for value in known:
        if len(known) <= MOST:
            asked = _Asked(value)
            _traced(model, {**usual, name: asked})
            looked_up |= asked.looked_up
            known += [other for other in asked.compared if other not in known]
    dicts = [m for m in model.modules() if looked_up and isinstance(m, nn.ModuleDict)]
    known += [key for found in dicts for key in found if key not in known]
    others = list(dict.fromkeys(known[2:]))
    if _traced(model, {**usual, name: ""}) is not None:  # any other string is taken, too
        others.append("")
    return others, not looked_up and len(known) <= MOST


class _Asked(str):  # noqa: SLOT000 - it has attributes
    """A string that notes what it is compared with.

    Attributes:
        compared: the other strings.
        looked_up: it was the key of a dict, or asked for more than equality, so that the other
            strings are not known.
    """

    def __init__(self, _: str) -> None:
        self.compared: list[str] = []
        self.looked_up = False

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(str, name):  # .startswith, .lower
            self.looked_up = True
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        if type(other) is str:
            self.compared.append(other)
        return str.__eq__(self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        self.looked_up = True
        return str.__hash__(self)
