"""The graph layout: a torch.fx.GraphModule with a place after every call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from retrofit.errors import RetrofitError
from retrofit.numerics.tensor_checks import is_dense
from retrofit.plans import Options, Plan, Site
from retrofit.tracing.calls import activation_after, occurrences
from retrofit.tracing.operations import is_leaf
from retrofit.tracing.symbolic import (
    Symbolic,
    calls_of,
    defaults,
    is_made_by_forward,
    symbolic,
)

# x += y calls one of these.
AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "setitem"}


def graph_module(model: nn.Module) -> fx.GraphModule:
    """Make `model` a GraphModule over the same modules and parameters; itself if it is one.

    Raises RetrofitError when torch.fx cannot follow the model, or when it does something else in
    train mode than in eval mode outside of its layers (a functional dropout): one graph has both.
    """
    if isinstance(model, fx.GraphModule):
        return model
    found, training = symbolic(model), symbolic(model, training=True, seed=1)
    _refuse_unfit(model, found, training)
    _erase_defaults(model, found.graph)
    found.graph._tracer_cls = fx.Tracer  # a pickle is traced anew by it, without this package
    targets = [str(n.target) for n in found.graph.nodes if n.op in ("call_module", "get_attr")]
    _refuse_random_numbers(model, targets, found, training)
    _refuse_written_constants(model, found.graph)
    _refuse_written_buffers(model, (found.traced, training.traced))
    root = {target: _attribute(model, found.traced, target) for target in targets}
    module = fx.GraphModule(root, found.graph, type(model).__name__)
    for path, made in module.named_modules():  # containers are made anew, and in train mode
        made.training = getattr(model.get_submodule(path), "training", False)
    return module


def _refuse_unfit(model: nn.Module, found: Symbolic, training: Symbolic) -> None:
    """Raise RetrofitError for a model that one graph cannot stand for."""
    for path, place in found.opaque.items():
        raise RetrofitError(
            f"torch.fx cannot trace {path} of this {type(model).__name__} ({place}), and a graph "
            "has to have it all: use the native layout"
        )
    # Without how many use each result, which differs before the line that makes the difference.
    texts = [re.sub(r"\[num_users=\d+\] ", "", str(s.graph)) for s in (found, training)]
    lines = [text.splitlines() for text in texts]
    for one, other in zip_longest(*lines, fillvalue="nothing"):
        if one != other:
            raise RetrofitError(
                f"{type(model).__name__} has no single graph: in eval mode it computes "
                f"`{one.strip()}`, in train mode `{other.strip()}`; use modules (nn.Dropout) for "
                "what depends on the mode, or the native layout"
            )
    _refuse_container_hooks(model)
    for name, value in defaults(model).items():
        if isinstance(value, (tuple, list, dict)):  # of which fx makes inputs one by one
            raise RetrofitError(
                f"{name}={value!r} of {type(model).__name__}.forward cannot be fixed in a graph: "
                "use the native layout"
            )


def _refuse_random_numbers(
    model: nn.Module, targets: Iterable[str], found: Symbolic, training: Symbolic
) -> None:
    """Raise RetrofitError where two traces, of different seeds, hold different constants."""
    for target in targets:
        if is_made_by_forward(target) and not torch.equal(
            *(getattr(s.traced, target) for s in (found, training))
        ):
            raise RetrofitError(
                f"{type(model).__name__}.forward draws random numbers, which would be the same "
                "forever in a graph: use the native layout"
            )


def _refuse_written_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Raise RetrofitError where forward writes to a tensor that it makes, a constant in a graph."""
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = str(name).strip("_") in AUGMENTED or re.search(r"[a-z0-9]_$", str(name))
        written = node.all_input_nodes[:1] if in_place or node.kwargs.get("out") else []
        if written and is_made_by_forward(written[0].target):
            raise RetrofitError(
                f"{type(model).__name__}.forward makes a tensor and writes to it ({name}): a graph "
                "would keep what was written: use the native layout"
            )


