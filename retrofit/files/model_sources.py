"""A model by name, by import path, or from a file: with its weights, and with its transforms."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torchvision
from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.fitting import fits, fitted, load_weights
from retrofit.files.onnx_files import is_onnx, picture_size
from retrofit.files.onnx_modules import module_from_onnx
from retrofit.files.shards import INDEX
from retrofit.files.suffixes import KINDS, READ
from retrofit.files.weights import WeightsFile, open_weights
from retrofit.pictures.preprocessing import DETECTION_PRESET, PRESET, Transform, Transforms
from retrofit.running.input_channels import input_dtype
from retrofit.running.signatures import takes_lists


def build(spec: str) -> nn.Module:
    """Build the model that `spec` names.

    Args:
        spec: a torchvision name (`vgg16`); `timm:NAME`, with or without the tag of weights
            (`timm:vgg11.tv_in1k`); `timm-reparameterized:NAME` for the same after
            `timm.utils.reparameterize_model`; `package.module:factory` or
            `path/to/file.py:factory`, where the factory is called without arguments, which imports
            and runs that code; `path/to/file.onnx`, of which onnx2torch makes a module.

    Raises:
        RetrofitError: no such model, module, file or factory, or no nn.Module came of it.
    """
    return _source(spec).build()


def trained(
    spec: str,
    weights: str | None,
    weights_key: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the model that `spec` names, with its weights, in eval mode.

    Args:
        spec: as for `build`.
        weights: a file, index or folder as for `open_weights`, or the name of torchvision weights
            (`DEFAULT`, `IMAGENET1K_V1`); `DEFAULT` for timm, whose names may carry a tag. None if
            the user's factory brings its own. For a reparameterised model a file may have the keys
            of the model as trained or those after merging.
        weights_key: where they are in the file, if it holds several state dicts.
        dtype: the precision of the model; by default the one that it is built in.

    Raises:
        RetrofitError: as `build`; no such weights, or they do not fit or cannot be downloaded.
    """
    source = _source(spec)
    file = weights is not None and weights not in source.names and _is_path(weights)
    if weights_key is not None and not file:
        raise RetrofitError(
            f"--weights-key {weights_key} is a place in a file: give that with --weights"
        )
    if weights is None:
        if source.random:
            raise RetrofitError(
                f"{spec} without weights is random: give --weights DEFAULT or a file"
            )
        model = source.build()
    elif file:
        model = source.loaded(open_weights(Path(weights)), weights_key, dtype)
    else:
        model = source.pretrained(weights)
    return _in(dtype, model).eval()


def _in(dtype: torch.dtype | None, model: nn.Module) -> nn.Module:
    """Cast a model, but for one of that precision: what it has in others is meant like that."""
    return model if dtype in (None, input_dtype(model)) else model.to(dtype)


def _is_path(weights: str) -> bool:
    """Tell whether this means a file or folder, rather than weights by name."""
    path = Path(weights)
    named = path.suffix in (*READ, ".tar") or weights.endswith(INDEX)  # .pth.tar, of old examples
    return named or len(path.parts) > 1 or path.exists()


def transforms(spec: str, model: nn.Module, weights: str | None = None) -> Transforms:
    """Find what makes the transform from a picture to the input of that model.

    That of torchvision's weights, or of its default weights where those are a file's; timm's data
    config; for other code torchvision's preset for classification, or for detection if the model
    takes lists of pictures.
    """
    return _source(spec).transforms(model, weights)


def torchvision_model(name: str) -> nn.Module:
    """Build a torchvision model with fresh weights; RetrofitError for an unknown name."""
    return _Torchvision(name).build()


def _source(spec: str) -> _Source:
    if is_onnx(spec):
        return _Onnx(spec)
    prefix, _, name = spec.partition(":")
    if not name:
        return _Torchvision(spec)
    if prefix in (timm := {"timm": _Timm, "timm-reparameterized": _Reparameterized}):
        return timm[prefix](name)
    return _Code(spec)


class _Source(ABC):
    """Where models come from.

    Attributes:
        random: not trained before weights are loaded.
        names: of the weights that can be loaded by name.
    """

    random = True
    names: Sequence[str] = ()

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the model, with fresh weights where it has no others."""

    @abstractmethod
    def pretrained(self, weights: str) -> nn.Module:
        """Build the model with the weights of that name."""

    def loaded(
        self, file: WeightsFile, key: str | None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Build the model with the weights of a file, those under a key of it, in a precision."""
        model = _in(dtype, self.build())
        load_weights(model, fitted(file, model, key), str(file.path))
        return model

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        """Find the transforms for the model; `weights` may name some that bring their own."""
        return DETECTION_PRESET if takes_lists(model) else PRESET


