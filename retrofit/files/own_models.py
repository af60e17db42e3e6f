"""Models of the user's own code, and of ONNX files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.model_source import Source, nearest
from retrofit.files.onnx_files import picture_size
from retrofit.files.onnx_modules import module_from_onnx
from retrofit.files.suffixes import KINDS
from retrofit.pictures.preprocessing import PRESET, Transform, Transforms


class Code(Source):
    """A user's factory, which may load weights by itself."""

    random = False

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def build(self) -> nn.Module:
        source, _, name = self.spec.rpartition(":")
        module = _from_file(Path(source)) if source.endswith(".py") else _from_import(source)
        factory = getattr(module, name, None)
        if not callable(factory):
            callables = [
                n for n, v in vars(module).items() if callable(v) and not n.startswith("_")
            ]
            raise RetrofitError(f"{source} has no factory {name!r}{nearest(name, callables)}")
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise RetrofitError(f"{self.spec}() failed: {_said(error)}") from error
        if not isinstance(model, nn.Module):
            raise RetrofitError(f"{self.spec} returned a {type(model).__name__}, not an nn.Module")
        return model

    @property
    def code(self) -> str:
        return f"{self.spec.rpartition(':')[2]}()"

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(
            f"{weights!r} is no {KINDS} file, and {self.spec} is no model that has weights by name"
        )


class Onnx(Source):
    """A file that brings its own weights."""

    random = False

    def __init__(self, spec: str) -> None:
        self.path = Path(spec)

    def build(self) -> nn.Module:
        return module_from_onnx(self.path)

    @property
    def code(self) -> str:
        return f"retrofit.module_from_onnx({str(self.path)!r})"

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(f"{self.path} has its own weights: leave out --weights {weights}")

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:
        size = picture_size(self.path)
        if size is None:
            return super().transforms(model, weights)
        usual = {"crop_size": max(size), "resize_size": round(max(size) * 8 / 7)}  # as 224 of 256

        def made(
            *,
            resize_size: int | None = None,
            crop_size: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
        ) -> Transform:
            given = {"resize_size": resize_size, "crop_size": crop_size, "mean": mean, "std": std}
            changes = {name: value for name, value in given.items() if value is not None}
            transform: Any = PRESET(**{**usual, **changes})
            if crop_size is None:  # which its argument could make a square of, only
                transform.crop_size = list(size)
            return cast("Transform", transform)

        return made


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RetrofitError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: its neighbours are found
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RetrofitError(f"{path} cannot be imported: {_said(error)}") from error
    return module


def _from_import(name: str) -> ModuleType:
    if "" not in sys.path:  # as python -m does: modules beside the user come first
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RetrofitError(f"{name} cannot be imported: {_said(error)}") from error


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # a script, which does its work when it is imported
        return "it ends the process: put what a script does under if __name__ == '__main__'"
    return f"{type(error).__name__}: {error}"
