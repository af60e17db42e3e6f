"""Fold a network by each of four folders, restore it, and compare both, in train mode too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torchvision
from fold_tables import FoldedBy
from network_checks import (
    SAYS_NOTHING,
    call,
    difference,
    filled,
    informative,
    one_line,
    roughen,
    train,
)
from restored_zoo_checks import stock_difference
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils._pytree import tree_map_only
from torchvision.ops import StochasticDepth
from zoo_checks import versions
from zoo_models import batch, family, fresh

import retrofit
from retrofit.surgery.affine_map import batchnorms

# By name, or by family.
SIZES = {
    "inception_v3": 128,
    "torchvision, detection": 192,
    "torchvision, video": 32,
}
COUNTS = {"torchvision, detection": 2, "torchvision, video": 4}
NETWORKS = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2"),
    *("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf"),
    *("densenet121", "googlenet", "inception_v3", "shufflenet_v2_x1_0", "mnasnet1_0", "r3d_18"),
    *("deeplabv3_resnet50", "fcn_resnet50", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("maskrcnn_resnet50_fpn.backbone", "maskrcnn_resnet50_fpn_v2.backbone"),
    *("timm:resnet50", "timm:mobilenetv2_100", "timm:efficientnet_b0", "timm:regnety_002"),
    *("timm:convmixer_768_32", "timm:dla34", "timm:res2net50_26w_4s", "timm:hrnet_w18_small"),
    "timm:ghostnet_100",
)
NEARLY = 1e-4  # a folded network that is farther from what it was computes something else


def by_fx(model: nn.Module, _: Any) -> nn.Module:
    folded: nn.Module = fuse(model)
    return folded


def by_ao(model: nn.Module, inputs: Any) -> nn.Module:
    pairs = [list(pair) for pair in pairs_of(model, inputs)]
    if not pairs:  # which it refuses without saying so
        return model
    folded: nn.Module = torch.ao.quantization.fuse_modules(model, pairs)
    return folded


def by_hand(model: nn.Module, inputs: Any) -> nn.Module:
    folded = copy.deepcopy(model)
    for path, norm_path in pairs_of(model, inputs):
        conv: Any = folded.get_submodule(path)
        norm: Any = folded.get_submodule(norm_path)
        folded.set_submodule(path, fuse_conv_bn_eval(conv, norm))
        timms = hasattr(norm, "drop")  # BatchNormAct2d, of whose activation nothing is folded
        rest = nn.Sequential(norm.drop, norm.act) if timms else nn.Identity()
        folded.set_submodule(norm_path, rest)
    return folded


def by_retrofit(model: nn.Module, inputs: Any) -> nn.Module:
    return retrofit.fold(model, example=inputs)


FOLDERS: Mapping[str, Callable[[nn.Module, Any], nn.Module]] = {
    "torch.fx": by_fx,
    "torch.ao": by_ao,
    "torch.nn.utils": by_hand,
    "retrofit": by_retrofit,
}
FOLDED = [f"{name}, {folder}" for name in NETWORKS for folder in FOLDERS]


def pairs_of(model: nn.Module, inputs: Any) -> list[tuple[str, str]]:
    """Find, in a run, the convolutions whose output goes into one BatchNorm, which takes no other.

    Whether something else reads it, too, is not looked for: the folded network is compared.
    """
    made_by: dict[int, str] = {}
    outputs: list[Tensor] = []  # kept, or others would get their ids
    found: dict[str, set[str]] = {}
    sources: dict[str, set[str]] = {}

    def gave(path: str) -> Callable[..., None]:
        def look(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.append(output)
            made_by[id(output)] = path

        return look

    def took(path: str) -> Callable[..., None]:
        def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            source = made_by.get(id(arguments[0]), "")
            found.setdefault(source, set()).add(path)
            sources.setdefault(path, set()).add(source)

        return look

    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd):
            hooks.append(module.register_forward_hook(gave(path)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(took(path)))
    with torch.no_grad():
        call(model, inputs)
    for hook in hooks:
        hook.remove()
    return [
        (conv, norm)
        for conv, norms in found.items()
        for norm in norms
        if conv and len(norms) == len(sources[norm]) == 1
    ]


# --- one network, one folder ---------------------------------------------------------------------


def blank_fold(network: str) -> FoldedBy:
    return FoldedBy(network, versions())


def check_fold(network: str) -> FoldedBy:
    """Fold one network by one folder, given as "resnet18, torch.fx", and restore it."""
    return filled(blank_fold(network), examine)


def examine(result: FoldedBy) -> None:
    name, _, folder = result.name.partition(", ")
    torch.manual_seed(0)
    model = made(name).eval()
    roughen(model)
    first, second = (inputs_of(name, seed) for seed in (1, 2))
    train(model, first)
    norms = batchnorms(model)
    result.batchnorms = len(norms)
    try:
        folded = FOLDERS[folder](model, first)
    except Exception as error:  # noqa: BLE001 - that of somebody else's code
        result.cannot = one_line(error)
        return
    names = folded.state_dict()  # torch.fx may write a BatchNorm that stays as a function
    result.folded = sum(f"{path}.running_var" not in names for path in norms)
    with torch.no_grad():
        before, expected = call(model, second), call(folded, second)
    if not informative(before):
        raise ValueError(SAYS_NOTHING)
    if not result.folded:
        result.cannot = f"it folds none of {len(norms)} BatchNorms"
    elif (off := difference(before, expected)) > NEARLY:
        result.cannot = f"what it makes computes something else, by {off:.1e} of an output"
    if result.cannot:
        return
    restored = restore(name, folded, first)
    result.module = stock_difference(partial(made, name), restored, second, expected)
    weights = restore(name, folded.state_dict(), first)
    result.state_dict = stock_difference(partial(made, name), weights, second, expected)
    result.training, result.gradients = in_train_mode(restored, first)


def made(name: str) -> nn.Module:
    """Build a network with the weights of its own initialisation."""
    name, _, part = name.partition(".")
    if name in ("googlenet", "inception_v3"):  # folders see nothing of the auxiliary classifiers
        return torchvision.models.get_model(name, aux_logits=False, init_weights=False)  # type: ignore[no-any-return]
    return fresh(name).get_submodule(part)


def inputs_of(name: str, seed: int) -> Any:
    """Draw eight pictures, four clips, or a detector's two pictures."""
    if "." in name:  # a part of a detector takes pictures in a tensor
        return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    size = SIZES.get(name, SIZES.get(family(name), 64))
    return batch(name, size, seed, COUNTS.get(family(name), 8))


