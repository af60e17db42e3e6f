"""A model by name, by import path, or from a file: with its weights, and with its transforms."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.library_models import Reparameterized, Timm, Ultralytics
from retrofit.files.model_args import NO_ARGS, ModelArgs
from retrofit.files.model_source import Source, in_precision
from retrofit.files.onnx_files import is_onnx
from retrofit.files.own_models import Code, Onnx
from retrofit.files.shards import INDEX
from retrofit.files.suffixes import READ, SUFFIXES
from retrofit.files.torchvision_models import Torchvision
from retrofit.files.weights import open_weights, read_provenance
from retrofit.pictures.preparation import Preparation
from retrofit.pictures.preprocessing import Transforms
from retrofit.running.signatures import takes_lists

LIBRARIES = {"timm": Timm, "timm-reparameterized": Reparameterized, "ultralytics": Ultralytics}


def build(spec: str, model_args: ModelArgs = NO_ARGS, built_for: str | None = None) -> nn.Module:
    """Build the model that `spec` names.

    Args:
        spec: a torchvision name (`vgg16`); `timm:NAME`, with or without the tag of weights
            (`timm:vgg11.tv_in1k`); `timm-reparameterized:NAME` for the same after
            `timm.utils.reparameterize_model`; `ultralytics:NAME` (`ultralytics:yolo11n`), or with
            the path of a model's YAML; `package.module:factory` or
            `path/to/file.py:factory`, which imports and runs that code; `path/to/file.onnx`, of
            which onnx2torch makes a module.
        model_args: what the function that builds it is called with, by name (`num_classes`); none
            for ultralytics and ONNX files.
        built_for: weights of torchvision's, by name, whose settings the model gets, as torchvision
            gives them with these weights (`transform_input`, a frozen backbone), but not they.

    Raises:
        RetrofitError: no such model, weights, module, file or factory, arguments that it does not
            take, or no nn.Module came of it.
    """
    return _source(spec, model_args, built_for).build()


def weights_name(spec: str, weights: str | None) -> str | None:
    """Find the full name of torchvision's weights that are given by name (`DEFAULT`), else None.

    Raises RetrofitError for a model of torchvision that does not exist.
    """
    if weights is None or not is_torchvision(spec):
        return None
    source = Torchvision(spec, NO_ARGS)
    return source.entries[weights].name if weights in source.names else None


def trained(
    spec: str,
    weights: str | None,
    weights_key: str | None = None,
    dtype: torch.dtype | None = None,
    model_args: ModelArgs = NO_ARGS,
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
        model_args: as for `build`.

    Raises:
        RetrofitError: as `build`; no such weights, weights by name for another number of
            classes, or they do not fit or cannot be downloaded.
    """
    source = _source(spec, model_args)
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
    return in_precision(dtype, model).eval()


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


def preparation_in(weights: str | None) -> Preparation | None:
    """Find how a file of weights says that pictures are prepared for them."""
    if weights is None or not _is_path(weights) or Path(weights).suffix != SUFFIXES[0]:
        return None  # others say nothing
    return read_provenance(Path(weights)).preparation


def untold(spec: str, model: nn.Module) -> list[str]:
    """List the steps of `Preparation` of which nothing tells how that model was trained.

    None for detectors, which take pictures of any size and normalise them by themselves.
    """
    return [] if takes_lists(model) else list(_source(spec).untold)


def code_of(spec: str, model_args: ModelArgs = NO_ARGS) -> str:
    """Write the Python expression that builds the model."""
    return _source(spec, model_args).code


def torchvision_model(
    name: str, model_args: ModelArgs = NO_ARGS, built_for: str | None = None
) -> nn.Module:
    """Build a torchvision model with fresh weights; RetrofitError for an unknown name."""
    return Torchvision(name, model_args, built_for).build()


def is_torchvision(spec: str) -> bool:
    """Tell whether this is the name of a model of torchvision, as far as its form tells."""
    return ":" not in spec and not is_onnx(spec)


def _source(spec: str, model_args: ModelArgs = NO_ARGS, built_for: str | None = None) -> Source:
    if is_onnx(spec):
        return Onnx(spec, model_args)
    prefix, _, name = spec.partition(":")
    if not name and Path(spec).is_file():
        raise RetrofitError(
            f"{spec} is code: name the function in it that makes the network, as in {spec}:make"
            if spec.endswith(".py")
            else f"{spec} is a file, not the name of a network: weights are given with --weights"
        )
    if not name:
        return Torchvision(spec, model_args, built_for)
    kind = LIBRARIES.get(prefix, Code)
    return kind(name if prefix in LIBRARIES else spec, model_args)
