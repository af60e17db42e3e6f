"""Convert one model of a zoo, compare it with the original, and fold it back."""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from zoo_models import batch, batchnorms, build, call, convolutions, family, one_line, size_for
from zoo_tables import NORMALISED, Result

import retrofit


def check(name: str) -> Result:
    """Build, convert, compare and fold back one model."""
    result = Result(name, family(name), versions())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(result)
    except Exception as error:  # noqa: BLE001 - a result like any other
        result.error = one_line(error)
    return result


def examine(result: Result) -> None:
    """Calibrate on one batch, compare on another, fold; all that is found goes into `result`."""
    model = build(result.name)
    start = time.perf_counter()
    size = size_for(model, result.name)
    first, second = batch(result.name, size, 1), batch(result.name, size, 2)
    bits, tree, norms = digests(model), str(model), batchnorms(model)
    result.input = described(first)
    result.convs = len(convolutions(model))

    converted = retrofit.add_batchnorm(model, [first], progress=False)
    plan = retrofit.plan_of(converted)
    assert plan is not None
    for site in plan.sites:
        if site.decision == "skip":
            reason = re.sub(f"{NORMALISED} by .*|; include=.*", "", site.reason) or NORMALISED
            result.left_out.setdefault(reason, []).append(site.path)
    result.inserted = batchnorms(converted) - norms
    if result.inserted != len(plan.inserted):
        result.error = f"the plan promised {len(plan.inserted)} BatchNorms"
    if (planned := sum(site.channels > 0 for site in plan.sites)) != result.convs:  # 0: functions
        result.error = f"the plan decides on {planned} convolutions"

    expected, actual = call(model, second), call(converted, second)
    exact = retrofit.verify(model, converted, [second]).exact
    result.equal = exact and same(expected, actual) and digests(model) == bits
    if not informative(expected):
        result.error = "the outputs are constant or not finite: comparing them says nothing"

    del model  # the largest would not fit three times
    folded = retrofit.fold(converted)
    result.folded = str(folded) == tree and [*digests(folded).items()] == [*bits.items()]
    result.seconds = round(time.perf_counter() - start, 1)


def same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Compare bit for bit, where NaN equals NaN and 0 equals -0."""
    return len(expected) == len(actual) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(expected, actual, strict=True)
    )


def informative(outputs: Sequence[Tensor]) -> bool:
    """Tell whether the outputs hold different numbers, and nothing but numbers."""
    floats = [y for y in outputs if y.is_floating_point() and y.numel()]
    finite = all(bool(y.isfinite().all()) for y in floats)
    return finite and any(bool(y.amin() < y.amax()) for y in floats)


def digests(model: nn.Module) -> dict[str, str]:
    """Digest each tensor of the state dict: there is no room for copies of the largest."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"

    return {key: digest(tensor) for key, tensor in model.state_dict().items()}


def described(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return " x ".join(map(str, inputs.shape))
    return f"{len(inputs)} of {described(inputs[0])}"


def versions() -> str:
    packages = (torch, torchvision, timm, retrofit)
    return ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
