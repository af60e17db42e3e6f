"""Which convolutions get a BatchNorm, where it goes, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torchvision.models import VGG

from retrofit.copies import shared_copy
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
from retrofit.layout import Layout
from retrofit.plans import Plan, Site
from retrofit.rewrite import put_after_sites
from retrofit.trace import Call, Trace, trace

Patterns = str | Sequence[str] | None


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
    that the model's own code reads (`self.conv.weight`) or calls past its module tree.

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
            cannot be renumbered since code other than its own forward calls its children; the
            model's code does something else once there are more layers.

    Example:
        >>> print(retrofit.plan(torchvision.models.alexnet()))
    """
    if not isinstance(model, nn.Module):
        raise RetrofitError(f"plan takes an nn.Module, not a {type(model).__name__}")
    _refuse_lazy(model)
    traced = trace(model)
    sites = _Rules(model, traced, _patterns(include), _patterns(exclude)).sites()
    renumbered = _renumbered(model, traced, renumber)
    while True:
        drawn = _drawn(model, traced, sites, renumbered)
        missed = _missed(model, traced, drawn)
        if not missed:
            return drawn
        sites = [
            replace(
                site,
                decision="skip",
                reason="the model's own code calls it past its module tree, from a list say",
            )
            if site.path in missed
            else site
            for site in sites
        ]


def _drawn(
    model: nn.Module, traced: Trace, sites: Sequence[Site], renumbered: tuple[str, ...]
) -> Plan:
    """The plan for decided sites: with the places in the converted model."""
    inserted = {site.path for site in sites if site.decision == "insert"}
    layout = Layout(model, inserted, renumbered)
    order = [call.path for call in traced.calls if call.module is not None]
    return Plan(
        model=type(model).__name__,
        sites=tuple(
            replace(site, conv=layout.new_path(site.path), norm=layout.norm_path(site.path))
            if site.path in inserted
            else site
            for site in sites
        ),
        renumbered=renumbered,
        last=next((path for path in reversed(order) if path in inserted), None),
        key_map={key: layout.new_key(key) for key in model.state_dict(keep_vars=True)},
    )


def _missed(model: nn.Module, traced: Trace, drawn: Plan) -> set[str]:
    """Sites whose BatchNorm the model would not call: tried out with nn.Identity in their place."""
    if not drawn.inserted:
        return set()
    trial = shared_copy(model)
    put_after_sites(trial, drawn, lambda _site, _conv: nn.Identity())
    norms = {site.norm for site in drawn.inserted}
    calls = trace(trial).calls
    if [c.name for c in calls if c.path not in norms] != [c.name for c in traced.calls]:
        raise RetrofitError(
            f"the code of {type(model).__name__} does something else once layers are inserted "
            "(it may ask for their type or number): exclude those layers, or pass renumber=()"
        )
    called = Counter(call.path for call in calls)
    return {site.path for site in drawn.inserted if called[site.norm] != site.calls}


# --- decisions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    """Decides for each convolution of a traced model."""

    model: nn.Module
    traced: Trace
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def sites(self) -> list[Site]:
        """All convolutions in the order of execution, those never called last."""
        convs = [path for path, module in self.model.named_modules() if is_conv(module)]
        self._refuse_idle_patterns(convs)
        calls: dict[str, list[Call]] = {}
        for call in self.traced.calls:
            if call.module is not None and call.path in convs:
                calls.setdefault(call.path, []).append(call)
        found: list[Site] = []
        for call in self.traced.calls:
            if call.module is None and call.name in CONVOLUTIONS:
                path = f"{call.path}.{call.name}".lstrip(".")
                reason = "a function: there is no module to put a BatchNorm after"
                found.append(Site(path, call.name, 0, int(call.name[-2]), 1, "skip", reason))
            elif call.path in calls and call is calls[call.path][0]:
                found.append(self._site(call.path, calls[call.path]))
        found.extend(self._site(path, []) for path in convs if path not in calls)
        return found

    def _site(self, path: str, calls: list[Call]) -> Site:
        conv = self.model.get_submodule(path)
        skip = self._reason_to_skip(conv, path, calls)
        pooled = f"called {len(calls)} times: one BatchNorm, moments pooled"
        return Site(
            path=path,
            kind=type(conv).__name__,
            channels=int(conv.out_channels),  # type: ignore[arg-type]
            dims=dims(conv),
            calls=len(calls),
            decision="skip" if skip else "insert",
            reason=skip or (pooled if len(calls) > 1 else "no norm follows"),
        )

    def _reason_to_skip(self, conv: nn.Module, path: str, calls: list[Call]) -> str | None:
        included = any(fnmatchcase(path, pattern) for pattern in self.include)
        opaque = self._opaque_around(conv)
        if excluded := next((p for p in self.exclude if fnmatchcase(path, p)), None):
            return f"excluded by {excluded!r}"
        if self.include and not included:
            return "not among those included"
        if opaque is not None:
            return f"inside {opaque}, which torch.fx cannot trace ({self.traced.opaque[opaque]})"
        if not path:
            return "the model itself is this layer: wrap it in nn.Sequential"
        if not calls:
            return "not called in eval mode"
        if any(call.arguments > 1 for call in calls):
            return "called with more than its input"
        if conv.weight.dtype.is_complex:  # type: ignore[union-attr]
            return "complex weights"
        if read := sorted(self.traced.reads.get(path, ())):
            return f"the model's own code reads its {', '.join(f'.{name}' for name in read)}"
        if norm := next((n for call in calls if (n := _norm_after(call))), None):
            return f"already normalised by {norm}"
        if not included and any(_is_head(call) for call in calls):
            return "output head"
        return None

    def _opaque_around(self, conv: nn.Module) -> str | None:
        """The opaque submodule that holds this convolution, under whatever name."""
        for opaque in self.traced.opaque:
            if any(module is conv for module in self.model.get_submodule(opaque).modules()):
                return opaque
        return None

    def _refuse_idle_patterns(self, convs: list[str]) -> None:
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(path, pattern) for path in convs):
                raise RetrofitError(
                    f"the pattern {pattern!r} matches none of the {len(convs)} convolutions of "
                    f"{type(self.model).__name__}: patterns are globs over module paths, such as "
                    f"{next(iter(convs), 'features.*')!r}"
                )


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
