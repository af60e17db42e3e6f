"""Save and load: safetensors with provenance, or a plain state dict.

Nothing that is read here is ever unpickled into code, and nothing that a file names is imported.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.atomic_write import write_whole
from retrofit.calibration.sample_errors import Calibration
from retrofit.checking.drift import Drift
from retrofit.checking.verify import Verification
from retrofit.conversion import inserted
from retrofit.errors import RetrofitError, warn
from retrofit.files.batchnorm_settings import warn_of_unusual
from retrofit.files.converted_keys import refuse_changed_sites
from retrofit.files.fitting import Fit, fits, fitted, load_weights
from retrofit.files.model_args import ModelArgs, in_words
from retrofit.files.model_sources import is_torchvision, torchvision_model
from retrofit.files.named_network import difference
from retrofit.files.onnx_files import is_onnx
from retrofit.files.plan_by_keys import keys_tell, places, plan_by_keys
from retrofit.files.provenance import Provenance, provenance_of
from retrofit.files.suffixes import PICKLED, SUFFIXES
from retrofit.files.weights import WeightsFile, open_weights
from retrofit.numerics.tensor_checks import is_dense
from retrofit.option_checks import check_flags, check_text
from retrofit.pictures.preparation import Preparation
from retrofit.running.shared_copy import refuse_inference_mode, shared_copy
from retrofit.surgery.record import attach, plan_of

EXPORT = (
    "for ONNX, load that in Python and torch.onnx.export(model, images, path, dynamo=True, "
    "optimize=False), which keeps BatchNorms"
)


def check_output(path: Path, *, overwrite: bool, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise RetrofitError if a file could not be written there: asked before the work is done."""
    if path.suffix not in suffixes:
        allowed = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        hint = f": {EXPORT}" if is_onnx(path) else ""
        raise RetrofitError(f"{path} must end in {allowed}{hint}")
    if path.exists() and not overwrite:
        raise RetrofitError(f"{path} exists: choose another name, or --overwrite (overwrite=True)")
    if path.is_dir():
        raise RetrofitError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise RetrofitError(f"the folder {path.parent} does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RetrofitError(f"cannot write to {path.parent}: {error.strerror}") from error


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    model_args: ModelArgs | None = None,
    weights: str | None = None,
    data: str | None = None,
    preparation: Preparation | None = None,
    calibration: Calibration | None = None,
    verification: Verification | None = None,
    drift: Drift | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model's state dict, whole or not at all.

    Warns of what `load` will not find in a `.pth`: where the BatchNorms are, if their keys do not
    tell, and another eps or momentum than torch's; and of a `.safetensors` that `load` will build
    another network for (of another activation, say), as far as its modules tell.

    Args:
        model: converted or folded by this package, or any other.
        path: `.safetensors`, with provenance in its metadata (versions, plan, eps, number of
            images, and what follows here), or `.pth` / `.pt`, a plain state dict for torch.load.
            Tensors that are shared are stored once.
        name: what the model is, e.g. "vgg16", or "package.module:factory"; `load` rebuilds
            torchvision's models from it.
        model_args: what the function that builds it is called with, e.g. {"num_classes": 10};
            numbers, texts, True, False, None, and lists of these. `load` passes them to
            torchvision's models.
        weights: the name of the weights that it was built with, e.g. "IMAGENET1K_V1": with them
            torchvision builds some models in another way (`transform_input` of Inception, frozen
            BatchNorms of detectors), and so will `load`.
        data: what it was calibrated on, in words.
        preparation: how pictures were prepared, where that is not as the model was trained: the
            commands `adapt`, `verify` and `report` then prepare theirs alike.
        calibration: what `calibrate` found; `retrofit report` shows it.
        verification: what `verify` found, likewise.
        drift: what `drift` found, likewise.
        overwrite: replace an existing file.

    Raises:
        RetrofitError: the suffix is none of these; the path cannot be written, or exists without
            `overwrite`; an entry of the state dict is no tensor (`.safetensors`); `load` could not
            read the file, because a BatchNorm or the layer before it was changed since the
            conversion (it lost its running statistics, or was pruned), the BatchNorms have several
            eps (`.safetensors`), or an argument is of another type, or names weights that there
            are not; a tensor is on the meta device.
        OSError: writing failed half-way; an existing file is then as it was.
    """
    _check_call("save(model, path)", path, model)
    check_flags(overwrite=overwrite)
    path = Path(path).resolve()  # what a link points to is what gets replaced
    check_output(path, overwrite=overwrite)
    state = model.state_dict()
    refuse_changed_sites(model, state)
    if empty := [key for key, t in state.items() if isinstance(t, Tensor) and t.is_meta]:
        raise RetrofitError(f"{empty[0]} is on the meta device: it has no numbers to save")
    if path.suffix in PICKLED:
        _warn_of_what_is_lost(model, state, path)
        write_whole(path, lambda file: torch.save(state, file))
        return
    from safetensors.torch import save as serialized  # noqa: PLC0415 - keeps the import fast

    tensors, aliases = _unshared(state)
    told = provenance_of(
        model,
        name=name,
        model_args=model_args,
        weights=weights,
        data=data,
        preparation=preparation,
        calibration=calibration,
        verification=verification,
        drift=drift,
    )
    if differs := difference(model, told):
        warn(
            f"load({path.name!r}) will build another network: {differs}; save it with the "
            f"model_args= or weights= that torchvision builds it with, or pass the network to load"
        )
    described = json.dumps({**told.to_json(), "aliases": aliases})
    metadata = {"format": "pt", "retrofit": described}
    # Not its save_file, whose temporary file a kill would leave.
    try:
        write_whole(path, lambda file: file.write(serialized(tensors, metadata)))
    except KeyError as error:  # of a dtype, by safetensors before 0.5 for complex numbers
        raise RetrofitError(f"safetensors cannot store {error}: save as .pth instead") from error


def _warn_of_what_is_lost(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Warn of what a plain state dict does not say, and `load` will not know."""
    if (made := plan_of(model)) is not None and not keys_tell(made, model, state):
        warn(
            f"{path.name} will not say where its BatchNorms are (only the keys do, and those "
            "of this plan are not enough): for load, save it as .safetensors; or keep the plan "
            "and use insert(model, plan).load_state_dict(...)"
        )
    warn_of_unusual(model, path.name)


def _check_call(call: str, path: object, model: object) -> None:
    """Raise RetrofitError, with the call as it should be, for what is no path, or no network."""
    if isinstance(path, (str, os.PathLike)) and isinstance(model, nn.Module):
        return
    given = {"path": path, "model": model}
    kinds = {
        name: f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        for name, value in given.items()
    }
    raise RetrofitError(
        f"{call} takes a str or Path as the path and an nn.Module as the model; it was called with "
        f"path: {kinds['path']}, model: {kinds['model']}"
    )


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    weights_key: str | None = None,
) -> nn.Module:
    """Load the model that `save` wrote, in eval mode, on the device of `model` (else the CPU).

    It loads what others wrote, too: a training run's checkpoint, whose state dict is under a key
    such as "state_dict" or "model", and whose names have prefixes such as "module." or "model.";
    and a plain network's weights, into that network. Which of these a name has is decided by the
    model's own names. A warning says what was chosen of several, and which tensors beside the
    network were passed over.

    Args:
        path: a file of safetensors (`.safetensors`) or of torch.save (`.pth`, `.pt`, `.ckpt`,
            `.bin`), told by its content; the `.index.json` of several; or a folder with these
            under the names of Hugging Face's hub.
        model: the plain architecture, without the inserted BatchNorms; not changed. It can be
            left out for torchvision's models when the file says which one it is.
        weights_key: where the tensors are in a file with several state dicts, such as
            "params_ema"; dotted, where it leads through several mappings or a prefix of names.

    Returns:
        A model of the same class, with BatchNorms if the file has them. For a plain state dict,
        which carries no plan, they stand where its keys say, unless that was asked for with
        `layout="graph"`, `renumber`, or `linear` for inputs of shape (N, F).

    Raises:
        RetrofitError: the file cannot be read or does not fit (with the keys), nothing speaks for
            one of its several state dicts, or the model is not known, or on the meta device. No
            code in the file is run (`weights_only=True`), and nothing that it names is imported.
    """
    refuse_inference_mode()
    _check_call("load(path, model)", path, nn.Module() if model is None else model)
    check_text("weights_key", weights_key)
    return load_opened(open_weights(Path(path)), model, weights_key)


