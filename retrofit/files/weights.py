"""Tensors from a weights file of any kind, and into a model.

Nothing that is read here is ever unpickled into code.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from retrofit.errors import RetrofitError
from retrofit.files.provenance import Provenance
from retrofit.numerics.tensor_checks import is_dense

PICKLED = (".pth", ".pt")
SUFFIXES = (".safetensors", *PICKLED)
KINDS = " or ".join((", ".join(SUFFIXES[:-1]), SUFFIXES[-1]))
WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """Read the tensors of a weights file, and the provenance that `save` put there.

    Understands state dicts wrapped as {"state_dict": ...} and keys with DataParallel's "module."
    prefix. Raises RetrofitError for anything that is not a file of tensors.
    """
    if not path.is_file():
        raise RetrofitError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        tensors, provenance = _read_safetensors(path)
    elif path.suffix in PICKLED:
        tensors, provenance = _read_pickled(path), Provenance()
    else:
        raise RetrofitError(f"{path} must end in {KINDS}")
    if tensors and provenance == Provenance() and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors, provenance


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict strictly.

    Raises RetrofitError naming `source` and the keys that do not fit.
    """
    own = model.state_dict()
    if lazy := [key for key, value in own.items() if is_lazy(value)]:
        raise RetrofitError(f"{lazy[0]} has no shape yet: run one batch through the model first")
    # Files from before torch 0.4.1, and some that were made smaller, lack these; torch allows it.
    counts = {key for key in own if key.endswith(".num_batches_tracked") and key not in tensors}
    tensors = {**tensors, **{key: own[key] for key in counts}}
    wrong = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in tensors
            and isinstance(own[key], Tensor)
            and tensors[key].shape != own[key].shape
        ],
        "of another kind": [
            f"{key} {str(tensors[key].dtype).removeprefix('torch.')}"
            for key in own
            if key in tensors and isinstance(own[key], Tensor) and not _fits(tensors[key], own[key])
        ],
    }
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in wrong.items()
        if keys
    ]
    if problems:
        raise RetrofitError(
            f"the weights in {source} do not fit {type(model).__name__}: keys {'; '.join(problems)}"
        )
    model.load_state_dict(dict(tensors))


def _fits(tensor: Tensor, own: Tensor) -> bool:
    """Tell whether these numbers can take the place of the model's own."""
    alike = tensor.is_floating_point() or not own.is_floating_point()
    return is_dense(tensor) and alike and tensor.is_complex() == own.is_complex()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    try:
        # Not mapped into memory: a file cut short while it is in use would end the process then.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise RetrofitError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        told = json.loads(metadata.get("retrofit", "{}"))
        tensors.update({alias: tensors[key] for alias, key in told.pop("aliases", {}).items()})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise RetrofitError(f"{path} is damaged: its metadata cannot be read: {error}") from error
    try:
        return tensors, Provenance.from_json(told)
    except RetrofitError as error:
        raise RetrofitError(f"{path}: {error}") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # what torch finds odd ends in an error or is harmless
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make it raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                "it is damaged or holds more than tensors; save the model's state_dict() instead"
            )
        raise RetrofitError(f"{path} cannot be read as a state dict: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RetrofitError(
            f"{path} holds no state dict: expected tensors by name, or those under one of the keys "
            f"{', '.join(WRAPPERS)}"
        )
    return {str(key): tensor for key, tensor in content.items()}
