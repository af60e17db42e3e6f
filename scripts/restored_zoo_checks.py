"""Fold one model of a zoo, restore it into its class, and compare both."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from network_checks import call, described, difference, informative, one_line
from restored_zoo_tables import Restored
from torch import Tensor, nn
from zoo_checks import versions
from zoo_models import batch, build, family, fresh, size_for

import retrofit
from retrofit.surgery.affine_map import batchnorms
from retrofit.surgery.folding import folded as fold_and_list

LEAST = 1e-3  # the scale of an input, which may be zero where random weights switch a branch off


def blank(name: str) -> Restored:
    return Restored(name, family(name), versions())


def outlook(name: str, most: float) -> Restored:
    """Count the parameters; say why the model is not restored, if it is not.

    Args:
        most: as many parameters are restored.
    """
    result = blank(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how long a start takes, which is none here
        try:
            with torch.device("meta"):  # costs neither time nor memory
                model = fresh(name)
        except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
            model = fresh(name)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    result.batchnorms = len(batchnorms(model))
    if not result.batchnorms:
        result.skipped = "no BatchNorm"
    elif result.parameters > most:
        result.skipped = f"more than {most / 1e6:.0f} million parameters"
    return result


def check(name: str, most: float) -> Restored:
    """Build, fold, restore and compare one model, of no more than `most` parameters."""
    result = blank(name)
    try:
        result = outlook(name, most)
        if result.skipped:
            return result
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two pictures are few, and BatchNorms stay: we count
            examine(result)
    except Exception as error:  # noqa: BLE001 - a result like any other
        result.error = one_line(error)
    return result


def examine(result: Restored) -> None:
    """Restore from one batch, compare on another; all that is found goes into `result`."""
    model = build(result.name)
    size = size_for(model, result.name)
    first, second = batch(result.name, size, 1), batch(result.name, size, 2)
    train(model, first)
    result.parameters = sum(parameter.numel() for parameter in model.parameters())
    result.batchnorms = len(batchnorms(model))
    result.input = described(first)

    folding = fold_and_list(model, example=first)  # retrofit.fold and retrofit.unfoldable in one
    folded, left = folding.model, folding.left
    for path, reason in left.items():
        result.kept.setdefault(reason, []).append(path)
    with torch.no_grad():
        before, expected = call(model, second), call(folded, second)
    if not informative(before):
        raise ValueError("the outputs are constant or not finite: comparing them says nothing")
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

    torch.manual_seed(2)
    stock = fresh(result.name).eval()
    stock.load_state_dict(restored.state_dict(), strict=True)
    with torch.no_grad():
        result.difference = difference(expected, call(stock, second))


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

    hooks = [norm.register_forward_pre_hook(learn) for norm in batchnorms(model).values()]
    with torch.no_grad():
        call(model, inputs)
    for hook in hooks:
        hook.remove()
