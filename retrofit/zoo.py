"""A model by name, by import path, or from a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from retrofit.errors import RetrofitError


def build(spec: str) -> nn.Module:
    """The model that `spec` names.

    Args:
        spec: a torchvision name (`vgg16`), `package.module:factory` or `path/to/file.py:factory`;
            the factory is called without arguments. This imports and runs that code.

    Raises:
        RetrofitError: no such model, module, file or factory, or no nn.Module came of it.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        return torchvision_model(spec)
    module = _from_file(Path(source)) if source.endswith(".py") else _from_import(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetrofitError(f"{source} has no factory {name!r}{_nearest(name, callables)}")
    try:
        model = factory()
    except Exception as error:
        raise RetrofitError(f"{spec}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise RetrofitError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def torchvision_model(name: str) -> nn.Module:
    """A torchvision model with fresh weights; RetrofitError for an unknown name."""
    if name not in torchvision.models.list_models():
        raise RetrofitError(
            f"torchvision has no model {name!r}{_nearest(name, torchvision.models.list_models())}; "
            "other models are given as package.module:factory or path/to/file.py:factory"
        )
    builder = torchvision.models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # they warn of a slow start otherwise
        options["init_weights"] = False
    model: nn.Module = builder(**options)
    return model


def pretrained(name: str, weights: str) -> WeightsEnum:
    """torchvision's weights entry, for its `get_state_dict()` and `transforms()`.

    Raises RetrofitError when `name` is no torchvision model or has no such weights.
    """
    if name not in torchvision.models.list_models():
        raise RetrofitError(
            f"{weights!r} is no file, and {name} no torchvision model that has weights by name"
        )
    entries = torchvision.models.get_model_weights(name)
    names = ["DEFAULT", *(entry.name for entry in entries)]
    if weights not in names:
        raise RetrofitError(
            f"{weights!r} is no file and no weights of {name}; those are {', '.join(names)}"
        )
    entry: WeightsEnum = entries[weights]
    return entry


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RetrofitError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RetrofitError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    sys.path.insert(
        0, str(path.parent.resolve())
    )  # as for a script: its neighbours can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RetrofitError(
            f"{path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _from_import(name: str) -> ModuleType:
    if "" not in sys.path:  # as python -m does: modules beside the user come first
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RetrofitError(
            f"{name} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