class _Torchvision(_Source):
    def __init__(self, name: str) -> None:
        known = torchvision.models.list_models()
        if name not in known:
            raise RetrofitError(
                f"torchvision has no model {name!r}{_nearest(name, known)}; other models are given "
                "as timm:NAME, package.module:factory or path/to/file.py:factory"
            )
        self.name = name
        self.entries = torchvision.models.get_model_weights(name)
        self.names = list(self.entries.__members__)

    def build(self) -> nn.Module:
        builder = torchvision.models.get_model_builder(self.name)
        known = inspect.signature(builder).parameters
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in known:
            options["weights_backbone"] = None
        if self.name in ("googlenet", "inception_v3"):  # they warn of a slow start otherwise
            options["init_weights"] = False
        model: nn.Module = builder(**options)
        return model

    def pretrained(self, weights: str) -> nn.Module:
        if weights not in self.names:
            raise RetrofitError(
                f"{weights!r} is no file and no weights of {self.name}; those are "
                f"{', '.join(self.names)}"
            )
        entry = self.entries[weights]
        try:
            tensors = entry.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise RetrofitError(f"{entry} cannot be downloaded: {error}") from error
        model = self.build()
        load_weights(model, tensors, str(entry))
        return model

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        entry = weights if weights in self.entries.__members__ else "DEFAULT"
        made: Transforms = self.entries[entry].transforms
        return made


class _Timm(_Source):
    names = ("DEFAULT",)

    def __init__(self, name: str) -> None:
        try:
            import timm.data  # noqa: PLC0415 - an extra, and slow to import
            import timm.utils  # noqa: PLC0415
        except ImportError as error:
            raise RetrofitError(f"timm is needed for its model {name}: pip install timm") from error
        # Names that it lists, and no others: it would take those of hubs and folders too.
        known = [*timm.list_models(), *timm.list_models(include_tags=True)]
        if name not in known:
            raise RetrofitError(f"timm has no model {name!r}{_nearest(name, known)}")
        self.name = name
        self.timm: Any = timm

    def build(self) -> nn.Module:
        model: nn.Module = self.timm.create_model(self.name)
        return model

    def pretrained(self, weights: str) -> nn.Module:
        if weights != "DEFAULT":
            raise RetrofitError(
                f"{weights!r} is no file: timm's weights are DEFAULT, or named by a tag as in "
                f"timm:vgg11.tv_in1k"
            )
        if self.name not in (
            *self.timm.list_models(pretrained=True, include_tags=False),
            *self.timm.list_models(pretrained=True),
        ):
            raise RetrofitError(f"timm has no weights for {self.name}: give a file")
        try:
            with _quiet("huggingface_hub"):  # it tells of every retry
                model: nn.Module = self.timm.create_model(self.name, pretrained=True)
        except Exception as error:  # the hub's client raises errors of many kinds
            reason = " ".join(str(error).split())
            raise RetrofitError(
                f"the weights of timm's {self.name} cannot be loaded: {type(error).__name__}: "
                f"{reason}"
            ) from error
        return model

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        config = self.timm.data.resolve_model_data_config(model)

        def made(
            *,
            resize_size: int | None = None,
            crop_size: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
        ) -> Transform:
            changed = {**config}
            if crop_size is not None:
                changed["input_size"] = (3, crop_size, crop_size)
            if resize_size is not None:  # timm resizes to the crop / crop_pct, rounded down
                changed["crop_pct"] = min(changed["input_size"][1:]) / (resize_size + 0.5)
            changed.update({k: v for k, v in (("mean", mean), ("std", std)) if v is not None})
            transform: Transform = self.timm.data.create_transform(**changed, is_training=False)
            return transform

        return made


class _Reparameterized(_Timm):
    """BatchNorm and parallel branches merged into single convolutions."""

    def build(self) -> nn.Module:
        return self._merged(super().build())

    def loaded(
        self, file: WeightsFile, key: str | None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        plain = _in(dtype, super().build())
        merged = self._merged(plain)
        # The file is of the one that shares more keys with it, and is judged by that.
        near = min((plain, merged), key=lambda m: fits(file, m.state_dict(), key)[0].wrong)
        load_weights(near, fitted(file, near, key), str(file.path))
        return self._merged(plain) if near is plain else merged

    def pretrained(self, weights: str) -> nn.Module:
        return self._merged(super().pretrained(weights))

    def _merged(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = self.timm.utils.reparameterize_model(model)
        if merged.state_dict().keys() == model.state_dict().keys():
            raise RetrofitError(
                f"{self.name} has nothing to reparameterise: name it timm:{self.name}"
            )
        return merged


class _Code(_Source):
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
            raise RetrofitError(f"{source} has no factory {name!r}{_nearest(name, callables)}")
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise RetrofitError(f"{self.spec}() failed: {_said(error)}") from error
        if not isinstance(model, nn.Module):
            raise RetrofitError(f"{self.spec} returned a {type(model).__name__}, not an nn.Module")
        return model

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(
            f"{weights!r} is no {KINDS} file, and {self.spec} is no model that has weights by name"
        )


class _Onnx(_Source):
    """A file that brings its own weights."""

    random = False

    def __init__(self, spec: str) -> None:
        self.path = Path(spec)

    def build(self) -> nn.Module:
        return module_from_onnx(self.path)

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


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Let a logger log nothing but errors."""
    of = logging.getLogger(logger)
    level = of.level
    of.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of.setLevel(level)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