def load_opened(
    file: WeightsFile, model: nn.Module | None = None, weights_key: str | None = None
) -> nn.Module:
    """Load a model as `load` does, from a file that was read before."""
    if model is None:
        model = _rebuild(file)
    for key, own in model.state_dict(keep_vars=True).items():
        if isinstance(own, Tensor) and own.is_meta:
            raise RetrofitError(f"{key} is on the meta device: pass a model that has its tensors")
    result, place = _with_batchnorms(model, file, weights_key)
    tensors = fitted(file, result, place)
    for key, own in result.state_dict(keep_vars=True).items():
        # A file in bfloat16 gives a model in bfloat16; load_weights judges what is no tensor.
        new = tensors.get(key)
        if isinstance(own, Tensor) and isinstance(new, Tensor) and new.is_floating_point():
            own.data = own.data.to(new.dtype)
    load_weights(result, tensors, str(file.path))
    return result.eval()


def _with_batchnorms(
    model: nn.Module, file: WeightsFile, key: str | None
) -> tuple[nn.Module, str | None]:
    """Copy the model, with BatchNorms where the file has them; and say where its tensors are."""
    if (record := file.provenance.record) is not None:
        try:
            result = inserted(model, record.plan, eps=record.eps, momentum=record.momentum)
        except RetrofitError as error:
            said = str(error).removesuffix("; plan this model anew")
            of = f" is of {file.provenance.call}, and" if file.provenance.model else ""
            raise RetrofitError(f"{file.path}{of} does not fit: {said}") from error
        attach(result, record)
        return result, key
    plain = fits(file, model.state_dict(), key)
    if not plain[0].exact:
        return inserted(model, plan_by_keys(model, file, key)), key
    if _has_other_batchnorms(file, key, plain):
        made = plan_by_keys(model, file, key)
        if made.inserted and (converted := places(made, file, key)):
            key = file.preferred([*(fit.place for fit in plain), *converted]) or None
            if key in converted:
                return inserted(model, made), key
    return copy.deepcopy(shared_copy(model)), key  # folded, or never converted