def restore(name: str, folded: nn.Module | Mapping[str, Tensor], inputs: Any) -> nn.Module:
    torch.manual_seed(1)
    return retrofit.restore(made(name), folded, [inputs], progress=False)


def in_train_mode(restored: nn.Module, inputs: Any) -> tuple[float, bool]:
    """Compare with float64 in train mode, and tell whether every parameter gets a gradient."""
    if isinstance(inputs, list):  # a detector's, which trains on targets
        box = torch.tensor([[20.0, 20.0, 100.0, 120.0]])
        target = {"boxes": box, "labels": torch.tensor([1])}
        inputs = (inputs, [target] * len(inputs))
    model, wide = copy.deepcopy(restored).train(), copy.deepcopy(restored).double().train()
    for module in (*model.modules(), *wide.modules()):
        if "drop" in type(module).__name__.lower() or isinstance(module, StochasticDepth):
            module.eval()  # it draws other numbers in float64
        if "drop_rate" in vars(module):  # of F.dropout, in timm
            vars(module)["drop_rate"] = 0.0
    outputs = call(model, inputs)
    doubled = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with torch.no_grad():
        off = difference(call(wide, doubled), outputs)
    sum(output.square().mean() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in model.parameters()]
    return off, all(g is not None and bool(g.isfinite().all()) for g in gradients)
