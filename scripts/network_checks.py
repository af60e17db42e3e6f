"""What is looked at in a network before and after its conversion, whatever zoo it is from."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from model_processes import Checked
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from zoo_tables import NORMALISED

import retrofit
from retrofit import Plan
from retrofit.surgery import affine_map

LEAST = 1e-3  # the scale of an input, which may be zero where random weights switch a branch off
SAYS_NOTHING = "the outputs are constant or not finite: comparing them says nothing"

R = TypeVar("R", bound=Checked)


def filled(result: R, examine: Callable[[R], None]) -> R:
    """Let `examine` fill in a result, without warnings; what it raises becomes the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(result)
    except Exception as error:  # noqa: BLE001 - a result like any other
        result.error = one_line(error)
    return result


def roughen(model: nn.Module) -> None:
    """Add noise to the parameters that start out constant.

    Gates and layer scales that begin at zero would keep whole branches out of the comparison.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.amin() == parameter.amax():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def train(model: nn.Module, inputs: Any) -> None:
    """Give each BatchNorm numbers as training would have, drawn with a fixed seed.

    They are in proportion to the root mean square of its input, so that what goes on from there
    stays in range. (Were they the moments of each channel, rounding would grow from layer to layer
    as it does in no trained network.) BatchNorms that eval mode does not call are left as they are.
    """
    generator = torch.Generator().manual_seed(0)
    seen: set[nn.Module] = set()

    def learn(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if norm in seen:
            return
        seen.add(norm)
        x = arguments[0].double()
        scale, channels = x.square().mean().sqrt().clamp(min=LEAST), x.shape[1]

        def normal() -> Tensor:
            return 0.1 * torch.randn(channels, generator=generator, dtype=torch.float64)

        def factor() -> Tensor:
            return 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)

        numbers = {
            "running_mean": scale * normal(),
            "running_var": scale.square() * factor(),
            "weight": factor(),
            "bias": normal(),
        }
        for name, values in numbers.items():
            if isinstance(tensor := getattr(norm, name, None), Tensor):
                tensor.data.copy_(values)

    hooks = [
        norm.register_forward_pre_hook(learn) for norm in affine_map.batchnorms(model).values()
    ]
    with torch.no_grad():
        call(model, inputs)
    for hook in hooks:
        hook.remove()


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run the model on a tensor, a tuple of arguments or a mapping of named ones.

    Returns all tensors in the output.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Compare bit for bit, where NaN equals NaN and 0 equals -0."""
    return len(expected) == len(actual) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(expected, actual, strict=True)
    )


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Find the largest difference of an output, over the largest absolute value of that output.

    Infinite where they are of other shapes, or one is not finite.
    """
    shapes = [[tensor.shape for tensor in outputs] for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        return math.inf
    found = torch.zeros((), dtype=torch.float64)
    for a, b in zip(expected, actual, strict=True):
        if not torch.equal(a, b):
            off = (a.double() - b.double()).abs().amax() / a.double().abs().amax()
            found = torch.maximum(found, off)  # NaN, if one is
    return found.item() if found.isfinite() else math.inf


def informative(outputs: Sequence[Tensor]) -> bool:
    """Tell whether the outputs hold different numbers, and nothing but numbers."""
    floats = [y for y in outputs if y.is_floating_point() and y.numel()]
    finite = all(bool(y.isfinite().all()) for y in floats)
    return finite and any(bool(y.amin() < y.amax()) for y in floats)


def compared(
    model: nn.Module, converted: nn.Module, inputs: Any, bits: Mapping[str, str]
) -> tuple[bool, str]:
    """Tell whether both models compute the same, and why that says nothing, if so.

    The first is also compared with what it was: `bits` are its digests from before.
    """
    with torch.no_grad():
        expected, actual = call(model, inputs), call(converted, inputs)
    exact = retrofit.verify(model, converted, [inputs]).exact
    equal = exact and same(expected, actual) and digests(model) == bits
    if informative(expected):
        return equal, ""
    return equal, SAYS_NOTHING


def digests(model: nn.Module) -> dict[str, str]:
    """Digest each tensor of the state dict: there is no room for copies of the largest."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"

    return {key: digest(tensor) for key, tensor in model.state_dict().items()}


def left_out(plan: Plan) -> dict[str, list[str]]:
    """Map each reason why convolutions get no BatchNorm to the paths of these."""
    paths: dict[str, list[str]] = {}
    for site in plan.sites:
        if site.decision == "skip":
            reason = re.sub(f"{NORMALISED} by .*|; include=.*", "", site.reason) or NORMALISED
            paths.setdefault(reason, []).append(site.path)
    return paths


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _ConvNd)]


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def described(inputs: Any) -> str:
    """Write the shapes in a batch: "2 x 3 x 64 x 64"."""
    if isinstance(inputs, Tensor):
        return " x ".join(map(str, inputs.shape))
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {described(value)}" for name, value in inputs.items())
    shapes = [described(value) for value in inputs]
    return f"{len(shapes)} of {shapes[0]}" if len({*shapes}) == 1 else " and ".join(shapes)


def one_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:400]
