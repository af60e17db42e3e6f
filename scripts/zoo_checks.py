"""Convert one model of a zoo, compare it with the original, and fold it back."""

from __future__ import annotations

import time

import timm
import torch
import torchvision
from network_checks import (
    batchnorms,
    compared,
    convolutions,
    described,
    digests,
    filled,
    left_out,
)
from zoo_models import batch, build, family, size_for
from zoo_tables import Result

import retrofit


def check(name: str) -> Result:
    """Build, convert, compare and fold back one model."""
    return filled(Result(name, family(name), versions()), examine)


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
    result.left_out = left_out(plan)
    result.inserted = batchnorms(converted) - norms
    if result.inserted != len(plan.inserted):
        result.error = f"the plan promised {len(plan.inserted)} BatchNorms"
    if (planned := sum(site.channels > 0 for site in plan.sites)) != result.convs:  # 0: functions
        result.error = f"the plan decides on {planned} convolutions"

    result.equal, problem = compared(model, converted, second, bits)
    result.error = problem or result.error

    del model  # the largest would not fit three times
    folded = retrofit.fold(converted)
    result.folded = str(folded) == tree and [*digests(folded).items()] == [*bits.items()]
    result.seconds = round(time.perf_counter() - start, 1)


def versions() -> str:
    packages = (torch, torchvision, timm, retrofit)
    return ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
