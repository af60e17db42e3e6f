"""plan: read the model, apply the rules, say where everything will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models import VGG

from retrofit import graph
from retrofit.batches import ForwardFn, arguments_of
from retrofit.calls import Call, Trace
from retrofit.collecting import uncollected
from retrofit.comparison import BRANCH_TOLERANCE, Comparison
from retrofit.copies import shared_copy
from retrofit.errors import RetrofitError
from retrofit.layers import is_dense
from retrofit.layout import Layout
from retrofit.plans import LAYOUTS, PLACEMENTS, LayoutName, Placement, Plan, Site
from retrofit.rewrite import put_after_sites
from retrofit.sites import Options, decide
from retrofit.trace import UntraceableError, calls_of, defaults, symbolic, trace, trace_whole
from retrofit.watch import watch

Patterns = str | Sequence[str] | None


@uncollected()
def plan(
    model: nn.Module,
    *,
    example_inputs: Any = None,
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
    `example_inputs` instead, and the same rules are applied to what it did; without an example,
    the largest submodules that torch.fx can follow are planned, and the rest is left out.

    By default every convolution gets a BatchNorm but those that a norm already follows, the output
    head, those whose feature map is a single pixel (where an example shows it: training would fail
    on a batch of one), and those that the model's own code reads (`self.conv.weight`) or calls past
    its module tree.

    Args:
        model: any module.
        example_inputs: one batch, in the form that `calibrate` takes. Two images are enough.
        forward_fn: `forward_fn(model, example_inputs)`, as for `calibrate`.
        include: glob pattern or patterns of module paths ("features.*"): only these, and output
            heads and single pixels among them too.
        exclude: glob pattern or patterns of module paths: not these.
        renumber: path or paths of `nn.Sequential`s in which BatchNorm becomes a child of its own
            right after the convolution, as in torchvision's vgg*_bn; later children move up. By
            default `features` of torchvision's VGG, and () for none. Everywhere else a convolution
            is replaced in place by `nn.Sequential(conv=..., bn=...)`, so that no index moves.
        layout: "native" keeps the model's class, methods and containers. "graph" makes a
            `torch.fx.GraphModule`, which also has a place after functional convolutions
            (`F.conv2d`) and one for each call of a shared layer; it needs torch.fx to follow the
            whole model, alike in train and eval mode.
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

    Example:
        >>> print(retrofit.plan(torchvision.models.alexnet()))
    """
    if not isinstance(model, nn.Module):
        raise RetrofitError(f"plan takes an nn.Module, not a {type(model).__name__}")
    for name, value, known in (("layout", layout, LAYOUTS), ("placement", placement, PLACEMENTS)):
        if value not in known:
            raise RetrofitError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    _refuse_lazy(model)
    if include is not None and not include:
        raise RetrofitError("include= names nothing: leave it out to convert all")
    options = Options(_patterns(include), _patterns(exclude), layout, placement, linear)
    if layout == "graph":
        if renumber:
            raise RetrofitError("renumber= is for the native layout; the graph layout moves no key")
        return _graph_plan(model, options, example_inputs, forward_fn)
    traced, read = _read(model, example_inputs, forward_fn)
    for path, names in _reads_in_training(model, example_inputs, forward_fn).items():
        traced.reads.setdefault(path, set()).update(names)
    sites = decide(model, traced, options)
    renumbered = _renumbered(model, traced, renumber)
    while True:
        drawn = _native_plan(model, traced, options, sites, renumbered)
        missed = _missed(model, traced, drawn, read)
        if not missed:
            return drawn
        reason = "the model's own code calls it past its module tree, from a list say"
        sites = [_skipped(site, reason) if site.path in missed else site for site in sites]


# --- reading the model -------------------------------------------------------------------------


def _read(
    model: nn.Module, example: Any, forward_fn: ForwardFn | None
) -> tuple[Trace, Callable[[nn.Module], Trace]]:
    """The calls of the model, and how those of a trial version of it are read.

    By torch.fx, if it can follow the whole model as the example calls it: it sees what every input
    would do. Else by a run on the example; without one, by torch.fx as far as it gets.
    """
    if example is None:
        return trace(model), trace
    if forward_fn is None and not arguments_of(model, example).kwargs.keys() & defaults(model):
        traced = trace_whole(model)
        if traced.static:
            watched = watch(model, example)
            if _modules_called(traced) == _modules_called(watched):
                return _with_shapes(traced, watched), trace

    def read(version: nn.Module) -> Trace:
        return watch(version, example, forward_fn)

    return read(model), read


def _modules_called(traced: Trace) -> list[str]:
    """By path, in order. torch.fx and a run differ where code asks for types: isinstance(x, Tensor)
    is False of what torch.fx passes."""
    return [call.path for call in traced.calls if call.module is not None]


def _reads_in_training(
    model: nn.Module, example: Any, forward_fn: ForwardFn | None
) -> dict[str, set[str]]:
    """What the model's own code reads of its layers in train mode (a penalty on a weight, say);
    nothing if it does not run so (a detector without targets)."""
    try:
        return symbolic(model, training=True).reads
    except UntraceableError:
        pass
    try:
        return {} if example is None else watch(model, example, forward_fn, training=True).reads
    except RetrofitError:
        return {}


def _with_shapes(traced: Trace, watched: Trace) -> Trace:
    """The same calls, with what the run knows of their results."""
    known: dict[tuple[str, str], list[Call]] = {}
    for call in watched.calls:
        known.setdefault((call.path, call.name), []).append(call)
    for call in traced.calls:
        if seen := known.get((call.path, call.name)):
            first = seen.pop(0)
            call.shape, call.channels = first.shape, call.channels or first.channels
    return traced


