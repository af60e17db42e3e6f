"""plan: read the model, apply the rules, say where everything will be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.option_checks import check_flags, check_forward_fn
from retrofit.planning.renumbering import renumbered
from retrofit.planning.rules import decide
from retrofit.planning.trial import missed_sites
from retrofit.plans import (
    LAYOUTS,
    PLACEMENTS,
    LayoutName,
    Options,
    Patterns,
    Placement,
    Plan,
    Site,
)
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.shared_copy import refuse_lazy, refuse_wrappers, uncollected
from retrofit.surgery import graph
from retrofit.surgery.native import Places
from retrofit.tracing.attribute_reads import united
from retrofit.tracing.calls import Trace
from retrofit.tracing.read_model import read, read_graph, read_in_training
from retrofit.tracing.symbolic import UntraceableError, calls_of


@uncollected()
def plan(
    model: nn.Module,
    *,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    renumber: Patterns = None,
    layout: LayoutName = "native",
    placement: Placement = "pre_activation",
    linear: bool = False,
) -> Plan:
    """Decide for every convolution of `model` whether a BatchNorm goes after it.

    The model is traced with torch.fx in eval mode, without data, and not changed. One that
    torch.fx cannot follow to the end (a detector, a recurrent flow network) is run once on
    `example` instead, and the same rules are applied to what it did; without an example,
    the largest submodules that torch.fx can follow are planned, and the rest is left out.

    By default every convolution gets a BatchNorm but those whose every reader is a norm, the output
    head, those whose feature map is a single pixel (where an example shows it: training would fail
    on a batch of one), and those that the model's own code reads (`self.conv.weight`,
    `self.conv.stride`) or calls past its module tree.

    Where folding has left an nn.Identity that alone reads a convolution, the BatchNorm takes its
    place (its seat), so that a folded ResNet gets the keys of its class again, and `fold` puts the
    nn.Identity back. A seat is named like a norm ("bn1", "norm"), or comes right after the
    convolution in one nn.Sequential. The graph layout and post_activation know none.

    Args:
        model: any module.
        example: one batch, in the form that `calibrate` takes. Two images are enough.
        forward_fn: `forward_fn(model, example)`, as for `calibrate`.
        include: glob pattern or patterns of module paths ("features.*"): only these, and all of
            them where a BatchNorm is possible: output heads, single pixels, what is normalised
            already, what code reads the geometry of. A module with several names has all of them.
        exclude: glob pattern or patterns of module paths: not these.
        renumber: path or paths of `nn.Sequential`s in which BatchNorm becomes a child of its own
            right after the convolution, as in torchvision's vgg*_bn; later children move up. By
            default `features` of torchvision's VGG, and () for none. Everywhere else a convolution
            without a seat is replaced in place by `nn.Sequential(conv=..., bn=...)`, so that no
            index moves.
        layout: "native" keeps the model's class, methods and containers. "graph" makes a
            `torch.fx.GraphModule`, which also has a place after functional convolutions
            (`F.conv2d`) and one for each call of a shared layer; it needs torch.fx to follow the
            whole model, alike in train and eval mode. A graph that torch.export made,
            `program.module()`, is taken as it is: its convolutions are functions.
        placement: "pre_activation", between the convolution and its activation, as in vgg*_bn; or
            "post_activation", after the activation. The latter cannot be folded after training.
        linear: `nn.Linear` layers too: BatchNorm1d for inputs of shape (N, F), statistics over all
            axes but the last for (N, ..., F). Which it is only an example tells; without one, each
            gets the latter, which takes both but has other keys ("fc.bn.bn.weight").

    Returns:
        A `Plan`: print it to see every convolution, the decision and the reason.

    Raises:
        RetrofitError: the model does not run on the example; a pattern matches no convolution, or
            `include` is empty; a layout or placement is unknown; `renumber` with the graph layout;
            lazy modules are not initialised; the model is a wrapper (DataParallel); a Sequential
            cannot be renumbered since code other than its own forward calls its children; the
            model's code does something else once there are more layers; the graph layout is asked
            for a model that torch.fx cannot trace (with the line that stopped it).

    Examples:
        >>> print(retrofit.plan(torchvision.models.alexnet()))
    """
    _refuse_unusable(model)
    for name, value, known in (("layout", layout, LAYOUTS), ("placement", placement, PLACEMENTS)):
        if value not in known:
            raise RetrofitError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    check_forward_fn(forward_fn)
    check_flags(linear=linear)
    options = Options(_patterns(include), _patterns(exclude), layout, placement, linear)
    if include is not None and not options.include:
        raise RetrofitError("include= names nothing: leave it out to convert all")
    if layout == "graph":
        if renumber:
            raise RetrofitError("renumber= is for the native layout; the graph layout moves no key")
        try:
            return _graph_plan(model, options, example, forward_fn)
        except UntraceableError as error:
            raise RetrofitError(
                f"{error}; the native layout does without: leave out layout='graph' (--layout)"
            ) from error
    requested = None if renumber is None else _patterns(renumber)
    return _native_plan(model, options, requested, example, forward_fn)


def _refuse_unusable(model: nn.Module) -> None:
    """Raise RetrofitError for what is no module, or has lazy layers."""
    if not isinstance(model, nn.Module):
        raise RetrofitError(
            f"plan takes an nn.Module, not a {type(model).__name__} (of an exported program, or "
            "a checkpoint that holds one, pass the module inside)"
        )
    refuse_wrappers(model)
    refuse_lazy(model)


def _patterns(given: Patterns) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns: tuple[object, ...]
    try:
        patterns = (given,) if isinstance(given, (str, bytes)) else tuple(given)
    except TypeError:
        patterns = (given,)
    checked: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RetrofitError(f"{pattern!r} is no module path or glob pattern of module paths")
        checked.append(pattern)
    return tuple(checked)


# --- the native layout -------------------------------------------------------------------------


def _native_plan(
    model: nn.Module,
    options: Options,
    renumber: tuple[str, ...] | None,
    example: Any,
    forward_fn: ForwardFn | None,
) -> Plan:
    trace = read(model, example, forward_fn)
    training = read_in_training(model, trace, example, forward_fn)
    if training is not None:
        trace = replace(trace, reads=united(trace.reads, training.reads))
    sites = decide(model, trace, options)
    growing = renumbered(model, trace, renumber)
    while True:
        drawn = _drawn(model, trace, options, sites, growing)
        missed = missed_sites(model, (trace, training), drawn, example, forward_fn)
        if not missed:
            return drawn
        reason = "the model's own code calls it past its module tree, from a list say"
        sites = [_skipped(site, reason) if site.path in missed else site for site in sites]


def _drawn(
    model: nn.Module,
    trace: Trace,
    options: Options,
    sites: Sequence[Site],
    growing: tuple[str, ...],
) -> Plan:
    """Make the plan for decided sites, with their places in the converted model."""
    by_host = {site.host: site.path for site in sites if site.decision == "insert"}
    order = trace.modules_called if trace.static else []
    placed, key_map = _placed(model, sites, growing)
    return Plan(
        model=type(model).__name__,
        sites=placed,
        renumbered=growing,
        last=next((by_host[path] for path in reversed(order) if path in by_host), None),
        key_map=key_map,
        layout="native",
        placement=options.placement,
    )


def _placed(
    model: nn.Module, sites: Sequence[Site], growing: tuple[str, ...]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Give the sites their places in the native layout, and all tensors their keys there."""
    hosts = {site.host for site in sites if site.decision == "insert" and not site.seat}
    places = Places(model, hosts, growing)
    placed = tuple(places.placed(site) if site.decision == "insert" else site for site in sites)
    return placed, {key: places.new_key(key) for key in model.state_dict(keep_vars=True)}


