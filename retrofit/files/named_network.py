"""Whether the network of a name is the one that has it: what `load` would build, and what is saved.

A state dict does not tell a ReLU from a SiLU, nor that Inception transforms its input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from retrofit.conversion import inserted
from retrofit.errors import RetrofitError
from retrofit.files.model_sources import is_torchvision, torchvision_model
from retrofit.files.provenance import Provenance

# What decides nothing in eval mode.
OF_TRAINING = ("training", "inplace", "momentum", "p")


def difference(model: nn.Module, told: Provenance) -> str:
    """Say where `load` would build another network than `model`; "" where it would not.

    It is "" also where the name is not one of torchvision's, of which `load` builds nothing, and
    where the tensors do not fit, of which it says so.
    """
    try:
        expected = _built(told)
    except RetrofitError:
        return ""
    if expected is None or expected.state_dict().keys() != model.state_dict().keys():
        return ""
    ours = dict(model.named_modules())
    for path, module in expected.named_modules():
        where = path or "the network"
        if path not in ours:
            return f"{where}, a {_kind(module)}, is not in this one"
        if (theirs := _kind(module)) != (kind := _kind(ours[path])):
            return f"{where} is a {kind} in this one, and would be a {theirs}"
        own = dict(_settings(ours[path]))
        for name, value in _settings(module):
            if name in own and own[name] != value:
                return f"{where} has {name}={own[name]} in this one, and would have {value}"
    return ""


def _built(told: Provenance) -> nn.Module | None:
    """Build what `load` would, without its numbers; None where that takes a model from outside."""
    if told.model is None or not is_torchvision(told.model):
        return None
    call = told.model, told.model_args or {}, told.weights
    try:
        with torch.device("meta"):
            built = torchvision_model(*call)
    except NotImplementedError:  # RegNet asks for values of tensors
        built = torchvision_model(*call)
    if (record := told.record) is None:
        return built
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        return inserted(built, record.plan, eps=record.eps, momentum=record.momentum)


def _kind(module: nn.Module) -> str:
    return type(module).__qualname__


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the constructor has kept that is a plain value."""
    for name, value in vars(module).items():
        plain = value if isinstance(value, tuple) else (value,)
        of_plain = all(isinstance(v, (bool, int, float, str, type(None))) for v in plain)
        if of_plain and not name.startswith("_") and name not in OF_TRAINING:
            yield name, value