def _refuse_written_buffers(model: nn.Module, traced: Iterable[nn.Module]) -> None:
    """Raise RetrofitError where forward has written to a buffer while it was traced, in any mode.

    What it writes of its inputs is part of the graph; all else was done once, to the traced copy.
    """
    for copied in traced:
        for path, buffer in model.named_buffers():
            owner, _, name = path.rpartition(".")
            now = getattr(copied.get_submodule(owner), name, None)
            if not isinstance(now, Tensor) or not _is_same(buffer, now):
                raise RetrofitError(
                    f"{type(model).__name__}.forward writes to its buffer {path}, which a graph "
                    "would not do: use the native layout"
                )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same, where NaN equals NaN; asked of dense ones alone."""
    if not is_dense(one):
        return True
    return one.shape == other.shape and bool(((one == other) | one.isnan()).all())


def _attribute(model: nn.Module, traced: nn.Module, target: str) -> Any:
    """Find what a node refers to; tensors that forward made are constants of the traced copy."""
    owner, _, name = target.rpartition(".")
    around = model.get_submodule(owner)
    return getattr(around if hasattr(around, name) else traced.get_submodule(owner), name)


def _refuse_container_hooks(model: nn.Module) -> None:
    """Raise RetrofitError for hooks of containers, which a graph does not have."""
    for path, module in model.named_modules():
        if not is_leaf(module) and (module._forward_hooks or module._forward_pre_hooks):
            raise RetrofitError(
                f"{path or 'the model'} has a forward hook, which a graph has no place for: remove "
                "it, or use the native layout"
            )


def _erase_defaults(model: nn.Module, graph: fx.Graph) -> None:
    """Erase the arguments of forward that keep their default, and fx's assertions on them.

    Another value is then refused by Python, and pickles load.
    """
    kept = inspect.signature(model.forward).parameters.keys() - defaults(model).keys()
    for node in [
        n for n in graph.nodes if n.op == "placeholder" and n.target.lstrip("*") not in kept
    ]:
        doomed = [node]
        for made in doomed:
            doomed += [user for user in made.users if user not in doomed]
        for made in reversed(doomed):
            graph.erase_node(made)


def is_exported(module: fx.GraphModule) -> bool:
    """Tell whether torch.export made this graph: its mode is that of the export, whatever it says.

    It cannot be put in another (`train` and `eval` raise), so what comes to it starts in eval mode.
    """
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def norm_paths(module: fx.GraphModule, sites: Iterable[str]) -> dict[str, str]:
    """Choose a new place beside each site: path of the site to path of its BatchNorm."""
    taken = {path for path, _ in module.named_modules()}
    taken |= {path for path, _ in (*module.named_parameters(), *module.named_buffers())}
    places: dict[str, str] = {}
    for site in sites:
        place = site.replace("@", "_") + "_bn"
        while place in taken:
            place += "_"
        taken.add(place)
        places[site] = place
    return places


def put_after_sites(
    module: fx.GraphModule, plan: Plan, make: Callable[[Site, nn.Module | None], nn.Module]
) -> None:
    """Insert `make(site, layer)` after every site, in place; the layer is None for a function.

    Raises RetrofitError when the plan is not one of this model.
    """
    exported = is_exported(module)
    calls = calls_of(module, module.graph)
    nodes = {call: node for node, call in calls.items()}
    options = Options(layout="graph", linear=True)
    found = dict(occurrences(module, calls.values(), options))
    for site in plan.inserted:
        host = found.get(site.path)
        if host is not None and plan.placement == "post_activation":
            host = activation_after(host)
        node = nodes[host] if host is not None else None
        if node is None or not site.norm:
            raise RetrofitError(
                f"the plan does not fit this {type(module).__name__}: it has no place after "
                f"{site.path}; plan this model anew"
            )
        layer = module.get_submodule(site.layer) if site.layer else None
        around = module.get_submodule(site.norm.rpartition(".")[0])
        training = around.training and (layer is None or layer.training) and not exported
        module.add_submodule(site.norm, make(site, layer).train(training))
        with module.graph.inserting_after(node):
            norm = module.graph.call_module(site.norm, (node,))
        node.replace_all_uses_with(norm)
        norm.args = (node,)  # which was replaced as well
    module.recompile()


def take_out(module: fx.GraphModule, plan: Plan) -> None:
    """Undo `put_after_sites`, in place."""
    norms = {site.norm for site in plan.inserted}
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target in norms:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for norm in norms:
        module.delete_submodule(norm)
    module.recompile()
