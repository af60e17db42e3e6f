"""Fold one model of a zoo, restore it into its class, and compare both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from network_checks import (
    SAYS_NOTHING,
    call,
    described,
    difference,
    filled,
    informative,
    train,
)
from restored_zoo_tables import Restored
from torch import Tensor, nn
from zoo_checks import versions
from zoo_models import batch, build, family, fresh, size_for

import retrofit
from retrofit.surgery.affine_map import batchnorms
from retrofit.surgery.folding import folded as fold_and_list


def blank(name: str) -> Restored:
    return Restored(name, family(name), versions())


def check(name: str, most: float) -> Restored:
    """Build, fold, restore and compare one model, of no more than `most` parameters."""
    return filled(blank(name), partial(examine, most=most))


def examine(result: Restored, most: float) -> None:
    """Restore from one batch, compare on another; all that is found goes into `result`."""
    count(result, most)
    if result.skipped:
        return
    model = build(result.name)
    size = size_for(model, result.name)
    first, second = batch(result.name, size, 1), batch(result.name, size, 2)
    train(model, first)
    result.input = described(first)

    folding = fold_and_list(model, example=first)  # retrofit.fold and retrofit.unfoldable in one
    folded, left = folding.model, folding.left
    for path, reason in left.items():
        result.kept.setdefault(reason, []).append(path)
    with torch.no_grad():
        before, expected = call(model, second), call(folded, second)
    if not informative(before):
        raise ValueError(SAYS_NOTHING)
    result.folding = difference(before, expected)
    if len(left) == result.batchnorms:
        result.skipped = "folding reaches none of its BatchNorms"
        return
    del model  # the largest would not fit so often

    torch.manual_seed(1)
    architecture = fresh(result.name)
    start = time.perf_counter()
    restored = retrofit.restore(architecture, folded.state_dict(), [first], progress=False)
    result.seconds = round(time.perf_counter() - start, 1)
    restoration = retrofit.restoration_of(restored)
    assert restoration is not None
    result.restored = len(restoration.seats)
    if len(restoration.kept) != len(left):
        result.error = f"{len(restoration.kept)} BatchNorms were kept"

    result.difference = stock_difference(partial(fresh, result.name), restored, second, expected)


def count(result: Restored, most: float) -> None:
    """Count parameters and BatchNorms; note why the model is not restored, if it is not."""
    try:
        with torch.device("meta"):  # costs neither time nor memory
            model = fresh(result.name)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        model = fresh(result.name)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    result.batchnorms = len(batchnorms(model))
    if not result.batchnorms:
        result.skipped = "no BatchNorm"
    elif result.parameters > most:
        result.skipped = f"more than {most / 1e6:.0f} million parameters"


def stock_difference(
    make: Callable[[], nn.Module], restored: nn.Module, inputs: Any, expected: Sequence[Tensor]
) -> float:
    """Compare a stock model that loads the restored weights with the folded network."""
    torch.manual_seed(2)
    stock = make().eval()
    stock.load_state_dict(restored.state_dict(), strict=True)
    with torch.no_grad():
        return difference(expected, call(stock, inputs))