def _refuse_lazy(model: nn.Module) -> None:
    for path, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(map(is_lazy, tensors)):
            raise RetrofitError(
                f"{path or 'the model'} is a lazy {type(module).__name__} that has no shape yet: "
                "run one batch through the model first"
            )


def _patterns(given: Patterns) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RetrofitError(f"{pattern!r} is no module path or glob pattern of module paths")
    return patterns


# --- drawing the plan --------------------------------------------------------------------------


def _native_plan(
    model: nn.Module,
    traced: Trace,
    options: Options,
    sites: Sequence[Site],
    renumbered: tuple[str, ...],
) -> Plan:
    """The plan for decided sites: with the places in the converted model."""
    by_host = {site.host: site.path for site in sites if site.decision == "insert"}
    order = _modules_called(traced) if traced.static else []
    placed, key_map = _placed(model, sites, renumbered)
    return Plan(
        model=type(model).__name__,
        sites=placed,
        renumbered=renumbered,
        last=next((by_host[path] for path in reversed(order) if path in by_host), None),
        key_map=key_map,
        layout="native",
        placement=options.placement,
    )


def _placed(
    model: nn.Module, sites: Sequence[Site], renumbered: tuple[str, ...]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites with their places in the native layout, and the keys of all tensors there."""
    layout = Layout(model, {s.host for s in sites if s.decision == "insert"}, renumbered)
    placed = tuple(
        replace(site, layer=layout.new_path(site.path), norm=layout.norm_path(site.host))
        if site.decision == "insert"
        else site
        for site in sites
    )
    return placed, {key: layout.new_key(key) for key in model.state_dict(keep_vars=True)}


def without(model: nn.Module, drawn: Plan, paths: Collection[str]) -> Plan:
    """The plan with these sites of `model`, the original, left out: no data reaches them."""
    sites = tuple(_skipped(s, "no data reached it") if s.path in paths else s for s in drawn.sites)
    key_map = drawn.key_map
    if drawn.layout == "native":
        sites, key_map = _placed(model, sites, drawn.renumbered)
    last = drawn.last if drawn.last not in paths else None
    return replace(drawn, sites=sites, last=last, key_map=key_map)


def _skipped(site: Site, reason: str) -> Site:
    return replace(site, decision="skip", reason=reason, host="", layer="", norm="")


def _missed(
    model: nn.Module, traced: Trace, drawn: Plan, read: Callable[[nn.Module], Trace]
) -> set[str]:
    """Sites whose BatchNorm the model would not call: tried out with nn.Identity in their place."""
    if not drawn.inserted:
        return set()
    trial = shared_copy(model)
    put_after_sites(trial, drawn, lambda _site, _layer: nn.Identity())
    norms = {site.norm for site in drawn.inserted}
    tried = read(trial)
    if _flow(tried.calls, norms) != _flow(traced.calls) or not _alike(tried, traced):
        raise RetrofitError(
            f"the code of {type(model).__name__} does something else once layers are inserted "
            "(it may ask for their type or number): exclude those layers, or pass renumber=()"
        )
    called = Counter(call.path for call in tried.calls)
    return {site.path for site in drawn.inserted if called[site.norm] != site.calls}


def _flow(calls: Sequence[Call], norms: Collection[str] = ()) -> list[tuple[Any, ...]]:
    """Each call with those that it feeds, by number, as if there were no `norms`."""
    kept = [call for call in calls if call.path not in norms]
    numbers = {id(call): number for number, call in enumerate(kept)}

    def fed(call: Call) -> Iterator[int]:
        for user in call.users:
            if id(user) in numbers:
                yield numbers[id(user)]
            else:
                yield from fed(user)

    return [(call.name, call.arguments, sorted(set(fed(call)))) for call in kept]


def _alike(one: Trace, other: Trace) -> bool:
    """Both runs returned the same."""
    if one.outputs.keys() != other.outputs.keys():
        return False
    return all(starmap(_equal, zip(one.outputs.values(), other.outputs.values(), strict=True)))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not is_dense(one):
        return one.shape == other.shape
    compared = Comparison()
    compared.add(one, other, "")
    allowed = 0.0 if one.device.type == "cpu" else BRANCH_TOLERANCE
    return compared.difference("").relative <= allowed


def _graph_plan(
    model: nn.Module, options: Options, example: Any, forward_fn: ForwardFn | None
) -> Plan:
    module = graph.graph_module(model)
    calls = list(calls_of(module, module.graph).values())
    traced = Trace(calls, static=True, opaque={}, reads={})
    if example is not None:
        watched = watch(model, example, forward_fn)
        if _modules_called(traced) != _modules_called(watched):
            raise RetrofitError(
                f"torch.fx sees other calls in {type(model).__name__} than a run on the example "
                "makes (its code may ask for types): use the native layout"
            )
        traced = _with_shapes(traced, watched)
    sites = decide(module, traced, options)
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


# --- renumbering -------------------------------------------------------------------------------


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
    if path and traced.is_inside_opaque(path):
        return "code that torch.fx cannot follow may call its children (pass example_inputs)"
    if path:
        for call in traced.calls:
            below = call.module is not None and call.path.startswith(f"{path}.")
            if below and path not in call.inside:
                return f"{call.path} is called from outside its forward"
    return None