def without(model: nn.Module, drawn: Plan, paths: Collection[str]) -> Plan:
    """Leave out the sites at `paths`, which no data reaches, of the plan for `model`."""
    sites = tuple(_skipped(s, "no data reached it") if s.path in paths else s for s in drawn.sites)
    key_map = drawn.key_map
    if drawn.layout == "native":
        sites, key_map = _placed(model, sites, drawn.renumbered)
    last = drawn.last if drawn.last not in paths else None
    return replace(drawn, sites=sites, last=last, key_map=key_map)


def _skipped(site: Site, reason: str) -> Site:
    return replace(site, decision="skip", reason=reason, host="", layer="", norm="", seat="")


# --- the graph layout --------------------------------------------------------------------------


def _graph_plan(
    model: nn.Module, options: Options, example: Any, forward_fn: ForwardFn | None
) -> Plan:
    module = graph.graph_module(model)
    calls = list(calls_of(module, module.graph).values())
    trace = read_graph(model, calls, example, forward_fn)
    sites = decide(module, trace, options, model)
    chosen = [site for site in sites if site.decision == "insert"]
    norms = graph.norm_paths(module, [site.path for site in chosen])
    return Plan(
        model=type(model).__name__,
        sites=tuple(
            replace(site, norm=norms[site.path]) if site.decision == "insert" else site
            for site in sites
        ),
        renumbered=(),
        last=chosen[-1].path if chosen else None,
        key_map={key: key for key in module.state_dict(keep_vars=True)},
        layout="graph",
        placement=options.placement,
    )