def _has_other_batchnorms(file: WeightsFile, key: str | None, plain: list[Fit]) -> bool:
    """Tell whether there are BatchNorms where the plain network is not."""
    others = {path: list(state) for path, state in file.under(key).items()}
    others |= {fit.path: fit.others for fit in plain}
    return any(name.endswith(".running_var") for names in others.values() for name in names)


def _rebuild(file: WeightsFile) -> nn.Module:
    name, model_args = file.provenance.model, file.provenance.model_args or {}
    if name is None or not is_torchvision(name):
        raise RetrofitError(
            f"{file.path} {_naming(file.provenance)}: pass the network that it was made from, "
            f"load({file.path.name!r}, network)"
        )
    # A file may say anything: it does not get a network of sizes beyond what it could fill.
    numbers = sum(tensor.numel() for state in file.states.values() for tensor in state.values())
    values = [v for v in model_args.values() if not isinstance(v, tuple)]
    values += [item for v in model_args.values() if isinstance(v, tuple) for item in v]
    if any(isinstance(value, int) and value > numbers for value in values):
        raise RetrofitError(
            f"{file.path}: its metadata is damaged, model_args: {in_words(model_args)} of a file "
            f"of {numbers:,} numbers"
        )
    return torchvision_model(name, model_args, file.provenance.weights)


def _naming(provenance: Provenance) -> str:
    """Say what a file says of its model, where that is no model of torchvision."""
    if provenance.model is None:
        return "does not say what network it is of"
    return f"is of {provenance.call}, which is not torchvision's"


def _unshared(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """List each tensor once, contiguous; and the keys that are the same tensor as another key."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise RetrofitError(f"the state dict entry {key} is no tensor: save as .pth instead")
        if not is_dense(tensor):
            raise RetrofitError(f"the tensor {key} is not dense: save as .pth instead")
        tensor = tensor.resolve_conj().resolve_neg()  # noqa: PLW2901
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            tensors[key] = tensor.contiguous()
    overlapping = [t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()]
    if len(set(overlapping)) < len(overlapping):  # different views of one storage
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return tensors, aliases
