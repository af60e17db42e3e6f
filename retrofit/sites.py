"""Which convolutions get a BatchNorm, where it goes, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy
from torchvision.models import VGG

from retrofit.errors import RetrofitError
from retrofit.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FLATTENINGS,
    NORMS,
    VIEWS,
    WEIGHTED_FUNCTIONS,
    dims,
    is_conv,
    is_norm,
    is_weighted,
)
from retrofit.tables import table
from retrofit.trace import Call, Trace, trace

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Site:
    """One convolution and what happens to it.

    Attributes:
        path: its module path in the original model; for a function, that of the calling module
            followed by the function's name.
        kind: class or function name.
        channels: output channels, 0 where unknown (a function).
        dims: spatial axes.
        calls: calls in one forward pass.
        decision: "insert" or "skip".
        reason: why, in a few words.
        conv, norm: module paths of the convolution and its BatchNorm in the converted model;
            empty for a site that is skipped.
    """

    path: str
    kind: str
    channels: int
    dims: int
    calls: int
    decision: Literal["insert", "skip"]
    reason: str
    conv: str = ""
    norm: str = ""


@dataclass(frozen=True)
class Plan:
    """Every convolution of a model in the order of execution, and what happens to each.

    Attributes:
        model: class name of the planned model.
        sites: all convolutions, those never called last.
        renumbered: paths of the Sequentials whose children move up to make room; at every other
            place a convolution becomes `nn.Sequential(conv=..., bn=...)`.
        last: path of the inserted site that is called last, None if nothing is inserted.
        key_map: keys of the original state dict to keys of the converted one.
    """

    model: str
    sites: tuple[Site, ...]
    renumbered: tuple[str, ...]
    last: str | None
    key_map: dict[str, str]

    @property
    def inserted(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.decision == "insert")

    def __str__(self) -> str:
        rows = [
            (s.path, s.kind, str(s.channels or ""), s.decision, s.norm or "", s.reason)
            for s in self.sites
        ]
        head = ("layer", "type", "channels", "decision", "BatchNorm", "reason")
        summary = f"{len(self.inserted)} of {len(self.sites)} convolutions get a BatchNorm"
        if not rows:
            return f"{self.model} has no convolutions"
        return f"{table(head, rows, right='channels')}\n{self.model}: {summary}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; RetrofitError for anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            sites = tuple(Site(**site) for site in raw.pop("sites"))
            renumbered = tuple(raw.pop("renumbered"))
            return cls(sites=sites, renumbered=renumbered, **raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RetrofitError(f"this is not a plan: {error}") from error


def plan(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    renumber: Patterns = None,
) -> Plan:
    """Decide for every convolution of `model` whether a BatchNorm goes after it.

    The model is traced with torch.fx in eval mode, without data, and not changed. By default
    every convolution gets one but those that a norm already follows, the output head, and those
    that the model's own code reads (`self.conv.weight`).

    Args:
        model: any module that torch.fx can trace; its convolutions are modules.
        include: glob pattern or patterns of module paths ("features.*"): only these, and output
            heads among them too.
        exclude: glob pattern or patterns of module paths: not these.
        renumber: path or paths of `nn.Sequential`s in which BatchNorm becomes a child of its own
            right after the convolution, as in torchvision's vgg*_bn; later children move up. By
            default `features` of torchvision's VGG, and () for none. Everywhere else a convolution
            is replaced in place by `nn.Sequential(conv=..., bn=...)`, so that no index moves.

    Returns:
        A `Plan`: print it to see every convolution, the decision and the reason.

    Raises:
        RetrofitError: torch.fx cannot trace the model (the message has the line that stopped
            it); a pattern matches no convolution; lazy modules are not initialised; a Sequential
            cannot be renumbered since code other than its own forward calls its children.

    Example:
        >>> print(retrofit.plan(torchvision.models.alexnet()))
    """
    _refuse_lazy(model)
    traced = trace(model)
    sites = _decide(model, traced, _patterns(include), _patterns(exclude))
    inserted = {site.path for site in sites if site.decision == "insert"}
    renumbered = _renumbered(model, traced, renumber)
    layout = _Layout(model, inserted, renumbered)
    sites = [
        replace(site, conv=layout.new_path(site.path), norm=layout.norm_path(site.path))
        if site.path in inserted
        else site
        for site in sites
    ]
    order = [call.path for call in traced.calls if call.module is not None]
    return Plan(
        model=type(model).__name__,
        sites=tuple(sites),
        renumbered=renumbered,
        last=next((path for path in reversed(order) if path in inserted), None),
        key_map={key: layout.new_key(key) for key in model.state_dict(keep_vars=True)},
    )


# --- decisions ---------------------------------------------------------------------------------


def _decide(
    model: nn.Module, traced: Trace, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[Site]:
    convs = {path: module for path, module in model.named_modules() if is_conv(module)}
    calls: dict[str, list[Call]] = {}
    for call in traced.calls:
        if call.path in convs and call.module is not None:
            calls.setdefault(call.path, []).append(call)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(path, pattern) for path in convs):
            raise RetrofitError(
                f"the pattern {pattern!r} matches none of the {len(convs)} convolutions of "
                f"{type(model).__name__}: patterns are globs over module paths, such as "
                f"{next(iter(convs), 'features.*')!r}"
            )

    sites: list[Site] = []
    for call in traced.calls:
        if call.module is None and call.name in CONVOLUTIONS:
            path = f"{call.path}.{call.name}".lstrip(".")
            reason = "a function: there is no module to put a BatchNorm after"
            sites.append(Site(path, call.name, 0, int(call.name[-2]), 1, "skip", reason))
        elif call.path in calls and call is calls[call.path][0]:
            sites.append(_site(model, call.path, calls[call.path], traced, include, exclude))
    sites.extend(
        _site(model, path, [], traced, include, exclude) for path in convs if path not in calls
    )
    return sites


def _site(
    model: nn.Module,
    path: str,
    calls: list[Call],
    traced: Trace,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> Site:
    conv = model.get_submodule(path)
    skip = _reason_to_skip(conv, path, calls, traced, include, exclude)
    reason = skip or "no norm follows"
    if not skip and len(calls) > 1:
        reason = f"called {len(calls)} times: one BatchNorm, moments pooled"
    return Site(
        path=path,
        kind=type(conv).__name__,
        channels=int(conv.out_channels),  # type: ignore[arg-type]
        dims=dims(conv),
        calls=len(calls),
        decision="skip" if skip else "insert",
        reason=reason,
    )


def _reason_to_skip(
    conv: nn.Module,
    path: str,
    calls: list[Call],
    traced: Trace,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> str | None:
    excluded = next((pattern for pattern in exclude if fnmatchcase(path, pattern)), None)
    included = next((pattern for pattern in include if fnmatchcase(path, pattern)), None)
    opaque = next((o for o in traced.opaque if f"{path}.".startswith(f"{o}.")), None)
    if excluded:
        return f"excluded by {excluded!r}"
    if include and not included:
        return "not among those included"
    if opaque is not None:
        return f"inside {opaque}, which torch.fx cannot trace ({traced.opaque[opaque]})"
    if not path:
        return "the model itself is this layer: wrap it in nn.Sequential"
    if not calls:
        return "not called in eval mode"
    if conv.weight.dtype.is_complex:  # type: ignore[union-attr]
        return "complex weights"
    if path in traced.reads:
        read = ", ".join(f".{name}" for name in sorted(traced.reads[path]))
        return f"the model's own code reads its {read}"
    norm = next((n for call in calls if (n := _norm_after(call))), None)
    if norm:
        return f"already normalised by {norm}"
    if not included and any(_is_head(call) for call in calls):
        return "output head"
    return None


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


def _is_head(call: Call) -> bool:
    """Some path to the output meets no weighted layer, and either no nonlinearity (softmax and its
    like do not count), or pooling followed by flattening."""
    # A walk over (call, met a nonlinearity, pooled, flattened after pooling).
    seen = set()
    stack = [(user, False, False, False) for user in call.users]
    while stack:
        state = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        user, nonlinear, pooled, flat = state
        if user.name == "output":
            if flat or not nonlinear:
                return True
            continue
        if user.name in WEIGHTED_FUNCTIONS if user.module is None else is_weighted(user.module):
            continue
        nonlinear |= user.name in ACTIVATIONS
        flat |= pooled and user.name in FLATTENINGS
        if user.name in ("mean", "amax"):
            pooled, flat = True, flat or not user.keepdim
        pooled |= "pool" in user.name
        stack += [(after, nonlinear, pooled, flat) for after in user.users]
    return False


def _refuse_lazy(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise RetrofitError(
                f"{path or 'the model'} is a lazy {type(module).__name__} that has no shape yet: "
                "run one batch through the model first"
            )


def _patterns(given: Patterns) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


# --- layout ------------------------------------------------------------------------------------


class _Layout:
    """Module paths and state dict keys of the original model to those of the converted one."""

    def __init__(self, model: nn.Module, inserted: set[str], renumbered: tuple[str, ...]) -> None:
        every = list(model.named_modules(remove_duplicate=False))
        convs = {id(model.get_submodule(path)) for path in inserted}
        growing = {id(model.get_submodule(path)) for path in renumbered}
        self.sites = {path for path, module in every if id(module) in convs}
        # For each path of a renumbered Sequential: old names of its children to new ones.
        self.moves: dict[str, dict[str, str]] = {}
        for path, module in every:
            if id(module) in growing:
                shift, self.moves[path] = 0, {}
                for name, child in module._modules.items():
                    self.moves[path][name] = str(int(name) + shift)
                    shift += id(child) in convs

    def new_path(self, old: str) -> str:
        new, parent = [], ""
        for name in old.split("."):
            path = f"{parent}.{name}" if parent else name
            new.append(self.moves.get(parent, {}).get(name, name))
            if path in self.sites and parent not in self.moves:
                new.append("conv")
            parent = path
        return ".".join(new)

    def norm_path(self, site: str) -> str:
        parent, _, name = self.new_path(site).rpartition(".")
        own = str(int(name) + 1) if site.rpartition(".")[0] in self.moves else "bn"
        return f"{parent}.{own}".lstrip(".")

    def new_key(self, key: str) -> str:
        module, _, tensor = key.rpartition(".")
        return f"{self.new_path(module)}.{tensor}".lstrip(".")


def _renumbered(model: nn.Module, traced: Trace, renumber: Patterns) -> tuple[str, ...]:
    if renumber is None:
        vgg = isinstance(model, VGG) and not _obstacle(model, traced, "features")
        return ("features",) if vgg else ()
    paths = _patterns(renumber)
    for path in paths:
        if obstacle := _obstacle(model, traced, path):
            raise RetrofitError(
                f"cannot renumber {path or 'the model'}: {obstacle}; leave it out of renumber="
            )
    return paths


def _obstacle(model: nn.Module, traced: Trace, path: str) -> str | None:
    """Why the children of this Sequential cannot move up, None if they can."""
    try:
        sequential = model.get_submodule(path)
    except AttributeError:
        return f"{type(model).__name__} has no such module"
    if type(sequential).forward is not nn.Sequential.forward:
        return f"it is a {type(sequential).__name__}, not an nn.Sequential"
    if list(sequential._modules) != [str(i) for i in range(len(sequential._modules))]:
        return "its children have names of their own"
    if path:
        for call in traced.calls:
            below = call.module is not None and call.path.startswith(f"{path}.")
            if below and path not in call.inside:
                return f"{call.path} is called from outside its forward"
    return None
