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

# What decides nothing in eval mode, or nothing that the shapes of tensors do not tell.
PASSED_OVER = ("training", "inplace", "momentum", "p", "num_classes")


def difference(model: nn.Module, told: Provenance) -> str:
    """Say where `load` would build another network than `model`; "" where it would not.

    It is "" also where the name is not one of torchvision's, of which `load` builds nothing.
    """
    plain = _named(told)
    if plain is None:
        return ""
    try:
        expected = _converted(plain, told)
    except RetrofitError as error:
        return str(error)
    return _of_tensors(model, expected) or _of_modules(model, expected)


def _of_tensors(model: nn.Module, expected: nn.Module) -> str:
    ours, theirs = _shapes(model), _shapes(expected)
    for key in {**theirs, **ours}:
        if key not in ours:
            return f"{key} is not in this one"
        if key not in theirs:
            return f"{key} is in this one alone"
        if ours[key] != theirs[key]:
            return f"{key} has shape {ours[key]} in this one, and would have {theirs[key]}"
    return ""


def _of_modules(model: nn.Module, expected: nn.Module) -> str:
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


def _named(told: Provenance) -> nn.Module | None:
    """Build the model of the name, without its numbers; None where torchvision has none.

    Raises RetrofitError for weights that it does not have.
    """
    if told.model is None or not is_torchvision(told.model):
        return None
    call = told.model, told.model_args or {}, told.weights
    try:
        with torch.device("meta"):
            return torchvision_model(*call)
    except (NotImplementedError, RetrofitError):  # RegNet asks for values of tensors
        try:
            return torchvision_model(*call)
        except RetrofitError:
            if told.weights is not None:
                raise
            return None


def _converted(built: nn.Module, told: Provenance) -> nn.Module:
    """Put BatchNorms where the file says."""
    if (record := told.record) is None:
        return built
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        return inserted(built, record.plan, eps=record.eps, momentum=record.momentum)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def _kind(module: nn.Module) -> str:
    return type(module).__qualname__


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the constructor has kept that is a plain value."""
    for name, value in vars(module).items():
        plain = value if isinstance(value, tuple) else (value,)
        of_plain = all(isinstance(v, (bool, int, float, str, type(None))) for v in plain)
        if of_plain and not name.startswith("_") and name not in PASSED_OVER:
            yield name, value
