"""Scale and shift absorbed into the weight and bias of a layer, or of a function in a graph.

What is computed for weight and bias stands in `numerics.folded_weights`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.weight_norm import WeightNorm

from retrofit.numerics.folded_weights import fold_weights
from retrofit.running.modes import evaluating
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.affine_map import UnfoldableError, is_patched, refuse_pruned
from retrofit.tracing.operations import (
    AFFINE_FUNCTIONS,
    channels,
    is_conv,
    is_transposed,
)
from retrofit.tracing.symbolic import operation_name

# In the calls of F.conv2d, F.linear and their like; groups of the transposed ones, and of
# aten.convolution, which stands for all and has all its arguments.
PLACES = {"weight": 1, "bias": 2, "groups": 6}
GROUPS_OF_ATEN = 8


# --- layers ------------------------------------------------------------------------------------


def absorb(layer: nn.Module, alpha: Tensor, shift: Tensor) -> None:
    """Change weight and bias of `layer` so that it computes alpha * layer(x) + shift.

    Under weight_norm it is the magnitude g that is scaled.

    Args:
        layer: a convolution or Linear layer, changed in place: its parameters are replaced.
        alpha, shift: (C,).

    Raises UnfoldableError, with nothing changed, for a layer that cannot absorb them.
    """
    place = _scaled(layer)
    if layer._forward_hooks or len(layer._forward_pre_hooks) > len(_weight_norms(layer)):
        raise UnfoldableError(
            "{layer} has a hook, which may depend on what {layer} gives without the BatchNorm: "
            "remove it"
        )
    folded = _absorbed(layer, place, alpha, shift)
    own = type(layer).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.linear")
    if not own or is_patched(layer):
        _try(folded, layer, alpha, shift)
    for owner, name in (place, _Place("", "bias")):
        new = folded.get_submodule(owner)._parameters[name]
        layer.get_submodule(owner)._parameters[name] = new
    _refresh(layer)


class _Place(NamedTuple):
    """Where a parameter is: path of its module in the layer, and name."""

    owner: str
    name: str


def _scaled(layer: nn.Module) -> _Place:
    """Find the parameter that each output channel of `layer` is proportional to.

    Raises UnfoldableError where there is none.
    """
    bias = "bias" in layer._parameters
    if bias and "weight" in layer._parameters:
        return _Place("", "weight")
    refuse_pruned(layer, "{layer}")
    # weight_norm: w = g * v / ||v||, and g has a number for each index of one axis of v.
    channels = 1 if is_transposed(layer) else 0
    one_axis = channels == 0 or getattr(layer, "groups", 1) == 1
    hooks = _weight_norms(layer)
    if bias and one_axis and hooks and hooks[0].dim == channels:
        return _Place("", "weight_g")
    chain = list(getattr(getattr(layer, "parametrizations", None), "weight", ()))
    own = [type(step).__name__ for step in chain] == ["_WeightNorm"]
    if bias and one_axis and own and getattr(chain[0], "dim", None) == channels:
        return _Place("parametrizations.weight", "original0")
    if not (hooks or hasattr(layer, "parametrizations") or layer._forward_pre_hooks):
        raise UnfoldableError(
            "weight and bias of {layer} are not both of nn.Parameter: make them so before folding"
        )
    raise UnfoldableError(
        "the weight of {layer} is parametrized: remove the parametrization (or weight_norm) "
        "before folding"
    )


def _weight_norms(layer: nn.Module) -> list[WeightNorm]:
    """List the weight_norm of torch.nn.utils that a layer has, as a hook, on its weight."""
    hooks = layer._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, WeightNorm) and hook.name == "weight"]


def _refresh(layer: nn.Module) -> None:
    """Let the weight that weight_norm keeps be that of its new g, before the next call too."""
    with torch.no_grad():
        for hook in _weight_norms(layer):
            layer.weight = hook.compute_weight(layer)


def _absorbed(layer: nn.Module, place: _Place, alpha: Tensor, shift: Tensor) -> nn.Module:
    """Make a copy of `layer` that computes alpha * layer(x) + shift."""
    weight = layer.get_submodule(place.owner)._parameters[place.name]
    assert weight is not None
    folded = shared_copy(layer)
    folded.get_submodule(place.owner)._parameters[place.name], folded._parameters["bias"] = (
        _scaled_by(
            alpha,
            shift,
            weight,
            layer._parameters["bias"],
            channels=channels(layer),
            transposed=is_transposed(layer),
            groups=int(getattr(layer, "groups", 1)),
        )
    )
    return folded


def _scaled_by(
    alpha: Tensor,
    shift: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    *,
    channels: int,
    transposed: bool,
    groups: int,
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Make new parameters: see `fold_weights`. UnfoldableError where there are none."""
    if len(alpha) != channels:
        raise UnfoldableError(
            f"the BatchNorm after {{layer}} has {len(alpha)} channels, and {{layer}} {channels}"
        )
    new_weight, new_bias = fold_weights(
        weight.detach(),
        None if bias is None else bias.detach(),
        alpha.to(weight.device),
        shift.to(weight.device),
        transposed=transposed,
        groups=groups,
    )
    new = [tensor for tensor in (new_weight, new_bias) if tensor is not None]
    if not all(tensor.isfinite().all() for tensor in new):
        raise UnfoldableError(
            f"the weight or bias of {{layer}}, folded, would leave the range of {weight.dtype}, or "
            "has a NaN or Inf already"
        )
    learns = (weight if bias is None else bias).requires_grad
    made = None if new_bias is None else nn.Parameter(new_bias, learns)
    return nn.Parameter(new_weight, weight.requires_grad), made


