"""Convert one network, compare it with the original, fold it back, and train it for a step."""

from __future__ import annotations

import copy
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from network_checks import (
    batchnorms,
    call,
    compared,
    described,
    digests,
    filled,
    left_out,
    roughen,
)
from real_networks_models import Network
from real_networks_tables import Result
from torch import Tensor, nn
from torch.nn.utils import parametrize

import retrofit


def versions(package: str) -> str:
    """Name the versions that count; empty if the package is not installed."""
    try:
        return f"torch {torch.__version__}, {package} {version(package)}"
    except PackageNotFoundError:
        return ""


def check(network: Network) -> Result:
    """Convert, compare, fold back and train one network."""
    result = Result(network.name, network.package, network.task, versions(network.package))
    if not result.versions:
        result.error = "not installed"
        return result
    return filled(result, partial(examine, network))


def examine(network: Network, result: Result) -> None:
    """Calibrate on one batch, compare on another; all that is found goes into `result`."""
    torch.manual_seed(0)
    model = network.build().eval()
    roughen(model)
    first, second = (network.batch(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    result.input = described(first)
    with torch.no_grad():
        call(model, second)  # some write to their own buffers or weights
    start = time.perf_counter()
    bits, tree, norms = digests(model), str(model), batchnorms(model)

    plan = retrofit.plan(model, example=first, **network.options)
    result.convs, result.left_out = len(plan.sites), left_out(plan)
    converted = retrofit.add_batchnorm(model, [first], progress=False, **network.options)
    result.inserted = batchnorms(converted) - norms
    if retrofit.plan_of(converted) != plan or result.inserted != len(plan.inserted):
        result.error = f"the plan promised {len(plan.inserted)} BatchNorms"

    result.equal, problem = compared(model, converted, second, bits)
    result.error = problem or result.error
    folded = retrofit.fold(converted)
    result.folded = restored(folded, tree) and [*digests(folded).items()] == [*bits.items()]

    train(model, converted, plan, first, result)
    result.difference = difference_when_folded(converted, second, result)
    result.seconds = round(time.perf_counter() - start, 1)


def restored(folded: nn.Module, tree: str) -> bool:
    """Tell whether the modules are those of the original; a graph has others than its model."""
    return isinstance(folded, torch.fx.GraphModule) or str(folded) == tree


def train(
    model: nn.Module, converted: nn.Module, plan: retrofit.Plan, batch: Any, result: Result
) -> None:
    """Take a step, and say whether all gradients are there that the original would have."""
    original = copy.deepcopy(model)
    step(original, batch)
    idle = [n for n, p in original.named_parameters() if p.requires_grad and p.grad is None]
    excused = {plan.key_map[name] for name in idle}
    for site in plan.inserted:
        if site.path and any(name.startswith(f"{site.path}.") for name in idle):
            excused |= {f"{site.norm}.weight", f"{site.norm}.bias"}
    step(converted, batch)
    missing = [
        name
        for name, parameter in converted.named_parameters()
        if parameter.requires_grad and name not in excused and not has_finite_gradient(parameter)
    ]
    result.trained = not missing
    if missing:
        result.error = f"no finite gradient: {', '.join(missing[:3])}"
    if frozen := sum(site.frozen for site in plan.inserted):
        result.remarks.append(f"BatchNorms frozen, as their convolutions are: {frozen}")
    if idle:
        result.remarks.append(f"parameters without a gradient, as in the original: {len(idle)}")


def step(model: nn.Module, batch: Any) -> None:
    """Take a step of SGD towards outputs of zero; leave the model in eval mode."""
    torch.manual_seed(3)  # of dropout and the like
    optimizer = torch.optim.SGD(retrofit.param_groups(model.train()), lr=1e-3)
    outputs = [y for y in call(model, batch) if y.is_floating_point() and y.requires_grad]
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    optimizer.step()
    model.eval()


def has_finite_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all())


def difference_when_folded(trained: nn.Module, batch: Any, result: Result) -> float:
    """Fold; return how far the outputs are from those before, relative to their size."""
    with torch.no_grad():
        before = call(trained, batch)
    if removed := remove_weight_norms(trained):
        result.remarks.append(f"weight norms removed before folding what was trained: {removed}")
    folded = retrofit.fold(trained)
    with torch.no_grad():
        after = call(folded, batch)
    return max(map(relative_difference, before, after))


def remove_weight_norms(model: nn.Module) -> int:
    """Replace parametrized weights by plain ones, and count them: only these can be folded."""
    removed = 0
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        elif hasattr(layer, "weight_g"):
            nn.utils.remove_weight_norm(layer)
        else:
            continue
        removed += 1
    return removed


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference, relative to the root mean square of what is expected."""
    expected, actual = expected.double(), actual.double()
    size = expected.square().mean().sqrt()
    return float((actual - expected).abs().amax() / size) if size else float(actual.abs().amax())