def _try(folded: nn.Module, layer: nn.Module, alpha: Tensor, shift: Tensor) -> None:
    """Raise UnfoldableError where `folded` does not compute alpha * layer(x) + shift.

    torch's own layers do; this is for a subclass with a forward of its own (weight standardisation,
    an activation).
    """
    name = f"{{layer}}, a {type(layer).__name__},"
    layer, folded = copy.deepcopy((layer, folded))  # whose forward may keep things, or write
    generator = torch.Generator().manual_seed(0)
    if is_conv(layer):
        size = [
            32 + dilation * (kernel - 1) + 1
            for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        ]
        shape = [2, int(layer.in_channels), *size]  # type: ignore[arg-type]
    else:
        size, shape = [], [64, int(layer.in_features)]  # type: ignore[arg-type]
    weight: Tensor = layer.weight  # type: ignore[assignment]
    try:
        with torch.no_grad(), evaluating(layer, folded):
            x = torch.randn(shape, generator=generator, device="cpu")
            x = x.to(weight.device, weight.dtype)
            scale, offset = (t.view(-1, *[1] * len(size)) for t in (alpha, shift))
            expected = layer(x) * scale + offset
            difference = (folded(x) - expected).norm() / expected.norm()
    except Exception as error:
        raise UnfoldableError(
            f"{name} does not run on random numbers, and nobody knows what it computes "
            f"({' '.join(str(error).split())}): the BatchNorm after it cannot be folded"
        ) from error
    fine = all(p.dtype in (torch.float32, torch.float64) for p in layer.parameters())
    if not difference < (1e-4 if fine else 5e-2):
        raise UnfoldableError(
            f"the output of {name} does not follow its weight and bias linearly (an activation "
            "inside? a weight that is standardised?): the BatchNorm after it cannot be folded"
        )


# --- functions ---------------------------------------------------------------------------------


def function_before(module: fx.GraphModule, norm: str) -> fx.Node | None:
    """Find the convolution or linear function that the BatchNorm at path `norm` follows."""
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == norm]
    if len(calls) != 1 or len(calls[0].all_input_nodes) != 1:
        return None
    found = calls[0].all_input_nodes[0]
    is_function = found.op == "call_function" and len(found.users) == 1
    return found if is_function and operation_name(found) in AFFINE_FUNCTIONS else None


def absorb_into_function(
    module: fx.GraphModule, node: fx.Node, alpha: Tensor, shift: Tensor
) -> None:
    """Change the parameters that a function is called with, so that alpha and shift are absorbed.

    A bias that is missing, or that serves others too, becomes a new parameter beside the weight.

    Args:
        module: changed in place.
        node: of `function_before`.
        alpha, shift: (C,).

    Raises UnfoldableError, with nothing changed, where the weight is no parameter of that call
    alone.
    """
    target, weight = _parameter(module, node, "weight")
    if weight is None or _others_use(module, weight, node):
        raise UnfoldableError(
            "{layer} is a function: its weight is no parameter that serves it alone, and cannot "
            "absorb the BatchNorm"
        )
    bias_target, bias = _parameter(module, node, "bias")
    transposed = "transpose" in operation_name(node)
    groups = _argument(node, "groups") if transposed else 1
    if (bias is None and _argument(node, "bias") is not None) or isinstance(groups, fx.Node):
        raise UnfoldableError(
            "{layer} is a function: its bias or groups are computed, and no parameter can absorb "
            "the BatchNorm"
        )
    count = 1 if groups is None else groups
    new_weight, new_bias = _scaled_by(
        alpha,
        shift,
        weight,
        bias,
        channels=weight.shape[1] * count if transposed else len(weight),
        transposed=transposed,
        groups=count,
    )
    _set_parameter(module, target, new_weight)
    if new_bias is None:
        return
    if bias is None or _others_use(module, bias, node):
        bias_target = _free_name(module, target)
        with module.graph.inserting_before(node):
            _set_argument(node, "bias", module.graph.create_node("get_attr", bias_target))
    _set_parameter(module, bias_target, new_bias)
    module.recompile()


def _argument(node: fx.Node, name: str) -> Any:
    aten = name == "groups" and len(node.args) > GROUPS_OF_ATEN
    place = GROUPS_OF_ATEN if aten else PLACES[name]
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    if len(node.args) > PLACES[name]:
        node.update_arg(PLACES[name], value)
    else:
        node.update_kwarg(name, value)


def _parameter(module: nn.Module, node: fx.Node, name: str) -> tuple[str, nn.Parameter | None]:
    """Find the parameter that a function is called with: its path, and itself; None for others."""
    value = _argument(node, name)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        target = str(value.target)
        return target, dict(module.named_parameters(remove_duplicate=False)).get(target)
    return "", None


def _others_use(module: fx.GraphModule, parameter: nn.Parameter, node: fx.Node) -> bool:
    """Tell whether a graph uses a parameter other than once, in the call of `node`."""
    places = dict(module.named_parameters(remove_duplicate=False))
    names = {name for name, other in places.items() if other is parameter}
    for other in module.graph.nodes:
        if other.op == "get_attr" and other.target in names and set(other.users) - {node}:
            return True
        if other.op == "call_module":
            held = module.get_submodule(str(other.target)).parameters()
            if any(p is parameter for p in held):
                return True
    return [a.target in names for a in node.all_input_nodes].count(True) > 1


def _set_parameter(module: nn.Module, target: str, new: nn.Parameter) -> None:
    owner, _, name = target.rpartition(".")
    module.get_submodule(owner)._parameters[name] = new


def _free_name(module: nn.Module, weight: str) -> str:
    """Choose the path of a new bias beside the weight at path `weight`."""
    owner, _, name = weight.rpartition(".")
    name = "bias" if name == "weight" else f"{name}_bias"
    while hasattr(module.get_submodule(owner), name):
        name += "_"
    return f"{owner}.{name}".lstrip(".")
